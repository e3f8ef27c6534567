"""Explains errors of Google Cloud Storage, of gcsfs and of the network. Pure.

Guarantees: transient errors are told from permanent ones, and the message says what can be done (E3).

What does not belong here: requests, and the status codes of a running upload (`upload`).
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import ssl
from collections.abc import Container
from typing import Any

import aiohttp
import google.auth.exceptions
import requests.exceptions
from gcsfs.retry import HttpError

from async_ckpt.errors import CheckpointExistsError, StoreError, ThrottledError, TransientStoreError
from async_ckpt.stores.requests import Verdict

__all__ = ["EXISTS", "Refusal", "explain", "refused_with"]

#: What ``overwrite=False`` ran into.
EXISTS = "a checkpoint is there already, and overwrite=False"

_BUSY = frozenset({429, 503})
_PASSING = frozenset({408, 500, 502, 504})
_TOO_MANY = frozenset({"rateLimitExceeded", "userRateLimitExceeded"})
_HELD = frozenset({"retentionPolicyNotMet", "objectUnderActiveHold"})
# The name does not exist; all other errors of the resolver are transient.
_NO_SUCH_HOST = frozenset({socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)})

_LOG_IN = (
    "Log in (gcloud auth application-default login), set GOOGLE_APPLICATION_CREDENTIALS, or give a token in "
    "storage_options."
)
_RIGHTS = (
    "Saving needs storage.objects.create, to replace a checkpoint also storage.objects.delete, loading "
    "storage.objects.get and removing storage.objects.delete and storage.objects.list."
)
_ENDPOINT = "This is not an answer of Google's: check endpoint_url, STORAGE_EMULATOR_HOST and proxies."
_ANONYMOUS = f"No credentials were found, so the request was anonymous. {_LOG_IN}"


class Refusal(Exception):
    """An answer that refuses the request, or an unexpected one.

    Attributes:
        status: the HTTP status.
        reason: Google's reason, such as ``retentionPolicyNotMet``; may be empty.
        message: Google's message; may be empty.
        anonymous: whether the request had no credentials.
    """

    def __init__(self, status: int, body: bytes = b"", *, anonymous: bool = False) -> None:
        self.status = status
        self.reason, self.message = _told(body)
        self.anonymous = anonymous
        super().__init__(f"HTTP {status}" + (f", {self.message}" if self.message else ""))


def explain(error: Exception) -> Verdict:
    """Say what *error* means.

    Args:
        error: the error of a request.

    Returns:
        The kind of error to raise, and the advice.
    """
    if isinstance(error, Refusal):
        return _explain_refusal(error)
    if isinstance(error, (HttpError, google.auth.exceptions.GoogleAuthError)):
        return _explain_credentials(error)
    return _explain_connection(error)


def refused_with(error: BaseException, statuses: Container[int]) -> bool:
    """Return whether *error*, already translated, was caused by an answer with one of *statuses*."""
    return isinstance(error.__cause__, Refusal) and error.__cause__.status in statuses


def _explain_refusal(error: Refusal) -> Verdict:
    if error.status in _BUSY or error.reason in _TOO_MANY:
        return Verdict(kind=ThrottledError)
    if error.status in _PASSING:
        return Verdict(kind=TransientStoreError)
    if error.status < 400:
        return Verdict(kind=TransientStoreError if error.status < 300 else StoreError, advice=_ENDPOINT)
    if error.status == 401:
        return Verdict(advice=_ANONYMOUS if error.anonymous else f"The credentials are not valid. {_LOG_IN}")
    if error.status == 403:
        if error.reason in _HELD:
            return Verdict(advice="The checkpoint there is under a hold or a retention policy.")
        if "billing account" in error.message:
            return Verdict(advice="Enable billing for the project that owns the bucket.")
        return Verdict(advice=_ANONYMOUS if error.anonymous else _RIGHTS)
    if error.status == 404:
        return Verdict(missing=True, advice="Check that there is a bucket of this name.")
    if error.status == 412:
        return Verdict(kind=CheckpointExistsError, reason=EXISTS)
    if error.status == 400 and "requester pays" in error.message.lower():
        return Verdict(advice="Set requester_pays=True, and a project, in storage_options.")
    return Verdict()


def _explain_credentials(error: Exception) -> Verdict:
    """Tell apart a token server that cannot be reached and one that refuses."""
    # gcsfs hides the cause of a failed refresh behind its own HttpError.
    cause = error.__cause__ if isinstance(error.__cause__, google.auth.exceptions.GoogleAuthError) else error
    if isinstance(cause, google.auth.exceptions.TransportError) or getattr(cause, "retryable", False):
        return Verdict(kind=TransientStoreError, reason=f"cannot get an access token: {cause}")
    return Verdict(advice=_LOG_IN, reason=f"cannot get an access token: {cause}")


def _explain_connection(error: Exception) -> Verdict:
    if isinstance(error, (aiohttp.ClientSSLError, ssl.SSLError)):
        return Verdict(advice="The server's certificate was not accepted; check the endpoint.")
    if isinstance(error, aiohttp.ClientConnectorError) and isinstance(error.os_error, socket.gaierror):
        if error.os_error.errno in _NO_SUCH_HOST:
            return Verdict(
                advice="There is no host of that name; check endpoint_url and STORAGE_EMULATOR_HOST."
            )
        return Verdict(kind=TransientStoreError)
    if isinstance(error, aiohttp.InvalidURL):
        return Verdict(advice="Check endpoint_url and STORAGE_EMULATOR_HOST.")
    passing = (
        aiohttp.ClientError,
        asyncio.TimeoutError,
        TimeoutError,
        requests.exceptions.ConnectionError,
        requests.exceptions.Timeout,
    )
    if isinstance(error, passing):
        return Verdict(kind=TransientStoreError, reason=str(error) or "the connection was lost")
    return Verdict()


def _told(body: bytes) -> tuple[str, str]:
    """Return the reason and the message of an answer, which is JSON of two kinds, XML or plain text."""
    text = body[:4096].decode("utf-8", "replace").strip()
    try:
        error: Any = json.loads(text)["error"]
        if isinstance(error, dict):
            first: Any = (error.get("errors") or [{}])[0]
            return str(first.get("reason", "")), str(error.get("message", ""))
        return "", str(error)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    code, message = (re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL) for tag in ("Code", "Message"))
    if message:
        return code[1] if code else "", message[1]
    return "", "" if text.startswith("<") else text
