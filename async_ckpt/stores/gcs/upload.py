"""The upload of one file to Google Cloud Storage: a resumable upload.

Guarantees, beyond those of every store:

* ``commit`` sends the last bytes, at most 256 KiB: before it, the server cannot complete the upload (D2).
* The last request carries the file's CRC-32C, which the server verifies; the checksum that it reports is compared as
  well.
* If the answer to the last request is lost, the session, or the object itself with this upload's token, is queried: a
  failure is reported only if the object is not there (E3).
* Bytes that the server lost are sent again, without a time limit as long as there is progress, up to three times the
  file.

What does not belong here: the session and its state on the server (`session`).
"""

from __future__ import annotations

import errno
import logging
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import anyio

from async_ckpt.errors import StoreError, TransientStoreError
from async_ckpt.stores.base import Content, Location, Part, Receipt, Workers
from async_ckpt.stores.checksums import as_text, crc32c
from async_ckpt.stores.gcs.client import CONTINUE, Client, Target
from async_ckpt.stores.gcs.errors import Refusal, refused_with
from async_ckpt.stores.gcs.session import CHUNK_MULTIPLE, ResumableSession
from async_ckpt.stores.requests import Pace, Requests

__all__ = ["TOKEN_KEY", "ResumableUpload"]

_log = logging.getLogger("async_ckpt.stores.gcs")

#: The custom metadata that identifies the upload an object came from.
TOKEN_KEY = "async_ckpt-upload"

_MAX_SENDINGS = 3  # of the whole file; after that, what gets on says no longer that it will arrive
_OTHER_BYTES = re.compile("crc32c|hash|checksum", re.IGNORECASE)


class ResumableUpload:
    """One resumable upload; made by ``GCSStore.begin``.

    Args:
        location: for messages.
        target: the object.
        nbytes: length of the file.
        part_size: the size of a part.
        overwrite: whether an existing object may be replaced.
        client: makes the requests.
        requests: times and repeats requests.
        pace: limits the requests that carry data.
        workers: run blocking calls.
    """

    is_paced = False
    max_concurrent_parts = 1  # the server takes a session's bytes in order
    swept: tuple[str, ...] = ()

    def __init__(
        self,
        location: Location,
        target: Target,
        nbytes: int,
        *,
        part_size: int,
        overwrite: bool,
        client: Client,
        requests: Requests,
        pace: Pace,
        workers: Workers,
    ) -> None:
        assert part_size % CHUNK_MULTIPLE == 0, part_size
        self.part_size = part_size
        self._location = location
        self._target = target
        self._nbytes = nbytes
        self._client = client
        self._requests = requests
        self._workers = workers
        self._token = secrets.token_hex(16)
        self._session = ResumableSession(
            location,
            target,
            nbytes,
            metadata={TOKEN_KEY: self._token},
            overwrite=overwrite,
            client=client,
            requests=requests,
            pace=pace,
        )
        self._content: Content | None = None
        self._put = 0  # bytes of the parts that are through
        self._checksum = 0  # CRC-32C of the first so many bytes:
        self._summed = 0
        self._in_doubt = False  # the last bytes were sent without an answer, so the object may be there
        self._ended = False

    async def start(self) -> None:
        """Begin a session. The caller must abort if this raises."""
        await self._requests.again(self._session.open, "begin")

    def progress(self) -> int:
        """Return a number that grows with the bytes that the server takes; see ``Continuing``."""
        return min(self._session.taken, _MAX_SENDINGS * self._nbytes)

    async def put(self, part: Part, content: Content) -> Receipt:
        """Send one part; of the last one, only the bytes that need not wait for the commit."""
        self._check(not self._ended, "write", "the upload has ended")
        self._check(part.start == self._put, "write", "parts must be put once, and in order")
        is_last = part.stop == self._nbytes
        self._check(is_last or part.stop % CHUNK_MULTIPLE == 0, "write", "a part is no multiple of 256 KiB")
        self._content = content
        await self._send_until(self._withheld_from() if is_last else part.stop, "write")
        self._put = part.stop
        return Receipt(index=part.index)

    async def commit(self, receipts: Sequence[Receipt]) -> None:
        """Send the last bytes, which completes the object."""
        self._check(not self._ended, "commit", "the upload has ended")
        complete = self._content is not None and self._put == self._nbytes
        self._check(complete, "commit", "not every byte was put")
        try:
            await self._requests.advance(self.progress, self._finish)
        except StoreError as error:
            if not self._in_doubt:
                raise
            stored = await self._requests.look_up_outcome(self._location, error, self._stored_object)
            if stored is None:
                raise
            await self._verify(stored)
        self._ended = True

    async def abort(self) -> None:
        """Cancel the session."""
        ended, self._ended = self._ended, True
        if ended:
            return
        with anyio.CancelScope(shield=True):
            try:
                await self._session.cancel()
            except Exception as error:
                _log.warning("%s; the upload stays invisible, and Google drops it in a week", error)

    # -- sending

    async def _send_until(self, goal: int, stage: str) -> None:
        """Make one attempt, of any number of requests, to get the first *goal* bytes to the server."""
        if (early := await self._session.ask(stage)) is not None:
            await self._verify(early.json())  # it raises, as bytes are missing
        await self._session.open(stage)
        while self._session.held < goal:
            start = self._session.held
            stop = min(goal, start + self.part_size)
            if start < self._summed:  # sent again: no further than that, for each byte is summed once
                stop = min(stop, self._summed)
            pieces = await self._workers.run(self._read, start, stop)
            self._session.note(await self._session.send(pieces, start, stop, stage, {}), stage)
            if self._session.held <= start:
                raise self._passing(stage, "the server took nothing of what it was sent")

    def _read(self, start: int, stop: int) -> Sequence[memoryview]:
        """Return bytes, and add new ones to the checksum; blocks."""
        assert self._content is not None
        pieces = self._content.read(start, stop)
        if stop > self._summed:
            self._checksum = crc32c(pieces, self._checksum)
            self._summed = stop
        return pieces

    def _withheld_from(self) -> int:
        """Return the offset of the bytes that only the commit sends."""
        return max(0, self._nbytes - 1) // CHUNK_MULTIPLE * CHUNK_MULTIPLE

    # -- the end

    async def _finish(self) -> None:
        """Make one attempt to complete the object, after checking whether an earlier one succeeded."""
        if self._in_doubt:
            answer = await self._session.ask("commit")
            if answer is not None:
                return await self._verify(answer.json())
            if not self._session.is_open and (stored := await self._stored_object()) is not None:
                return await self._verify(stored)
        await self._send_until(self._withheld_from(), "commit")
        start, stop = self._session.held, self._nbytes
        pieces = await self._workers.run(self._read, start, stop)
        try:
            headers = {"X-Goog-Hash": f"crc32c={as_text(self._checksum)}"}
            answer = await self._session.send(pieces, start, stop, "commit", headers)
        except TransientStoreError:
            self._in_doubt = True
            raise
        except StoreError as error:
            if refused_with(error, {400}) and _OTHER_BYTES.search(str(error.__cause__)):
                raise self._session.broken("commit", "other bytes arrived than were sent") from error
            raise
        if answer.status == CONTINUE:
            self._session.note(answer, "commit")
            raise self._passing("commit", "the server did not take the last bytes")
        return await self._verify(answer.json())

    async def _verify(self, stored: Mapping[str, Any]) -> None:
        """Compare the stored object's checksum; delete the object if it differs."""
        checksum = as_text(self._checksum)
        if stored["size"] == str(self._nbytes) and stored.get("crc32c", checksum) == checksum:
            return
        _log.warning("%s: other bytes were stored than were sent; deleting them", self._location.url)
        await self._requests.step("commit", self._location, self._delete_generation, stored["generation"])
        self._session.forget()
        raise self._passing("commit", "other bytes were stored than were sent")

    async def _stored_object(self) -> dict[str, Any] | None:
        """Return the object's description if it came from this upload, in one attempt."""
        try:
            stored = await self._requests.once(
                "commit", self._location, self._client.describe, self._target.path
            )
        except StoreError as error:
            if refused_with(error, {404}):
                return None
            raise
        return stored if (stored.get("metadata") or {}).get(TOKEN_KEY) == self._token else None

    async def _delete_generation(self, generation: str) -> None:
        try:
            await self._client.call("DELETE", self._target.path, params={"ifGenerationMatch": generation})
        except Refusal as error:
            if error.status not in (404, 412):  # deleted or replaced meanwhile
                raise

    # -- errors

    def _passing(self, stage: str, reason: str) -> StoreError:
        return TransientStoreError.during(stage, self._location.url, OSError(reason))

    def _check(self, holds: bool, stage: str, reason: str) -> None:
        if not holds:
            raise StoreError.during(stage, self._location.url, OSError(errno.EINVAL, reason))
