"""A storage writer for ``torch.distributed.checkpoint.save``, for programs that keep calling torch's own function.

Guarantees: each object is written as the stores write: in parts, with checksums and retries, and invisible under its
name until it is whole (D2). An earlier checkpoint stays whole until the ``.metadata`` of the new one replaces its own
(D5).

What does not belong here: torch decides which rank writes what, how ranks communicate, and makes them wait for each
other by collective operations. When a rank fails, the others are not told to delete what they have written; the next
save to that directory deletes it, once the process that wrote it has ended.
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

    Use one for each save that is under way: torch gives a writer no means to tell one save from another.

    Args:
        checkpoint_id: the directory: a local path, any URL that fsspec knows, or a ``UPath``; ``None`` if torch's
            function gets it instead.
        service: the service whose options are used; ``None`` uses those of ``configure``.
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
        """The directory that it writes."""
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
        """Note which rank this is."""
        check_collectives(kwargs.get("use_collectives", True))
        rank = kwargs.get("rank")
        if rank is None:  # torch before 2.9 does not pass it
            rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        self._rank = rank
        self._number = next(_numbers)  # so that no object replaces one of the present checkpoint

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return it unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Return them unchanged; refuse to replace a checkpoint where ``overwrite=False``."""
        service, location = self._service, self._location
        if not service.options.overwrite:
            resources = service._resources
            look = partial(resources.store(location).exists, location.below(MARKER))
            if resources.loads.run(resources.running(), look):
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
        """Write ``.metadata``, which completes the checkpoint, and delete the objects that it has replaced."""
        metadata.storage_data = {each.index: each.storage_data for some in results for each in some}
        metadata.storage_meta = self.storage_meta()
        metadata.version = VERSION
        location = self._location
        resources = self._service._resources
        writer = ManifestWriter(
            self._streaming(location),
            metadata,
            store=resources.store(location),
            workers=resources.workers,
            run=self._run,
            number=self._number,
        )
        self._service.submit(None, location, writer, tell=False).wait()

    def storage_meta(self) -> StorageMeta:
        """Return the description of the save for ``.metadata``."""
        return StorageMeta(checkpoint_id=self._location.url, save_id=self._save_id)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether a store serves this location."""
        try:
            locate(checkpoint_id)
        except (StoreError, TypeError, ValueError):
            return False
        return True

    def _streaming(self, location: Location) -> StreamingWriter:
        resources = self._service._resources
        return StreamingWriter(resources.store(location), resources.workers, resources.options)
