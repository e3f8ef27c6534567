"""What the errors of S3 mean."""

from __future__ import annotations

import errno
import socket
import ssl

import aiohttp
import botocore.exceptions as boto
import pytest

from async_ckpt.errors import CheckpointExistsError, StoreError, ThrottledError, TransientStoreError
from async_ckpt.stores.s3.errors import (
    error_code,
    explain,
    is_expired,
    is_refusal,
    refuses_expect,
    refuses_header,
)


def answered(code: str, status: int = 400, operation: str = "UploadPart", message: str = "") -> Exception:
    """Return what botocore raises for an answer."""
    response = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error: Exception = boto.ClientError(response, operation)
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (answered("SlowDown", 503), ThrottledError),
        (answered("503", 503, "HeadObject"), ThrottledError),
        (answered("TooManyRequests", 429), ThrottledError),
        (answered("InternalError", 500), TransientStoreError),
        (answered("502", 502), TransientStoreError),
        (answered("RequestTimeout", 400), TransientStoreError),
        (answered("ConditionalRequestConflict", 409), TransientStoreError),
        (answered("BadDigest", 400), TransientStoreError),
        (answered("ExpiredToken", 400), TransientStoreError),
        (answered("400", 400, "HeadObject"), TransientStoreError),
        (answered("400", 400, "UploadPart"), StoreError),  # what has a body would say that it is the login
        (answered("NotImplemented", 501), StoreError),
        (answered("AccessDenied", 403), StoreError),
        (answered("NoSuchBucket", 404), StoreError),
        (answered("EntityTooLarge", 400), StoreError),
        (answered("PreconditionFailed", 412, "PutObject"), CheckpointExistsError),
        (answered("PreconditionFailed", 412, "GetObject"), StoreError),
        (boto.ReadTimeoutError(endpoint_url="https://x"), TransientStoreError),
        (boto.ConnectTimeoutError(endpoint_url="https://x"), TransientStoreError),
        (boto.ConnectionClosedError(endpoint_url="https://x"), TransientStoreError),
        (aiohttp.ClientPayloadError("cut"), TransientStoreError),
        (TimeoutError(errno.ETIMEDOUT, "nothing moved"), TransientStoreError),
        (boto.NoCredentialsError(), StoreError),
        (boto.ProfileNotFound(profile="x"), StoreError),
        (boto.ParamValidationError(report="bucket"), StoreError),
        (ValueError("anything else"), StoreError),
    ],
    ids=str,
)
def test_kinds(error: Exception, kind: type[StoreError]) -> None:
    """What may pass is told from what will not, and a request to slow down from either."""
    assert explain(error).kind is kind


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (answered("AccessDenied", 403, "UploadPart"), "s3:PutObject"),
        (answered("AccessDenied", 403, "DeleteObject"), "s3:DeleteObject"),
        (answered("403", 403, "HeadObject"), "s3:GetObject"),
        (answered("AccessDenied", 403, "SomethingElse"), "permission for it"),
        (answered("NoSuchBucket", 404), "Create the bucket"),
        (answered("SignatureDoesNotMatch", 403), "Check the credentials"),
        (answered("AuthorizationHeaderMalformed", 400), "region_name"),
        (answered("PermanentRedirect", 301), "region_name"),
        (answered("RequestTimeTooSkewed", 403), "clock"),
        (answered("ExpiredToken", 400), "renew them"),
        (answered("400", 400, "HeadObject"), "may have expired"),
        (answered("XAmzContentSHA256Mismatch", 400), "payload_signing_enabled"),
        (boto.NoCredentialsError(), "Check the credentials"),
    ],
    ids=str,
)
def test_advice(error: Exception, advice: str) -> None:
    """The message of an error that does not pass says what to do."""
    assert advice in explain(error).advice


def test_names_that_do_not_resolve() -> None:
    """A host that does not exist does not pass; a resolver that does not answer may."""

    def unreachable(number: int) -> Exception:
        error: Exception = boto.EndpointConnectionError(endpoint_url="https://x")
        error.__context__ = socket.gaierror(number, "name")
        return error

    assert explain(unreachable(socket.EAI_NONAME)).kind is StoreError
    assert "does not resolve" in explain(unreachable(socket.EAI_NONAME)).reason
    assert explain(unreachable(socket.EAI_AGAIN)).kind is TransientStoreError


def test_certificates_that_are_not_trusted() -> None:
    """A certificate that is not trusted does not pass, and the message says where to name another."""
    error: Exception = boto.SSLError(endpoint_url="https://x", error="bad")
    error.__context__ = ssl.SSLCertVerificationError("self-signed certificate")
    assert explain(error).kind is StoreError
    assert "AWS_CA_BUNDLE" in explain(error).advice
    error.__context__ = ssl.SSLEOFError()  # a connection that was cut during the handshake
    assert explain(error).kind is TransientStoreError


def test_missing() -> None:
    """That there is no object is told from that there is no bucket."""
    assert explain(answered("404", 404, "HeadObject")).missing
    assert explain(answered("NoSuchKey", 404, "GetObject")).missing
    assert not explain(answered("NoSuchBucket", 404, "ListObjectsV2")).missing


def test_codes_of_translated_errors() -> None:
    """The code of an answer is found behind a translated error."""
    translated = StoreError("cannot write")
    translated.__cause__ = answered("AccessDenied", 403)
    assert error_code(translated) == "AccessDenied"
    assert is_refusal(translated)
    assert is_expired(answered("ExpiredToken"))
    assert is_expired(answered("400", 400, "HeadObject"))  # has no body to say so
    assert error_code(ValueError()) == error_code(None) == ""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (answered("NotImplemented", 501), True),
        (answered("InvalidRequest", 400), True),
        (answered("", 400), True),
        (answered("BadDigest", 400), False),
        (answered("XAmzContentChecksumMismatch", 400), False),
        (answered("NoSuchUpload", 404), False),
        (answered("InvalidPart", 400), False),
        (answered("KMS.DisabledException", 400), False),
        (answered("RequestTimeout", 400), False),
        (answered("AccessDenied", 403), False),
        (answered("InternalError", 500), False),
        (TimeoutError(), False),
    ],
    ids=str,
)
def test_refused_headers(error: Exception, expected: bool) -> None:
    """An answer that may be about a header is told from one about the bytes, the login, or what may pass."""
    assert refuses_header(error) is expected


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (answered("NotImplemented", 501), True),
        (answered("405", 405), True),
        (answered("AccessDenied", 403), True),
        (answered("404", 404), True),
        (answered("NoSuchBucket", 404), False),
        (answered("InvalidAccessKeyId", 403), False),
        (answered("ExpiredToken", 400), False),
        (answered("SlowDown", 503), False),
        (answered("PermanentRedirect", 301), False),
        (boto.NoCredentialsError(), False),
    ],
    ids=str,
)
def test_refused_requests(error: Exception, expected: bool) -> None:
    """A request that a server will have none of is told from trouble with every request, and from what may pass."""
    assert is_refusal(error) is expected


def test_refused_questions() -> None:
    """That a server is not to be asked whether a body is welcome has a status of its own."""
    assert refuses_expect(answered("417", 417))
    assert not refuses_expect(answered("400", 400))
