"""Explains errors of S3 and of its client library, and what to do about them. Pure.

Guarantees: transient errors are told from permanent ones, and throttling from both (E3). What does not belong here:
retries, and lost answers to a commit (`upload`).
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from http import HTTPStatus

import aiohttp
import botocore.exceptions as boto
from botocore.parsers import ResponseParserError

from async_ckpt.errors import CheckpointExistsError, StoreError, ThrottledError, TransientStoreError
from async_ckpt.stores.requests import Verdict

__all__ = ["error_code", "explain", "is_expired", "is_refusal", "refuses_expect", "refuses_header"]

_PERMISSIONS = {
    "PutObject": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads",
    "ListParts": "s3:ListMultipartUploadParts",
    "HeadObject": "s3:GetObject, and s3:ListBucket, without which a missing object is reported as forbidden",
    "GetObject": "s3:GetObject",
    "ListObjectsV2": "s3:ListBucket",
    "DeleteObject": "s3:DeleteObject",
    "DeleteObjects": "s3:DeleteObject",
}
_DENIED = "These credentials lack the permission {permission}; where the bucket encrypts with a KMS key, "
_DENIED += "kms:GenerateDataKey and kms:Decrypt are needed too."
_CREDENTIALS = "Check the credentials: storage_options, the environment, the AWS profile."
_EXPIRED = "The credentials have expired; renew them where they come from, then save again."
_REGION = "The bucket is in another region: give it as storage_options={'client_kwargs': {'region_name': …}}."
_BUCKET = "Create the bucket, or correct its name; it is never made here."
_ADDRESS = "Check the endpoint's name: the environment's AWS_ENDPOINT_URL, storage_options['endpoint_url']."
_CLOCK = "Set this machine's clock."
_SIGNING = "If the server demands signed bodies: config_kwargs={'s3': {'payload_signing_enabled': True}}."

_MISSING = frozenset({"404", "NoSuchKey", "NoSuchVersion", "NotFound"})
_DENIED_CODES = frozenset({"403", "AccessDenied", "AllAccessDisabled"})
_EXPIRED_CODES = frozenset(
    {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"}
)
_BODILESS = frozenset({"HeadBucket", "HeadObject"})  # the answer to which says no more than 400
_THROTTLED = frozenset(
    {
        "429",
        "503",
        "BandwidthLimitExceeded",
        "RequestLimitExceeded",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
    }
)
# A part that was damaged in transit is sent again; one whose bytes have changed since fails every time.
_TRANSIENT = frozenset(
    {
        "408",
        "409",
        "BadDigest",
        "ConditionalRequestConflict",
        "IncompleteBody",
        "InternalError",
        "OperationAborted",
        "RequestTimeout",
        "XAmzContentChecksumMismatch",
    }
)
# Answers to requests or headers that a server does not support: S3's own, and those of proxies.
_REFUSING = frozenset({400, 403, 404, 405, 406, 411, 415, 417, 501})
_REFUSING_HEADERS = frozenset({400, 411, 415, 501})
# Not such answers, whatever their status: they concern every request.
_OF_EVERY_REQUEST = frozenset(
    {
        *_EXPIRED_CODES,
        "AuthorizationHeaderMalformed",
        "IllegalLocationConstraintException",
        "IncompleteBody",
        "InvalidAccessKeyId",
        "InvalidBucketName",
        "InvalidToken",
        "NoSuchBucket",
        "RequestTimeTooSkewed",
        "RequestTimeout",
        "SignatureDoesNotMatch",
    }
)
# Nor these, which concern the bytes: the server understood the checksum, or failed on something else.
_OF_THE_BYTES = frozenset(
    {
        "BadDigest",
        "EntityTooLarge",
        "EntityTooSmall",
        "InvalidPart",
        "InvalidPartOrder",
        "InvalidStorageClass",
        "KeyTooLongError",
        "MetadataTooLarge",
        "NoSuchUpload",
        "XAmzContentChecksumMismatch",
    }
)
_ADVICE = {
    "301": _REGION,
    "400": f"{_CREDENTIALS} They may have expired.",
    "AuthorizationHeaderMalformed": _REGION,
    "IllegalLocationConstraintException": _REGION,
    "InvalidAccessKeyId": _CREDENTIALS,
    "InvalidToken": _CREDENTIALS,
    "NoSuchBucket": _BUCKET,
    "NoSuchUpload": "The upload was aborted by someone else, a lifecycle rule perhaps.",
    "PermanentRedirect": _REGION,
    "RequestTimeTooSkewed": _CLOCK,
    "SignatureDoesNotMatch": _CREDENTIALS,
    "XAmzContentSHA256Mismatch": _SIGNING,
}
_NO_CREDENTIALS = (
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.CredentialRetrievalError,
    boto.ProfileNotFound,
    boto.SSOError,
    boto.TokenRetrievalError,
    boto.NoAuthTokenError,
)
_LOST = (  # what befalls a request, not what it asks for
    boto.HTTPClientError,
    boto.EndpointConnectionError,
    boto.ConnectTimeoutError,
    boto.ProxyConnectionError,
    ResponseParserError,
    aiohttp.ClientError,
    TimeoutError,
    ConnectionError,
)
_CUT = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ConnectionResetError)  # in the midst of a handshake too
_NO_SUCH_HOST = frozenset({socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)})


def error_code(error: BaseException | None) -> str:
    """Return the S3 error code of *error*, or what stands for it; empty for other errors."""
    answer = _answer(error)
    return "" if answer is None else str(answer.response.get("Error", {}).get("Code", ""))


def is_expired(error: BaseException) -> bool:
    """Return whether the error says, or may mean, that the credentials have expired."""
    answer, code = _answer(error), error_code(error)
    return code in _EXPIRED_CODES or (
        code == "400" and answer is not None and answer.operation_name in _BODILESS
    )


def is_refusal(error: BaseException) -> bool:
    """Return whether a server refuses a kind of request: it does not support it, or not for us."""
    return _status(error) in _REFUSING and error_code(error) not in _OF_EVERY_REQUEST


def refuses_header(error: BaseException) -> bool:
    """Return whether a server may have refused an unknown header; only the same request without it can prove that."""
    code = error_code(error)
    return (
        _status(error) in _REFUSING_HEADERS
        and code not in _OF_EVERY_REQUEST | _OF_THE_BYTES
        and not code.startswith("KMS.")
    )


def refuses_expect(error: BaseException) -> bool:
    """Return whether a server or a proxy refuses ``Expect: 100-continue``."""
    return _status(error) == HTTPStatus.EXPECTATION_FAILED


def explain(error: Exception) -> Verdict:
    """Explain *error*, from aiobotocore or aiohttp."""
    if isinstance(error, boto.ClientError):
        return _explain_answer(error)
    for each in _chain(error):
        if isinstance(each, socket.gaierror) and each.errno in _NO_SUCH_HOST:
            return Verdict(advice=_ADDRESS, reason=f"the server's name does not resolve ({each.strerror})")
        if isinstance(each, ssl.SSLCertVerificationError):
            advice = "Make its certificate known: AWS_CA_BUNDLE, or client_kwargs={'verify': …}."
            return Verdict(advice=advice, reason=f"the server's certificate is not trusted ({each})")
        if isinstance(each, _CUT):
            return Verdict(kind=TransientStoreError)
    if isinstance(error, _NO_CREDENTIALS):
        return Verdict(advice=_CREDENTIALS)
    if isinstance(error, boto.ParamValidationError):
        return Verdict(advice="Check the URL and storage_options.")
    if isinstance(error, _LOST):
        return Verdict(kind=TransientStoreError)
    return Verdict()


def _explain_answer(error: boto.ClientError) -> Verdict:
    code = error_code(error)
    status = _status(error)
    operation = error.operation_name
    message = error.response.get("Error", {}).get("Message", "").rstrip(".")
    reason = f"{operation} was answered {code}: {message}" if message else f"{operation} was answered {code}"
    if code in _MISSING and operation not in ("ListMultipartUploads", "ListObjectsV2"):
        return Verdict(missing=True, reason=reason, advice=_BUCKET if operation != "HeadObject" else "")
    if code in ("412", "PreconditionFailed") and operation == "GetObject":
        return Verdict(reason="it was replaced while it was read", advice="Read it again.")
    if code in ("412", "PreconditionFailed"):
        return Verdict(kind=CheckpointExistsError, reason="a checkpoint is there, and overwrite=False")
    if code in _THROTTLED or status in (429, 503):
        return Verdict(kind=ThrottledError, reason=reason)
    if is_expired(error):
        return Verdict(kind=TransientStoreError, reason=reason, advice=_ADVICE.get(code, _EXPIRED))
    if code in _TRANSIENT or (status >= 500 and status != 501):
        return Verdict(kind=TransientStoreError, reason=reason)
    if code in _DENIED_CODES:
        permission = _PERMISSIONS.get(operation, "for it")
        return Verdict(reason=reason, advice=_DENIED.format(permission=permission))
    return Verdict(kind=StoreError, reason=reason, advice=_ADVICE.get(code, ""))


def _answer(error: BaseException | None) -> boto.ClientError | None:
    while error is not None and not isinstance(error, boto.ClientError):
        error = error.__cause__
    return error


def _status(error: BaseException) -> int:
    """Return the HTTP status of *error*; 0 if it is no answer."""
    answer = _answer(error)
    return 0 if answer is None else int(answer.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield *error* and its causes, the system's error last."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        inner = getattr(seen, "os_error", None) or getattr(seen, "certificate_error", None)
        if isinstance(inner, BaseException):
            yield inner
        seen = seen.__cause__ or seen.__context__
