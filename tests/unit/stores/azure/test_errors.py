"""What Azure's errors mean."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Mapping
from typing import Any

import aiohttp
import pytest
from aiohttp.client_reqrep import ConnectionKey
from azure.core.exceptions import (
    ClientAuthenticationError,
    HttpResponseError,
    IncompleteReadError,
    ResourceNotFoundError,
    ServiceRequestError,
    ServiceRequestTimeoutError,
    ServiceResponseError,
)

from async_ckpt.errors import CheckpointExistsError, StoreError, ThrottledError, TransientStoreError
from async_ckpt.stores.azure.errors import code_of, explain


class Answer:
    """As much of an HTTP answer as an error keeps."""

    reason = "as it is"

    def __init__(self, status: int, code: str = "") -> None:
        self.status_code = status
        self.headers: Mapping[str, str] = {"x-ms-error-code": code} if code else {}


def refused(
    status: int, code: str = "", kind: type[HttpResponseError] = HttpResponseError
) -> HttpResponseError:
    """Return what the client raises for an answer."""
    answer: Any = Answer(status, code)
    return kind(message="It went wrong.\nRequestId:1\nTime:2", response=answer)


ANSWERS = {
    (503, "ServerBusy"): ThrottledError,
    (503, ""): ThrottledError,
    (429, ""): ThrottledError,
    (500, "OperationTimedOut"): TransientStoreError,
    (500, "InternalError"): TransientStoreError,
    (502, ""): TransientStoreError,
    (504, ""): TransientStoreError,
    (409, "BlobAlreadyExists"): CheckpointExistsError,
    (412, "ConditionNotMet"): CheckpointExistsError,
    (412, "LeaseIdMissing"): StoreError,
    (400, "InvalidBlobOrBlock"): StoreError,
    (403, "AuthenticationFailed"): StoreError,
    (403, "AuthorizationPermissionMismatch"): StoreError,
    (403, ""): StoreError,
    (404, "ContainerNotFound"): StoreError,
    (409, "BlobImmutableDueToPolicy"): StoreError,
}


@pytest.mark.parametrize(("status", "code"), ANSWERS)
def test_answers(status: int, code: str) -> None:
    """An answer's status and code tell whether to try again; the reason names the code and leaves out the ids."""
    verdict = explain(refused(status, code))

    assert verdict.kind is ANSWERS[status, code]
    assert not verdict.missing
    assert verdict.reason == f"It went wrong. ({code or f'HTTP {status}'})"
    assert bool(verdict.advice) == (not issubclass(verdict.kind, TransientStoreError))


def test_nothing_there() -> None:
    """A blob that does not exist is missing; a container that does not exist is not."""
    assert explain(refused(404, "BlobNotFound", ResourceNotFoundError)).missing
    assert explain(refused(404)).missing
    assert not explain(refused(404, "ContainerNotFound", ResourceNotFoundError)).missing


def unreachable(cause: OSError) -> ServiceRequestError:
    """Return what the client raises where no connection comes about."""
    key = ConnectionKey("account.example", 443, True, True, None, None, None)
    error = ServiceRequestError("Cannot connect to host account.example")
    error.__cause__ = aiohttp.ClientConnectorError(key, cause)
    return error


LOST = [
    unreachable(ConnectionRefusedError(111, "Connection refused")),
    unreachable(socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")),
    ServiceRequestTimeoutError("late"),
    ServiceResponseError("disconnected"),
    IncompleteReadError("half"),
    aiohttp.ClientPayloadError("half"),
    aiohttp.ServerDisconnectedError(),
    TimeoutError(110, "nothing moved"),
    ConnectionResetError(104, "reset"),
]


@pytest.mark.parametrize("error", LOST, ids=repr)
def test_lost_connections_are_transient(error: Exception) -> None:
    """Whatever a bad network does may pass."""
    assert explain(error).kind is TransientStoreError


def test_an_unknown_host_is_permanent() -> None:
    """A name that has no address, as of an account that does not exist, is told at once with what to check."""
    verdict = explain(unreachable(socket.gaierror(socket.EAI_NONAME, "Name or service not known")))

    assert verdict.kind is StoreError
    assert "account's name" in verdict.advice


def test_a_bad_certificate_is_permanent() -> None:
    """A server that cannot be trusted is not asked again."""
    verdict = explain(unreachable(ssl.SSLCertVerificationError(1, "self-signed certificate")))

    assert verdict.kind is StoreError
    assert "certificates" in verdict.advice


def test_no_login() -> None:
    """A credential that finds no way to log in is permanent."""
    verdict = explain(ClientAuthenticationError("DefaultAzureCredential failed\nAttempted:\n…"))

    assert verdict.kind is StoreError
    assert verdict.reason == "DefaultAzureCredential failed"
    assert "DefaultAzureCredential" in verdict.advice


def test_everything_else_is_permanent() -> None:
    """An error that nobody knows is not repeated."""
    verdict = explain(LookupError("what?"))

    assert (verdict.kind, verdict.advice, verdict.reason) == (StoreError, "", "")


def test_the_code_of_an_error() -> None:
    """The code is found in the client's error and in ours that was made of it; others have none."""
    ours = StoreError("ours")
    ours.__cause__ = refused(400, "InvalidBlockList")

    assert code_of(ours) == code_of(ours.__cause__) == "InvalidBlockList"
    assert code_of(StoreError("alone")) == code_of(ValueError()) == code_of(None) == ""
