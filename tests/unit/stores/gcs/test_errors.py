"""What errors of Google Cloud Storage are taken for."""

from __future__ import annotations

import json
import socket
import ssl
from typing import Any
from unittest.mock import Mock

import aiohttp
import google.auth.exceptions
import pytest
import requests.exceptions
from gcsfs.retry import HttpError

from async_ckpt.errors import CheckpointExistsError, StoreError, ThrottledError, TransientStoreError
from async_ckpt.stores.gcs.errors import Refusal, explain

auth_errors: Any = google.auth.exceptions  # its constructors are not annotated


def answer(status: int, reason: str = "", message: str = "") -> Refusal:
    """Return a refusal as the JSON interface words it."""
    error = {"code": status, "message": message, "errors": [{"reason": reason, "message": message}]}
    return Refusal(status, json.dumps({"error": error}).encode())


def caused(error: Exception, cause: Exception) -> Exception:
    """Return *error* as if it had been raised from *cause*."""
    error.__cause__ = cause
    return error


def connector_error(number: int) -> aiohttp.ClientConnectorError:
    """Return what aiohttp raises for a name that does not resolve."""
    key: Any = Mock(host="host", port=443, ssl=True)
    return aiohttp.ClientConnectorError(key, socket.gaierror(number, "resolving"))


RENEWAL = HttpError({"code": 401, "message": "Invalid Credentials"})


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (answer(429), ThrottledError),
        (answer(503), ThrottledError),
        (answer(403, "userRateLimitExceeded"), ThrottledError),
        (answer(408), TransientStoreError),
        (answer(500), TransientStoreError),
        (answer(502), TransientStoreError),
        (answer(504), TransientStoreError),
        (answer(412), CheckpointExistsError),
        (Refusal(200, b"<html>"), TransientStoreError),
        (Refusal(308), StoreError),
        (answer(400), StoreError),
        (answer(401), StoreError),
        (answer(403, "forbidden"), StoreError),
        (answer(404), StoreError),
        (answer(413), StoreError),
        (answer(501), StoreError),
        (TimeoutError(), TransientStoreError),
        (aiohttp.ServerDisconnectedError(), TransientStoreError),
        (aiohttp.ClientOSError(104, "reset"), TransientStoreError),
        (aiohttp.ClientPayloadError("incomplete"), TransientStoreError),
        (aiohttp.InvalidURL("nothing"), StoreError),
        (connector_error(socket.EAI_AGAIN), TransientStoreError),
        (connector_error(socket.EAI_NONAME), StoreError),
        (ssl.SSLCertVerificationError("self-signed"), StoreError),
        (requests.exceptions.ConnectionError(), TransientStoreError),
        (auth_errors.TransportError("no route"), TransientStoreError),
        (auth_errors.RefreshError("revoked"), StoreError),
        (auth_errors.RefreshError("busy", retryable=True), TransientStoreError),
        (auth_errors.DefaultCredentialsError("none"), StoreError),
        (caused(RENEWAL, auth_errors.RefreshError("revoked")), StoreError),
        (ValueError("anything else"), StoreError),
    ],
    ids=repr,
)
def test_kinds(error: Exception, kind: type[StoreError]) -> None:
    """What may pass is told from what will not, and being asked for less from both."""
    assert explain(error).kind is kind


def test_a_renewal_that_failed_for_the_network() -> None:
    """That the token server could not be reached passes; gcsfs words it as if the credentials were wrong."""
    error = HttpError({"code": 401, "message": "Invalid Credentials"})
    assert explain(caused(error, auth_errors.TransportError("reset"))).kind is TransientStoreError


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (answer(401), "GOOGLE_APPLICATION_CREDENTIALS"),
        (Refusal(401, anonymous=True), "the request was anonymous"),
        (Refusal(403, anonymous=True), "the request was anonymous"),
        (answer(403, "forbidden"), "storage.objects.create"),
        (answer(403, "retentionPolicyNotMet"), "retention policy"),
        (answer(403, "accountDisabled", "The billing account for … is disabled"), "Enable billing"),
        (Refusal(308), "endpoint_url"),
        (answer(404), "a bucket of this name"),
        (answer(400, "required", "Bucket is a requester pays bucket"), "requester_pays=True"),
        (connector_error(socket.EAI_NONAME), "endpoint_url"),
        (auth_errors.RefreshError("revoked"), "gcloud auth"),
    ],
    ids=repr,
)
def test_advice(error: Exception, advice: str) -> None:
    """What the user can do about, is said."""
    assert advice in explain(error).advice


@pytest.mark.parametrize(
    ("body", "reason", "message"),
    [
        (b'{"error": {"message": "m", "errors": [{"reason": "r"}]}}', "r", "m"),
        (b'{"error": {"message": "m"}}', "", "m"),
        (b'{"error": "m"}', "", "m"),
        (b"<Error><Code>r</Code><Message>m</Message></Error>", "r", "m"),
        (b"<html>a proxy's page</html>", "", ""),
        (b"m", "", "m"),
        (b"[]", "", "[]"),
        (b"\xff", "", "\ufffd"),
        (b"", "", ""),
    ],
)
def test_answers_of_every_kind(body: bytes, reason: str, message: str) -> None:
    """JSON, XML, plain text and nothing: what they say of the reason is found."""
    refusal = Refusal(400, body)
    assert (refusal.reason, refusal.message) == (reason, message)
