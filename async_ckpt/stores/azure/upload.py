"""The upload of one block blob: blocks in any order, then the list of blocks.

Guarantees:

* The block ids are unique to this upload, so that two writers of one name never mix their blocks.
* If the answer to the commit is lost, the blob is checked for this upload's token: a failure is reported only if it is
  not there, and success only if it is (E3).
* A commit drops the blocks that other writers have uploaded for the name. Dropped blocks are uploaded again.

What does not belong here: whether the name may be written (`store`).
"""

from __future__ import annotations

import errno
import secrets
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from azure.core import MatchConditions
from azure.core.exceptions import ResourceNotFoundError
from azure.storage.blob import BlobBlock

from async_ckpt.errors import CheckpointExistsError, StoreError, TransientStoreError
from async_ckpt.stores.azure.errors import code_of
from async_ckpt.stores.base import Content, Location, Part, Receipt, Workers
from async_ckpt.stores.payload import PartPayload
from async_ckpt.stores.requests import Pace, Requests, stall_timeout

__all__ = ["AzureUpload"]

_TOKEN = "async_ckpt"  # the name of the token in the blob's metadata
_MAX_STAGINGS = 3


class AzureUpload:
    """The upload of one blob; made by ``AzureStore.begin``. See ``stores.base.Upload``."""

    max_concurrent_parts = None
    is_paced = True
    swept = ()

    def __init__(
        self,
        blob: Any,
        location: Location,
        nbytes: int,
        *,
        part_size: int,
        overwrite: bool,
        requests: Requests,
        pace: Pace,
        workers: Workers,
    ) -> None:
        self.part_size = part_size
        self._blob = blob
        self._location = location
        self._nbytes = nbytes
        self._overwrite = overwrite
        self._requests = requests
        self._pace = pace
        self._workers = workers
        self._token = secrets.token_hex(16)
        self._staged: dict[int, tuple[Part, Content]] = {}
        self._in_doubt = False  # a commit failed in a way that leaves open what became of it
        self._ended = False

    async def put(self, part: Part, content: Content) -> Receipt:
        """Upload one block, in one attempt."""
        self._refuse_if_ended("write")
        if part.nbytes:  # Azure has no empty blocks; an empty blob is an empty list
            pieces = await self._workers.run(content.read, part.start, part.stop)
            async with self._pace.turn():
                with (
                    self._requests.translating("write", self._location),
                    stall_timeout(self._requests.stall_seconds) as moved,
                ):
                    body = PartPayload(pieces, moved=moved)
                    await self._blob.stage_block(self._block_id(part.index), body, length=part.nbytes)
            self._staged[part.index] = (part, content)
        return Receipt(index=part.index)

    async def commit(self, receipts: Sequence[Receipt]) -> None:
        """Commit the list of blocks."""
        self._refuse_if_ended("commit")
        indices = sorted({receipt.index for receipt in receipts} & self._staged.keys())
        if sum(self._staged[index][0].nbytes for index in indices) != self._nbytes:
            raise self._error("commit", OSError(errno.EINVAL, "not every byte was put"))
        for staging in range(1, _MAX_STAGINGS + 1):
            try:
                await self._settle(indices)
                break
            except StoreError as error:
                if code_of(error) != "InvalidBlockList" or staging == _MAX_STAGINGS:
                    raise
            for index in indices:
                await self._requests.again(self.put, *self._staged[index])
        self._end()

    async def abort(self) -> None:
        """Let the blocks expire: Azure cannot drop them without deleting a committed blob."""
        self._end()

    async def _settle(self, indices: Sequence[int]) -> None:
        """Commit; if the outcome of a failed attempt is unknown, look it up (E3)."""
        try:
            await self._requests.again(self._try_to_commit, indices)
        except StoreError as error:
            # aiohttp repeats a PUT if a kept connection has broken, so the first one may have succeeded.
            if not (self._in_doubt or isinstance(error, CheckpointExistsError)):
                raise
            if not await self._requests.look_up_outcome(self._location, error, self._is_there):
                raise

    async def _try_to_commit(self, indices: Sequence[int]) -> None:
        """Make one attempt to commit, after checking whether an earlier one succeeded."""
        if self._in_doubt:
            with suppress(StoreError):  # a user who may write need not be allowed to read
                if await self._is_there():
                    return
        try:
            await self._requests.once("commit", self._location, self._commit, indices)
        except TransientStoreError:
            self._in_doubt = True
            raise

    async def _commit(self, indices: Sequence[int]) -> None:
        blocks = [BlobBlock(self._block_id(index)) for index in indices]
        condition = {} if self._overwrite else {"match_condition": MatchConditions.IfMissing}
        metadata = {_TOKEN: self._token, "is_directory": "false"}  # the latter is what adlfs writes
        await self._blob.commit_block_list(blocks, metadata=metadata, **condition)

    async def _is_there(self) -> bool:
        """Return whether the blob is the one that this upload committed, in one attempt."""

        async def look() -> bool:
            try:
                found = await self._blob.get_blob_properties()
            except ResourceNotFoundError:
                return False
            return bool((found.metadata or {}).get(_TOKEN) == self._token)

        return await self._requests.once("commit", self._location, look)

    def _block_id(self, index: int) -> str:
        return f"{self._token}{index:05d}"  # ids of one blob must have one length

    def _end(self) -> None:
        self._ended = True
        self._staged.clear()  # with it, the snapshot

    def _refuse_if_ended(self, stage: str) -> None:
        if self._ended:
            raise self._error(stage, OSError(errno.EINVAL, "the upload has ended"))

    def _error(self, stage: str, cause: OSError) -> StoreError:
        return StoreError.during(stage, self._location.url, cause)
