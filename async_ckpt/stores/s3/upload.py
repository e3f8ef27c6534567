"""One checkpoint on its way to S3: a single PutObject if it fits one part, else a multipart upload.

Guarantees, beyond those of every upload:

* The object appears by one request, the last, which S3 carries out whole or not at all (D2).
* The checksum of a part is computed once: bytes that change between two attempts are refused, not stored.
* A commit that failed in a way which leaves its outcome open is looked up before either is claimed (E3).
* ``abort`` asks until S3 says that the upload does not exist, as a part on its way may come after an abort.

What does not belong here: the requests themselves (`target`), and what other processes left (`sweep`).
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
    """A checkpoint on its way; made by ``S3Store.begin``.

    Args:
        location: where it goes; for messages.
        nbytes: length of the file.
        target: makes the requests.
        part_size: bytes of every part but the last.
        least_part_bytes: the fewest that S3 takes for such a part.
        max_parts: how many parts it takes.
        requests: repeats what failed.
        pace: how many parts at a time, over all uploads of the store.
        workers: where checksums are computed.
        opened: told the id of the multipart upload as soon as there is one.
        ended: told the id once S3 knows it no more.
        left: told the id if S3 could not be made to forget it.
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
        """Create the multipart upload, if it takes one. Whoever calls this must abort if it raises."""
        if self._nbytes > self.part_size:
            await self._requests.again(self._create)

    async def put(self, part: Part, content: Content) -> Receipt:
        """Send one part; where it is the only one, it goes with the commit."""
        self._check_open("write")
        pieces, checksum = await self._workers.run(self._read, part, content)
        if self._upload_id is None:
            self._single, tag = (pieces, checksum), ""
        else:
            async with self._pace.turn():
                tag = await self._send(part.index, pieces, checksum)
        self._put[part.index] = part.nbytes
        return Receipt(index=part.index, token=tag)

    async def copy(self, part: Part, content: Content, stored: object, start: int) -> Receipt:
        """Have S3 take a part from another object; a server that does not tell the right checksum is not believed."""
        self._check_open("write")
        if self._upload_id is None or not isinstance(stored, S3Object):
            raise self._error("write", "there is nothing to copy to or from")
        checksum = await self._workers.run(self._sum_up, part, content)
        async with self._pace.turn():
            stop = start + part.nbytes
            tag, found = await self._target.copy(self._upload_id, part.index, stored, start, stop)
        if found != checksum or not tag:
            raise self._error("write", "what was copied is not known to be the same bytes")
        self._put[part.index] = part.nbytes
        return Receipt(index=part.index, token=tag)

    async def commit(self, receipts: Sequence[Receipt]) -> None:
        """Make the object appear."""
        self._check_open("commit")
        if sum(self._put.values()) != self._nbytes or {each.index for each in receipts} != set(self._put):
            raise self._error("commit", "not every byte was put")
        try:
            await self._requests.again(self._commit, receipts)
        except StoreError as error:
            # After this nothing can make it appear any more, hence what is there then tells the outcome.
            await self.abort()
            if not self._in_doubt:
                raise
            if not await self._requests.last_look(self._location, error, self._target.is_there):
                raise
        await self._end()

    async def abort(self) -> None:
        """Have S3 forget the multipart upload."""
        self._over, self._single = True, None
        if self._upload_id is None:
            return
        if await self._forget(self._upload_id):
            self._upload_id = None

    async def _send(self, index: int, pieces: Sequence[memoryview], checksum: str) -> str:
        """Send a part; where the server will have none that carries a checksum, begin anew with parts that do not."""
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
                        # Where it has taken one with a checksum, it is something else that it refuses.
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
        """Put another upload in the place of the one that nothing has been put to, announced without a checksum."""
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
        """Have S3 forget a multipart upload; or leave it to a later save, and tell so."""
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
        told = "cleaning up after a save to %s, S3 keeps parts until a later one: %s"
        _log.warning(told, self._location.url, why)
        return False

    async def _create(self) -> None:
        # Once this is sent its answer must be had, for it tells the id: hence no cancellation.
        with anyio.CancelScope(shield=True):
            self._upload_id = await self._target.create()
            await self._note_opened(self._upload_id)

    async def _commit(self, receipts: Sequence[Receipt]) -> None:
        """Make the last request; where its outcome is in doubt, look whether it was carried out (E3)."""
        try:
            if self._upload_id is None:
                assert self._single is not None
                async with self._pace.turn():
                    await self._target.put(*self._single)
            else:
                parts = [(each.index, each.token, self._checksums[each.index]) for each in receipts]
                tag = await self._target.complete(self._upload_id, parts)
                self.stored = self._target.named(tag)
        except StoreError as error:
            if isinstance(error, TransientStoreError) or error_code(error) == "NoSuchUpload":
                self._in_doubt = True
            # aiohttp sends a PUT twice where a kept connection has broken, so the first may be what is there.
            if not (self._in_doubt or isinstance(error, CheckpointExistsError)):
                raise
            with suppress(StoreError):  # who may write need not be allowed to look
                if await self._target.is_there():
                    return
            raise

    async def _abort(self, upload_id: str) -> None:
        """Abort, and look, until S3 does not know the upload."""
        for _ in range(_ABORTS):
            try:
                await self._requests.again(self._target.abort, upload_id)
            except StoreError as error:
                if error_code(error) == "NoSuchUpload":
                    return
                raise
            if not await self._requests.again(self._target.knows, upload_id):
                return
        raise self._error("abort", "S3 still knows the upload")

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
