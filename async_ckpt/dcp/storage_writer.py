"""What ``torch.distributed.checkpoint.save`` writes by, for programs that go on calling torch's own function.

Guarantees: what an object needs, it has from the stores: parts, checksums, retries, and nothing under its name before
it is whole (D2). A checkpoint that is there stays whole until the ``.metadata`` of the new one takes its place (D5).

What does not belong here, as torch does it: who writes what, how the ranks hear of each other, and that they wait for
each other by collective operations. No rank is told to take back what it has written when another has failed; the next
save to that directory deletes it, once the process that wrote it lives no more.
"""

from __future__ import annotations

import os
from functools import partial
from itertools import count
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import storage
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from async_ckpt.dcp.arguments import check_collectives, place
from async_ckpt.dcp.services import shared
from async_ckpt.engine.writers import StreamingWriter
from async_ckpt.errors import StoreError
from async_ckpt.service import CheckpointService
from async_ckpt.sharded.leftovers import new_run
from async_ckpt.sharded.writing.objects import ManifestWriter, ObjectWriter, Value, make_object
from async_ckpt.sharded.writing.plan import VERSION, object_name
from async_ckpt.stores import Given, locate
from async_ckpt.stores.base import MARKER, Location, exists_already

__all__ = ["StorageWriter"]

_numbers = count(1)


class StorageWriter(storage.StorageWriter):
    """Writes to any storage, for torch's own ``save`` and ``async_save``, with any planner.

    Each save that is under way needs one of its own: torch tells a writer nothing by which it could tell saves apart.

    Args:
        checkpoint_id: of the directory: a local path, any URL that fsspec knows, or a ``UPath``; ``None`` where torch's
            function is given it.
        service: whose options hold; ``None`` takes those of ``configure``.
    """

    def __init__(
        self, checkpoint_id: Given | None = None, *, service: CheckpointService | None = None
    ) -> None:
        super().__init__()
        self.service = service
        self._checkpoint_id = checkpoint_id
        self._rank = 0
        self._run = new_run()
        self._number = next(_numbers)

    @property
    def checkpoint_id(self) -> Given | None:
        """Where it writes."""
        return self._checkpoint_id

    @property
    def _save_id(self) -> str:
        return f"{self._run}-{self._number}"

    @property
    def _location(self) -> Location:
        return locate(place(self._checkpoint_id), storage_options=self._service.options.storage_options)

    @property
    def _service(self) -> CheckpointService:
        return shared.of(None, no_dist=True) if self.service is None else self.service

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin another save."""
        if checkpoint_id:
            self._checkpoint_id = checkpoint_id

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Learn who this is."""
        check_collectives(kwargs.get("use_collectives", True))
        rank = kwargs.get("rank")
        if rank is None:  # torch before 2.9 does not say
            rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        self._rank = rank
        self._number = next(_numbers)  # so that no object replaces one of the checkpoint that is there

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Leave it as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Leave them as they are; refuse to replace a checkpoint where ``overwrite=False``."""
        service, location = self._service, self._location
        if not service.options.overwrite:
            holdings = service._holdings
            look = partial(holdings.store(location).exists, location.below(MARKER))
            if holdings.loads.run(holdings.running(), look):
                raise exists_already("begin", location)
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's object, and return when it is durable."""
        values: list[tuple[str, Value]] = []
        for item in plan.items:
            if item.type is WriteItemType.BYTE_IO:
                values.append((item.index.fqn, planner.resolve_data(item).getvalue()))  # type: ignore[union-attr]
            else:
                values.append((item.index.fqn, partial(planner.resolve_data, item)))  # type: ignore[arg-type]
        content, lengths = make_object(values)
        name = object_name(self._rank, self._save_id)
        if content.nbytes:
            location = self._location
            writer = ObjectWriter(self._streaming(location), content)
            self._service.submit(None, location.below(name), writer, tell=False).wait()
        results, at = [], 0
        for item, length in zip(plan.items, lengths, strict=True):
            results.append(WriteResult(item.index, length, _StorageInfo(name, at, length)))
            at += length
        written: Future[list[WriteResult]] = Future()
        written.set_result(results)
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Make the directory a checkpoint, and delete what it has replaced."""
        metadata.storage_data = {each.index: each.storage_data for some in results for each in some}
        metadata.storage_meta = self.storage_meta()
        metadata.version = VERSION
        location = self._location
        holdings = self._service._holdings
        writer = ManifestWriter(
            self._streaming(location),
            metadata,
            store=holdings.store(location),
            workers=holdings.workers,
            run=self._run,
            number=self._number,
        )
        self._service.submit(None, location, writer, tell=False).wait()

    def storage_meta(self) -> StorageMeta:
        """Return what ``.metadata`` is to say of the save."""
        return StorageMeta(checkpoint_id=self._location.url, save_id=self._save_id)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether it is a place that can be served."""
        try:
            locate(checkpoint_id)
        except (StoreError, TypeError, ValueError):
            return False
        return True

    def _streaming(self, location: Location) -> StreamingWriter:
        holdings = self._service._holdings
        return StreamingWriter(holdings.store(location), holdings.workers, holdings.options)
