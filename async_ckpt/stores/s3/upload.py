"""The upload of one checkpoint to S3: a single PutObject if it fits one part, otherwise a multipart upload.

Guarantees, beyond those of every upload:

* The object appears with the last request, which S3 executes atomically (D2).
* The checksum of a part is computed once: bytes that change between two attempts are refused, not stored.
* If the outcome of a failed commit is unknown, it is looked up before success or failure is reported (E3).
* ``abort`` is repeated until S3 reports that the upload does not exist, as a part may arrive after an abort.

What does not belong here: the requests (`target`), and leftovers of other processes (`sweep`).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

import anyio

from async_ckpt.errors import CheckpointExistsError, StoreError, TransientStoreError
from async_ckpt.stores.base import Content, Location, Part, Receipt, Workers
from async_ckpt.stores.checksums import as_text
from async_ckpt.stores.requests import Pace, Requests
from async_ckpt.stores.s3.errors import error_code
from async_ckpt.stores.s3.target import S3Object, Target

__all__ = ["S3Upload"]

_log = logging.getLogger("async_ckpt.stores.s3")

_ABORT_SECONDS = 30.0
_ABORTS = 5

Note = Callable[[str], Awaitable[None]]


class S3Upload:
    """The upload of one checkpoint; made by ``S3Store.begin``.

    Args:
        location: the location, for messages.
        nbytes: length of the file.
        target: makes the requests.
        part_size: the size of every part but the last.
        least_part_bytes: S3's minimum for such a part.
        max_parts: S3's maximum number of parts.
        requests: repeats failed requests.
        pace: limits concurrent parts, over all uploads of the store.
        apart_seconds: the least time between two requests that write.
        workers: compute checksums.
        opened: called with the id of the multipart upload as soon as there is one.
        ended: called with the id once the upload does not exist any more.
        left: called with the id if the upload could not be aborted.
    """

    max_concurrent_parts = None
    is_paced = True

    def __init__(
        self,
        location: Location,
        nbytes: int,
        target: Target,
        *,
        part_size: int,
        least_part_bytes: int,
        max_parts: int,
        requests: Requests,
        pace: Pace,
        apart_seconds: float,
        workers: Workers,
        opened: Note,
        ended: Note,
        left: Callable[[str], object],
    ) -> None:
        self.part_size = part_size
        self.least_part_bytes = least_part_bytes
        self.max_parts = max_parts
        self.stored: S3Object | None = None
        self.swept: tuple[str, ...] = ()
        self._location = location
        self._nbytes = nbytes
        self._target = target
        self._requests = requests
        self._pace = pace
        self._apart_seconds = apart_seconds
        self._workers = workers
        self._note_opened = opened
        self._note_ended = ended
        self._note_left = left
        self._upload_id: str | None = None
        self._single: tuple[Sequence[memoryview], str] | None = None
        self._checksums: dict[int, str] = {}
        self._put: dict[int, int] = {}  # bytes by part
        self._in_doubt = False  # a commit may have been carried out though it failed
        self._over = False
        self._renewing = anyio.Lock()

    async def start(self) -> None:
        """Create the multipart upload if there are several parts. The caller must abort if this raises."""
        if self._nbytes > self.part_size:
            await self._requests.again(self._create)

    async def put(self, part: Part, content: Content) -> Receipt:
        """Send one part; a single part is sent with the commit."""
        self._check_open("write")
        pieces, checksum = await self._workers.run(self._read, part, content)
        if self._upload_id is None:
            self._single, tag = (pieces, checksum), ""
        else:
            async with self._pace.turn(apart_seconds=self._apart_seconds):
                tag = await self._send(part.index, pieces, checksum)
        self._put[part.index] = part.nbytes
        return Receipt(index=part.index, token=tag)

    async def copy(self, part: Part, content: Content, stored: object, start: int) -> Receipt:
        """Copy a part from another object; fail unless the server reports the right checksum."""
        self._check_open("write")
        if self._upload_id is None or not isinstance(stored, S3Object):
            raise self._error("write", "there is nothing to copy to or from")
        checksum = await self._workers.run(self._sum_up, part, content)
        async with self._pace.turn(apart_seconds=self._apart_seconds):
            stop = start + part.nbytes
            tag, found = await self._target.copy(self._upload_id, part.index, stored, start, stop)
        if found != checksum or not tag:
            raise self._error("write", "the copied bytes could not be verified")
        self._put[part.index] = part.nbytes
        return Receipt(index=part.index, token=tag)

    async def commit(self, receipts: Sequence[Receipt]) -> None:
        """Complete the object."""
        self._check_open("commit")
        if sum(self._put.values()) != self._nbytes or {each.index for each in receipts} != set(self._put):
            raise self._error("commit", "not every byte was put")
        try:
            await self._requests.again(self._commit, receipts)
        except StoreError as error:
            # After this nothing can complete it any more, so the present object shows the outcome.
            await self.abort()
            if not self._in_doubt:
                raise
            if not await self._requests.look_up_outcome(self._location, error, self._target.is_there):
                raise
        await self._end()

    async def abort(self) -> None:
        """Abort the multipart upload."""
        self._over, self._single = True, None
        if self._upload_id is None:
            return
        if await self._forget(self._upload_id):
            self._upload_id = None

    async def _send(self, index: int, pieces: Sequence[memoryview], checksum: str) -> str:
        """Send a part; if the server refuses checksums, begin a new upload without them."""
        refusal: StoreError | None = None
        while True:
            upload_id = self._upload_id
            if upload_id is None:
                raise self._error("write", "the upload has ended")
            try:
                tag = await self._target.send(upload_id, index, pieces, checksum)
            except StoreError as error:
                async with self._renewing:
                    if upload_id == self._upload_id:
                        # If it has accepted a part with a checksum, it refuses something else.
                        if self._put or not await self._target.may_go_without(error, pieces, checksum):
                            raise
                        refusal = error
                        await self._renew()
                continue  # it went to the upload that is no more
            if upload_id == self._upload_id:
                if refusal is not None:
                    self._target.decline(refusal)
                return tag

    async def _renew(self) -> None:
        """Replace the upload, to which no part was put yet, by one without checksums."""
        before = self._upload_id
        assert before is not None
        self._target.go_without()
        with anyio.CancelScope(shield=True):
            try:
                await self._requests.again(self._create)
            finally:
                if self._upload_id != before:
                    await self._forget(before)

    async def _forget(self, upload_id: str) -> bool:
        """Abort a multipart upload; on failure, log it and leave it to a later save."""
        why: object = "it took too long"
        with anyio.CancelScope(shield=True), anyio.move_on_after(_ABORT_SECONDS):
            try:
                await self._abort(upload_id)
                await self._note_ended(upload_id)
            except Exception as error:
                why = error
            else:
                return True
        self._note_left(upload_id)
        told = "the upload of %s could not be aborted, and S3 keeps its parts until a later save: %s"
        _log.warning(told, self._location.url, why)
        return False

    async def _create(self) -> None:
        await self._pace.due(self._apart_seconds)
        # Not cancellable once it is sent, as its answer contains the id.
        with anyio.CancelScope(shield=True):
            self._upload_id = await self._target.create()
            await self._note_opened(self._upload_id)

    async def _commit(self, receipts: Sequence[Receipt]) -> None:
        """Make the last request; if its outcome is unknown, look it up (E3)."""
        try:
            if self._upload_id is None:
                assert self._single is not None
                async with self._pace.turn(apart_seconds=self._apart_seconds):
                    await self._target.put(*self._single)
            else:
                parts = [(each.index, each.token, self._checksums[each.index]) for each in receipts]
                await self._pace.due(self._apart_seconds)
                tag = await self._target.complete(self._upload_id, parts)
                self.stored = self._target.named(tag)
        except StoreError as error:
            if isinstance(error, TransientStoreError) or error_code(error) == "NoSuchUpload":
                self._in_doubt = True
            # aiohttp repeats a PUT if a kept connection has broken, so the first one may have succeeded.
            if not (self._in_doubt or isinstance(error, CheckpointExistsError)):
                raise
            with suppress(StoreError):  # a user who may write need not be allowed to read
                if await self._target.is_there():
                    return
            raise

    async def _abort(self, upload_id: str) -> None:
        """Abort, and check, until the upload does not exist."""
        for _ in range(_ABORTS):
            try:
                await self._requests.again(self._target.abort, upload_id)
            except StoreError as error:
                if error_code(error) == "NoSuchUpload":
                    return
                raise
            if not await self._requests.again(self._target.knows, upload_id):
                return
        raise self._error("abort", "the upload still exists")

    async def _end(self) -> None:
        upload_id, self._upload_id = self._upload_id, None
        self._over, self._single = True, None
        if upload_id is not None:
            with anyio.CancelScope(shield=True):
                await self._note_ended(upload_id)

    def _read(self, part: Part, content: Content) -> tuple[Sequence[memoryview], str]:
        checksum = self._sum_up(part, content)
        return content.read(part.start, part.stop), checksum

    def _sum_up(self, part: Part, content: Content) -> str:
        if part.index not in self._checksums:
            self._checksums[part.index] = as_text(content.crc32(part.start, part.stop))
        return self._checksums[part.index]

    def _check_open(self, stage: str) -> None:
        if self._over:
            raise self._error(stage, "the upload has ended")

    def _error(self, stage: str, reason: str) -> StoreError:
        return StoreError.during(stage, self._location.url, OSError(reason))
