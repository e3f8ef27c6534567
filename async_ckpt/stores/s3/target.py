"""The requests of which an upload to one key consists, each made once: with checksum, condition and token.

Guarantees: every body travels with its CRC-32, unless the server has said that it knows none; the object carries
a token by which it is told from any other of that name; settings of the user's for a request are kept.

What does not belong here: repeating, and what an answer that never came means (`upload`).
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from async_ckpt.errors import StoreError
from async_ckpt.stores.base import Location
from async_ckpt.stores.payload import PartPayload
from async_ckpt.stores.requests import Requests, patience
from async_ckpt.stores.s3.connection import Connection
from async_ckpt.stores.s3.errors import refuses_checksum

__all__ = ["TOKEN", "S3Object", "Target"]

P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger("async_ckpt.stores.s3")

TOKEN = "async-ckpt-upload"
_CHECKSUM = "CRC32"
_COMPLETE_SECONDS = 600.0  # putting many parts together takes S3 minutes; it sends spaces meanwhile


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Object:
    """An object as it was when it had this tag."""

    bucket: str
    key: str
    tag: str


class Target:
    """Where an upload goes.

    Args:
        location: for messages.
        bucket: its bucket.
        key: its key.
        overwrite: whether what is there may be replaced.
        connection: makes the requests.
        requests: times and translates them.
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
    ) -> None:
        self._location = location
        self._name = {"Bucket": bucket, "Key": key}
        self._condition = {} if overwrite else {"IfNoneMatch": "*"}
        self._connection = connection
        self._requests = requests
        self._token = secrets.token_hex(16)
        self._checked = True

    async def create(self) -> str:
        """Create a multipart upload; return its id."""
        return await self._with_or_without_checksum(self._create)

    async def send(self, upload_id: str, index: int, pieces: Sequence[memoryview], checksum: str) -> str:
        """Send a part; return its tag."""
        with (
            self._requests.translating("write", self._location),
            patience(self._requests.stall_seconds) as moved,
        ):
            answer = await self._connection.call(
                "upload_part",
                **self._name,
                **self._checksum(checksum),
                UploadId=upload_id,
                PartNumber=index + 1,
                Body=PartPayload(pieces, moved=moved),
            )
        return str(answer["ETag"])

    async def copy(
        self, upload_id: str, index: int, source: S3Object, start: int, stop: int
    ) -> tuple[str, str]:
        """Have S3 take the bytes *start* to *stop* of another object for a part; return its tag and checksum."""
        with self._requests.translating("write", self._location), patience(_COMPLETE_SECONDS):
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
        """Return the object itself, as it is with *tag*."""
        return S3Object(bucket=self._name["Bucket"], key=self._name["Key"], tag=tag)

    async def complete(self, upload_id: str, parts: Sequence[tuple[int, str, str]]) -> str:
        """Make an object of *parts*: index, tag and checksum of each; return its tag."""
        named: list[dict[str, Any]] = [{"PartNumber": index + 1, "ETag": tag} for index, tag, _ in parts]
        if self._checked:
            for each, (_, _, checksum) in zip(named, parts, strict=True):
                each[f"Checksum{_CHECKSUM}"] = checksum
        with self._requests.translating("commit", self._location), patience(_COMPLETE_SECONDS):
            answer = await self._connection.call(
                "complete_multipart_upload",
                **self._name,
                **self._condition,
                UploadId=upload_id,
                MultipartUpload={"Parts": named},
            )
        return str(answer["ETag"])

    async def put(self, pieces: Sequence[memoryview], checksum: str) -> None:
        """Make an object of *pieces*."""
        await self._with_or_without_checksum(self._put, pieces, checksum)

    async def abort(self, upload_id: str) -> None:
        """Abort the multipart upload; NoSuchUpload is an error here."""
        await self._ask("abort", "abort_multipart_upload", UploadId=upload_id)

    async def find(self, upload_id: str) -> None:
        """Raise NoSuchUpload once the multipart upload is no more."""
        await self._ask("abort", "list_parts", UploadId=upload_id, MaxParts=1)

    async def is_there(self) -> bool:
        """Tell whether the object that is there is this upload's."""
        try:
            answer = await self._ask("read", "head_object")
        except FileNotFoundError:
            return False
        return bool(answer.get("Metadata", {}).get(TOKEN) == self._token)

    async def _create(self) -> str:
        metadata = await self._metadata()
        algorithm = {"ChecksumAlgorithm": _CHECKSUM} if self._checked else {}
        answer = await self._ask("begin", "create_multipart_upload", **algorithm, Metadata=metadata)
        return str(answer["UploadId"])

    async def _put(self, pieces: Sequence[memoryview], checksum: str) -> None:
        metadata = await self._metadata()
        with (
            self._requests.translating("commit", self._location),
            patience(self._requests.stall_seconds) as moved,
        ):
            await self._connection.call(
                "put_object",
                **self._name,
                **self._condition,
                **self._checksum(checksum),
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

    def _checksum(self, value: str) -> dict[str, str]:
        if not self._checked:
            return {}
        return {"ChecksumAlgorithm": _CHECKSUM, f"Checksum{_CHECKSUM}": value}

    async def _with_or_without_checksum(
        self, request: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Make *request*; again, and none with a checksum from now on, if the server says that it knows none."""
        try:
            return await request(*args, **kwargs)
        except StoreError as error:
            if not (self._checked and refuses_checksum(error)):
                raise
            _log.warning("%s: the server knows no CRC-32, so none is sent", self._location.url)
            self._checked = False
        return await request(*args, **kwargs)
