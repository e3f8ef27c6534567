"""Writes one sharded save on one rank: carries out the actions of the agreement with the stores.

Guarantees: the name of a rank's object is unique to the save, so an earlier checkpoint at the location stays whole
until one rank replaces its ``.metadata``, the last file that is written (D5). The objects of a failed save are deleted;
those of a replaced checkpoint are deleted after the new one is durable. A file beside ``.metadata`` always belongs to
the same checkpoint as ``.metadata`` does (D6).

What does not belong here: when an action is due (`agreement`), the queue.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import anyio

from async_ckpt.engine.writers import Emit, StreamingWriter
from async_ckpt.errors import StoreError
from async_ckpt.events import Event
from async_ckpt.sharded.agreement.protocol import COORDINATOR
from async_ckpt.sharded.manifest import read_manifest, save_id_of, write_manifest
from async_ckpt.sharded.writing.archive import template
from async_ckpt.sharded.writing.flatten import Flattened, flatten
from async_ckpt.sharded.writing.generations import delete_replaced, find_replaced, read_extra
from async_ckpt.sharded.writing.plan import object_name
from async_ckpt.sharded.writing.plans import Plans, Structure
from async_ckpt.sharded.writing.shard import Item, Shard, TensorItem
from async_ckpt.snapshot import Capture, Snapshot
from async_ckpt.snapshot.regions import Region, capture_regions
from async_ckpt.stores import is_local
from async_ckpt.stores.base import MARKER, Location, Store, Workers, exists_already
from async_ckpt.system.garbage import collector_held_back

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

    from async_ckpt.sharded.agreement.rendezvous import Ready, Rendezvous

__all__ = ["ShardedWriter"]

logger = logging.getLogger(__name__)


class ShardedWriter:
    """Writes one save; satisfies ``engine.writers.Writer``.

    Args:
        streaming: writes objects.
        store: serves the location.
        workers: threads for blocking calls.
        rendezvous: connects this rank with the others.
        plans: the plans of earlier saves.
        number: of the save, the same on all ranks.
        overwrite: whether an existing checkpoint may be replaced.
        extras: values by name, on the first rank only. Each becomes an item of the checkpoint, and also a file of
            ``torch.save`` beside ``.metadata``, for programs that look for such a file.

    Attributes:
        has_begun: whether the agreement has begun; from then on, it tells the other ranks how the save ends.
        metadata: that of the checkpoint, once it is durable, on the first rank; ``None`` on the others.
    """

    group = None
    only_reads = True

    def __init__(
        self,
        streaming: StreamingWriter,
        *,
        store: Store,
        workers: Workers,
        rendezvous: Rendezvous,
        plans: Plans,
        number: int,
        overwrite: bool,
        extras: Mapping[str, Any] | None = None,
    ) -> None:
        self._streaming = streaming
        self._store = store
        self._workers = workers
        self._rendezvous = rendezvous
        self._plans = plans
        self._number = number
        self._overwrite = overwrite
        self._extras = extras
        self._files: dict[str, bytes] = {}  # the extras by name, each as a file of torch.save
        self.has_begun = False
        self.metadata: Metadata | None = None
        self._flattened = Flattened()
        self._regions: list[Region] = []

    def capture(self, state: Any, *, share_unpicklable: bool) -> Capture:
        """Capture this rank's part of *state*."""
        flattened = flatten(state, self._extras)
        overhead = sum(map(len, flattened.blobs))
        captured, self._regions = capture_regions(flattened.tensors, overhead=overhead)
        flattened.tensors = []  # the capture keeps their memory alive, and only until it is staged
        if self._extras:
            self._files = dict(zip(self._extras, flattened.blobs[-len(self._extras) :], strict=True))
            self._extras = None
        self._flattened = flattened
        return captured

    async def write(self, snapshot: Snapshot, location: Location, emit: Emit) -> int:
        """Write this rank's object, and return when the checkpoint is durable on all ranks; return its length.

        Raises:
            ShardedSaveError: a rank has failed; all ranks raise the same error.
        """
        structure = await self._workers.run(self._plans.structure, self._flattened)
        save = _Save(self, structure, snapshot, location, emit)
        self.has_begun = True
        await self._rendezvous.agree(self._number, save)
        self.metadata = save.metadata
        try:
            await save.clean_up()
        except anyio.get_cancelled_exc_class():
            # The other ranks know that the checkpoint is durable, so this rank ends in the same way (E4).
            logger.info("%s, because the service is closing", _not_all_deleted(location))
        except Exception:  # any store may raise any
            logger.warning("%s", _not_all_deleted(location), exc_info=True)
        return save.nbytes

    async def delete(self, location: Location) -> None:
        """Delete a checkpoint."""
        await self._streaming.delete(location)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Offer:
    """Describes what this rank saves; satisfies ``rendezvous.Offer``."""

    location: str
    fingerprint: bytes
    sizes: tuple[int, ...]
    structure: Structure

    def plan(self) -> bytes:
        """Return this rank's plan, encoded."""
        return self.structure.local.to_bytes()


class _Save:
    """One rank's part in the agreement; satisfies ``rendezvous.Task``."""

    def __init__(
        self, writer: ShardedWriter, structure: Structure, snapshot: Snapshot, location: Location, emit: Emit
    ) -> None:
        self.offer = _Offer(
            location=location.path if is_local(location) else location.url,
            fingerprint=structure.number,
            sizes=tuple(map(len, writer._flattened.blobs)),
            structure=structure,
        )
        self.nbytes = 0
        self.metadata: Metadata | None = None
        self._writer = writer
        self._structure = structure
        self._snapshot = snapshot
        self._location = replace(location, writers=writer._rendezvous.world_size)
        self._emit = emit
        self._object: Location | None = None
        self._replaced: frozenset[str] = frozenset()
        self._has_files = not writer._files
        self._files_before: dict[str, bytes] = {}  # the files of the earlier checkpoint

    @property
    def _save_id(self) -> str:
        return self._writer._rendezvous.save_id(self._writer._number)

    async def write(self, work: bytes | None) -> None:
        """Write this rank's object."""
        assert work is not None, "`plan` returns work for every rank"
        writer = self._writer
        shard = await writer._workers.run(self._shard, work)
        if shard.nbytes == 0:  # other ranks write everything that this one has
            return
        self._object = self._location.below(object_name(writer._rendezvous.rank, self._save_id))
        await writer._streaming.stream(shard, self._object, self._emit)
        self.nbytes = shard.nbytes

    @collector_held_back()
    def _shard(self, work: bytes) -> Shard:
        writer, structure = self._writer, self._structure
        items: list[Item] = []
        for number in writer._plans.work(work):
            spec, position = structure.specs[number], structure.positions[number]
            if spec.dtype is None:
                items.append(writer._flattened.blobs[position])
            else:
                file_template = template(spec.dtype, spec.sizes, spec.stride)
                items.append(TensorItem(file_template, writer._regions[position]))
        return Shard(items, self._snapshot)

    async def undo(self) -> None:
        """Delete what `write` has written."""
        if self._object is not None:
            await self._writer._store.delete(self._object)

    # -- only on the coordinator

    async def plan(self, readies: Mapping[int, Ready]) -> Mapping[int, bytes]:
        """Return what each rank writes."""
        writer = self._writer
        if not writer._overwrite and await writer._store.exists(self._location.below(MARKER)):
            raise exists_already("begin", self._location)
        sent = [(readies[rank].fingerprint, readies[rank].plan or b"") for rank in sorted(readies)]
        works = await writer._workers.run(writer._plans.decide, sent)
        return dict(enumerate(works))

    async def commit(self, readies: Mapping[int, Ready]) -> None:
        """Commit the checkpoint."""
        writer, ranks = self._writer, sorted(readies)
        plan = writer._plans.decided([readies[rank].fingerprint for rank in ranks])
        sizes = [readies[rank].sizes for rank in ranks]
        self.metadata = await writer._workers.run(plan.metadata, self._save_id, self._location.url, sizes)
        manifest = await writer._workers.run(write_manifest, self.metadata)
        self._replaced = await find_replaced(writer._store, self._location, writer._workers)
        # Programs that need these files refuse the earlier checkpoint while they are missing, which is a moment (D6).
        for name in writer._files:
            position = self._location.below(name)
            content = await read_extra(writer._store, position)
            if content is not None:
                self._files_before[name] = content
            await writer._store.delete(position)
        await writer._streaming.stream(Shard([manifest]), self._location.below(MARKER), _ignore)
        await self._put_files()

    async def _put_files(self) -> None:
        """Write the extras' files. The checkpoint is already durable, and contains the same values."""
        self._has_files = True
        await self._put(self._writer._files)

    async def _put(self, files: Mapping[str, bytes]) -> None:
        for name, content in files.items():
            try:
                await self._writer._streaming.stream(Shard([content]), self._location.below(name), _ignore)
            except StoreError as error:
                logger.error(
                    "%r is complete, but its file %s could not be written, so programs that need that file cannot "
                    "load it; save again, or read it with async_ckpt: %s",
                    self._location.url,
                    name,
                    error,
                )

    async def look_up(self, save_id: str) -> bool | None:
        """Return whether the checkpoint in storage is from this save; ``None`` if that is unknown."""
        try:
            found = await read_manifest(self._writer._store, self._location, self._writer._workers)
        except FileNotFoundError:
            await self._put(self._files_before)
            return False
        except StoreError as error:
            logger.warning("cannot find out whether %r was saved: %s", self._location.url, error)
            return None
        is_there = save_id_of(found) == save_id
        if is_there and not self._has_files:  # the answer to the commit was lost
            await self._put_files()
        if not is_there:  # the earlier checkpoint remains
            await self._put(self._files_before)
        return is_there

    async def clean_up(self) -> None:
        """Delete the objects that the checkpoint replaced, and leftovers."""
        if self._writer._rendezvous.rank != COORDINATOR:
            return
        rendezvous, number = self._writer._rendezvous, self._writer._number
        await delete_replaced(
            self._writer._store,
            self._location,
            self._replaced,
            run=rendezvous.run,
            number=number,
            kept={object_name(rank, self._save_id) for rank in range(rendezvous.world_size)},
        )


def _not_all_deleted(location: Location) -> str:
    return (
        f"{location.url!r} is saved, but objects that it replaced, or that failed saves left, were not all deleted; "
        "a later save deletes them"
    )


def _ignore(event: type[Event], **values: Any) -> None:
    """Ignore events: the events of a save are those of its rank's object."""
