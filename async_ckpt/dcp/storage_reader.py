"""A storage reader for ``torch.distributed.checkpoint.load``, for programs that keep calling torch's own function.

Guarantees: only the ranges that are needed are fetched, several at a time. Every tensor that is fetched as a whole is
verified by its checksum. No code that the checkpoint names is run unless that is allowed.

What does not belong here: torch decides which rank reads what, and makes the ranks wait for each other by collective
operations.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from typing import Any

from torch.distributed.checkpoint import storage
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from async_ckpt.dcp.arguments import place
from async_ckpt.dcp.services import shared
from async_ckpt.dcp.storage_writer import StorageWriter
from async_ckpt.errors import IncompleteCheckpointError
from async_ckpt.service import CheckpointService
from async_ckpt.sharded.manifest import parse_manifest
from async_ckpt.sharded.reading.load import Loading
from async_ckpt.sharded.reading.origins import Directory
from async_ckpt.sharded.reading.reader import read_items
from async_ckpt.stores import Given, locate
from async_ckpt.stores.base import Location

__all__ = ["StorageReader"]


class StorageReader(storage.StorageReader):
    """Reads from any storage, for torch's own ``load``, with any planner.

    Args:
        checkpoint_id: the directory: a local path, any URL that fsspec knows, or a ``UPath``; ``None`` if torch's
            function gets it instead.
        service: the service whose options are used; ``None`` uses those of ``configure``.
        weights_only: as for ``torch.load``, for values that are not tensors; torch's own reader uses ``False``.
    """

    def __init__(
        self,
        checkpoint_id: Given | None = None,
        *,
        service: CheckpointService | None = None,
        weights_only: bool = True,
    ) -> None:
        super().__init__()
        self.service = service
        self.weights_only = weights_only
        self._checkpoint_id = checkpoint_id
        self._metadata: Metadata | None = None

    @property
    def checkpoint_id(self) -> Given | None:
        """The directory that it reads."""
        return self._checkpoint_id

    @property
    def _service(self) -> CheckpointService:
        return shared.of(None, no_dist=True) if self.service is None else self.service

    def _location(self, options: Mapping[str, Any] | None) -> Location:
        return locate(place(self._checkpoint_id), storage_options=options, follow=False)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin another load."""
        if checkpoint_id:
            self._checkpoint_id = checkpoint_id
        self._metadata = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the metadata of the checkpoint, after its pending saves.

        Raises:
            IncompleteCheckpointError: there is no complete checkpoint.
            CorruptCheckpointError: it is damaged.
            StoreError: it cannot be read.
        """
        service = self._service
        with service.turn(self._location(service.options.storage_options)) as here:
            if kwargs.get("rank") is not None:  # torch looks for a checkpoint of this rank's own
                raise IncompleteCheckpointError.at(here.url)
            metadata = parse_manifest(Loading.of(service._resources, here).manifest(here), here.url)
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = str(uuid.uuid4())
        return metadata

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Keep the metadata, which says where everything is."""
        self._metadata = metadata

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return it unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return them unchanged."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the items of *plan* into the memory that *planner* provides."""
        assert self._metadata is not None, "torch sets a reader up before it reads"
        service = self._service
        with service.turn(self._location(service.options.storage_options)) as here:
            read_items(
                plan.items,
                Directory(self._metadata, here.url),
                Loading.of(service._resources, here).fetcher(here),
                url=here.url,
                weights_only=self.weights_only,
                planner=planner,
            )
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether a store serves this location."""
        return StorageWriter.validate_checkpoint_id(checkpoint_id)
