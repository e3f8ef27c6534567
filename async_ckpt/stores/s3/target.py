"""The single requests of an upload to one key, with checksum, condition and token.

Guarantees: every body is sent with its CRC-32, unless the server or the user refuses checksums; then it is compared
here once more, so that bytes that changed since are not stored. The object carries a token that identifies the upload;
the user's settings for requests are kept.

What does not belong here: retries, and missing answers (`upload`).
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from async_ckpt.errors import StoreError, TransientStoreError
from async_ckpt.stores.base import Location, Workers
from async_ckpt.stores.checksums import as_text, crc32
from async_ckpt.stores.optional_features import CHECKSUMS, LISTINGS, OptionalFeatures
from async_ckpt.stores.payload import PartPayload
from async_ckpt.stores.requests import Requests, stall_timeout
from async_ckpt.stores.s3.connection import Connection
from async_ckpt.stores.s3.errors import error_code, is_refusal, refuses_expect, refuses_header

__all__ = ["TOKEN", "S3Object", "Target"]

T = TypeVar("T")

TOKEN = "async-ckpt-upload"
_CHECKSUM = "CRC32"
_COMPLETE_SECONDS = 600.0  # putting many parts together takes S3 minutes; it sends spaces meanwhile


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Object:
    """An object with a certain ETag."""

    bucket: str
    key: str
    tag: str


class Target:
    """The target of an upload.

    Args:
        location: for messages.
        bucket: its bucket.
        key: its key.
        overwrite: whether an existing object may be replaced.
        connection: makes the requests.
        requests: times requests, and translates their errors.
        features: the optional features of the server.
        workers: compare checksums.
    """

    def __init__(
        self,
        location: Location,
        bucket: str,
        key: str,
        *,
        overwrite: bool,
        connection: Connection,
        requests: Requests,
        features: OptionalFeatures,
        workers: Workers,
    ) -> None:
        self._location = location
        self._bucket = bucket
        self._name = {"Bucket": bucket, "Key": key}
        self._condition = {} if overwrite else {"IfNoneMatch": "*"}
        self._connection = connection
        self._requests = requests
        self._features = features
        self._workers = workers
        self._token = secrets.token_hex(16)
        self._checks = features.asks(bucket, CHECKSUMS)

    async def create(self) -> str:
        """Create a multipart upload; return its id."""
        return await self._with_or_without(self._create)

    async def send(self, upload_id: str, index: int, pieces: Sequence[memoryview], checksum: str) -> str:
        """Send a part; return its tag."""
        return await self._unexpected(partial(self._send, upload_id, index, pieces, checksum))

    async def _send(self, upload_id: str, index: int, pieces: Sequence[memoryview], checksum: str) -> str:
        with (
            self._requests.translating("write", self._location),
            stall_timeout(self._requests.stall_seconds) as moved,
        ):
            answer = await self._connection.call(
                "upload_part",
                **self._name,
                **self._headers(checksum),
                UploadId=upload_id,
                PartNumber=index + 1,
                Body=PartPayload(pieces, moved=moved),
            )
        return str(answer["ETag"])

    async def copy(
        self, upload_id: str, index: int, source: S3Object, start: int, stop: int
    ) -> tuple[str, str]:
        """Copy the bytes *start* to *stop* of another object to a part; return its tag and checksum."""
        with self._requests.translating("write", self._location), stall_timeout(_COMPLETE_SECONDS):
            answer = await self._connection.call(
                "upload_part_copy",
                **self._name,
                UploadId=upload_id,
                PartNumber=index + 1,
                CopySource={"Bucket": source.bucket, "Key": source.key},
                CopySourceIfMatch=source.tag,
                CopySourceRange=f"bytes={start}-{stop - 1}",
            )
        result = answer.get("CopyPartResult", {})
        return str(result.get("ETag", "")), str(result.get(f"Checksum{_CHECKSUM}", ""))

    def named(self, tag: str) -> S3Object:
        """Return the object with the given *tag*."""
        return S3Object(bucket=self._name["Bucket"], key=self._name["Key"], tag=tag)

    async def complete(self, upload_id: str, parts: Sequence[tuple[int, str, str]]) -> str:
        """Complete the multipart upload with *parts*: index, tag and checksum of each; return the object's tag."""
        return await self._with_or_without(partial(self._complete, upload_id, parts))

    async def _complete(self, upload_id: str, parts: Sequence[tuple[int, str, str]]) -> str:
        named: list[dict[str, Any]] = [{"PartNumber": index + 1, "ETag": tag} for index, tag, _ in parts]
        if self._checks:
            for each, (_, _, checksum) in zip(named, parts, strict=True):
                each[f"Checksum{_CHECKSUM}"] = checksum
        with self._requests.translating("commit", self._location), stall_timeout(_COMPLETE_SECONDS):
            answer = await self._connection.call(
                "complete_multipart_upload",
                **self._name,
                **self._condition,
                UploadId=upload_id,
                MultipartUpload={"Parts": named},
            )
        return str(answer["ETag"])

    async def put(self, pieces: Sequence[memoryview], checksum: str) -> None:
        """Put an object that consists of *pieces*."""
        await self._with_or_without(partial(self._put, pieces, checksum), pieces, checksum)

    async def abort(self, upload_id: str) -> None:
        """Abort the multipart upload; NoSuchUpload is an error here."""
        await self._ask("abort", "abort_multipart_upload", UploadId=upload_id)

    async def knows(self, upload_id: str) -> bool:
        """Return whether the multipart upload exists; False if listing its parts is not allowed."""
        if not self._features.asks(self._bucket, LISTINGS, "list_parts"):
            return False
        try:
            await self._ask("abort", "list_parts", UploadId=upload_id, MaxParts=1)
        except StoreError as error:
            if error_code(error) == "NoSuchUpload":
                return False
            if is_refusal(error) and self._features.decline(self._bucket, LISTINGS, error, "list_parts"):
                return False
            raise
        return True

    async def is_there(self) -> bool:
        """Return whether the present object is from this upload."""
        try:
            answer = await self._ask("read", "head_object")
        except FileNotFoundError:
            return False
        return bool(answer.get("Metadata", {}).get(TOKEN) == self._token)

    async def _create(self) -> str:
        metadata = await self._metadata()
        algorithm = {"ChecksumAlgorithm": _CHECKSUM} if self._checks else {}
        answer = await self._ask("begin", "create_multipart_upload", **algorithm, Metadata=metadata)
        return str(answer["UploadId"])

    async def _put(self, pieces: Sequence[memoryview], checksum: str) -> None:
        metadata = await self._metadata()
        with (
            self._requests.translating("commit", self._location),
            stall_timeout(self._requests.stall_seconds) as moved,
        ):
            await self._connection.call(
                "put_object",
                **self._name,
                **self._condition,
                **self._headers(checksum),
                Body=PartPayload(pieces, moved=moved),
                Metadata=metadata,
            )

    async def _ask(self, stage: str, operation: str, **arguments: Any) -> Any:
        return await self._requests.once(
            stage, self._location, self._connection.call, operation, **self._name, **arguments
        )

    async def _metadata(self) -> dict[str, str]:
        file_system = await self._connection.file_system()
        return {**(file_system.s3_additional_kwargs.get("Metadata") or {}), TOKEN: self._token}

    async def may_go_without(self, error: StoreError, pieces: Sequence[memoryview], checksum: str) -> bool:
        """Return whether *error* may concern the checksum, and the bytes still match it."""
        if not (self._checks and self._features.is_optional(CHECKSUMS) and refuses_header(error)):
            return False
        # The server may have compared them, and reported that in its own words.
        return not pieces or as_text(await self._workers.run(crc32, pieces)) == checksum

    def go_without(self) -> None:
        """Send no more checksums in this upload."""
        self._checks = False

    def decline(self, refusal: StoreError) -> None:
        """Send no more checksums to the bucket: the same request succeeded without one."""
        self._features.decline(self._bucket, CHECKSUMS, refusal)

    async def _with_or_without(
        self, request: Callable[[], Awaitable[T]], pieces: Sequence[memoryview] = (), checksum: str = ""
    ) -> T:
        """Make *request*; repeat it without a checksum if the server may have refused it."""
        try:
            return await self._unexpected(request)
        except StoreError as error:
            if not await self.may_go_without(error, pieces, checksum):
                raise
            refusal = error
        self.go_without()
        try:
            answer = await self._unexpected(request)
        except StoreError as error:
            self._checks = True  # nothing has come of it
            if isinstance(error, TransientStoreError):
                raise
            raise refusal  # noqa: B904  # it was not about the checksum, and has a cause of its own
        self.decline(refusal)
        return answer

    async def _unexpected(self, request: Callable[[], Awaitable[T]]) -> T:
        """Make *request*; repeat it without ``Expect: 100-continue`` if the server refuses that."""
        try:
            return await request()
        except StoreError as error:
            if not (self._connection.expects and refuses_expect(error)):
                raise
        self._connection.expects = False
        return await request()

    def _headers(self, checksum: str) -> dict[str, str]:
        return {"ChecksumAlgorithm": _CHECKSUM, f"Checksum{_CHECKSUM}": checksum} if self._checks else {}
