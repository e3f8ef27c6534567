"""Explains errors of Azure: whether they are transient, and what to do about them. Pure.

What does not belong here: raising, retries, waiting (`requests`).
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator

import aiohttp
from azure.core.exceptions import (
    ClientAuthenticationError,
    HttpResponseError,
    IncompleteReadError,
    ServiceRequestError,
    ServiceResponseError,
)

from async_ckpt.errors import CheckpointExistsError, StoreError, ThrottledError, TransientStoreError
from async_ckpt.retry import is_transient
from async_ckpt.stores.requests import Verdict

__all__ = ["code_of", "explain"]

_CREDENTIALS = (
    "Check the account's name and key, the SAS token and its dates, or the login that DefaultAzureCredential finds, "
    "and this machine's clock."
)
_PERMISSION = (
    "Give this identity the role Storage Blob Data Contributor on the container, or the SAS token the permissions "
    "racwdl; see also the account's firewall."
)
_ADVICE = {
    "AuthenticationFailed": _CREDENTIALS,
    "AuthorizationFailure": f"{_CREDENTIALS} {_PERMISSION}",
    "AuthorizationPermissionMismatch": _PERMISSION,
    "AuthorizationProtocolMismatch": _PERMISSION,
    "AuthorizationResourceTypeMismatch": _PERMISSION,
    "AuthorizationServiceMismatch": _PERMISSION,
    "AuthorizationSourceIPMismatch": _PERMISSION,
    "InsufficientAccountPermissions": _PERMISSION,
    "InvalidAuthenticationInfo": _CREDENTIALS,
    "NoAuthenticationInformation": _CREDENTIALS,
    "PublicAccessNotPermitted": _CREDENTIALS,
    "BlobImmutableDueToPolicy": "Save to another name, or to a container without that policy.",
    "ContainerBeingDeleted": "Wait until it is deleted, and create it again.",
    "ContainerNotFound": "Create the container, as a save does not create it, or correct the URL.",
    "InvalidBlobOrBlock": (
        "Another program may have left uncommitted blocks under this name whose ids have another length. They expire "
        "after a week; a small blob uploaded there, and removed again, drops them at once. Or save to another name."
    ),
    "InvalidBlobType": "A page or append blob is there: remove it, or save to another name.",
    "InvalidResourceName": "The container's or the blob's name is not one that Azure allows.",
    "LeaseIdMissing": "Somebody holds a lease on it: end the lease, or save to another name.",
    "ResourceTypeMismatch": "A directory is there: save to another name.",
    "SnapshotsPresent": "It has snapshots: delete those first.",
}
_EXISTS = frozenset({"BlobAlreadyExists", "ConditionNotMet", "PathAlreadyExists", "TargetConditionNotMet"})
_THROTTLED_STATUSES = frozenset({429, 503})
_TRANSIENT_STATUSES = frozenset({408, 500, 502, 504})
# The name does not exist, or has no address; all other errors of the resolver are transient.
_NO_SUCH_HOST = frozenset(
    getattr(socket, name) for name in ("EAI_NONAME", "EAI_NODATA") if hasattr(socket, name)
)


def explain(error: Exception) -> Verdict:
    """Explain *error*; see ``requests.Verdict``."""
    if isinstance(error, HttpResponseError) and error.status_code is not None:
        return _explain_answer(error, error.status_code)
    if isinstance(error, ClientAuthenticationError):  # no answer: the credential itself found no way
        return Verdict(advice=_CREDENTIALS, reason=_first_line(error))
    for cause in _causes(error):
        if isinstance(cause, socket.gaierror) and cause.errno in _NO_SUCH_HOST:
            advice = "Check the account's name, account_host or the connection string, and the network."
            return Verdict(advice=advice, reason=_first_line(error))
        if isinstance(cause, ssl.SSLError | ssl.CertificateError):
            advice = "Check the certificates that this machine trusts, and its clock."
            return Verdict(advice=advice, reason=_first_line(error))
    lost = (
        aiohttp.ClientConnectionError,
        aiohttp.ClientPayloadError,
        IncompleteReadError,
        ServiceRequestError,
        ServiceResponseError,
    )
    if isinstance(error, lost):
        return Verdict(kind=TransientStoreError, reason=_first_line(error))
    return Verdict(kind=TransientStoreError if is_transient(error) else StoreError)


def code_of(error: BaseException | None) -> str:
    """Return Azure's code of an error of its client, or of the StoreError made from one; ``""`` if it has none."""
    if isinstance(error, StoreError):
        error = error.__cause__
    if not isinstance(error, HttpResponseError):
        return ""
    code = getattr(error, "error_code", None)
    if code is None and error.response is not None:
        code = getattr(error.response, "headers", {}).get("x-ms-error-code")
    return str(getattr(code, "value", code) or "")


def _explain_answer(error: HttpResponseError, status: int) -> Verdict:
    code = code_of(error)
    text = _first_line(error)
    reason = f"{text} ({code or f'HTTP {status}'})"
    kind = StoreError
    if code == "ServerBusy" or status in _THROTTLED_STATUSES:
        kind = ThrottledError
    elif status in _TRANSIENT_STATUSES:
        kind = TransientStoreError
    elif code in _EXISTS:
        advice = "overwrite=False: remove it first, or save to another name."
        return Verdict(kind=CheckpointExistsError, advice=advice, reason=reason)
    advice = _ADVICE.get(code, "")
    if not advice and status in (401, 403):
        advice = _CREDENTIALS if status == 401 else _PERMISSION
    missing = status == 404 and code not in ("ContainerNotFound", "ResourceTypeMismatch")
    return Verdict(kind=kind, missing=missing, advice=advice, reason=reason)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield *error* and its causes; aiohttp keeps the system's error in an attribute."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = getattr(error, "os_error", None) or error.__cause__ or error.__context__


def _first_line(error: Exception) -> str:
    """Return the error's message without the ids and times that Azure adds on further lines."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
