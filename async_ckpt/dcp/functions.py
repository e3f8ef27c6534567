"""The functions: they turn torch's arguments into requests of a service.

What does not belong here: which arguments can be honoured (`arguments`), which service it is (`services`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from async_ckpt.dcp.arguments import THREAD, check_load, check_save, place
from async_ckpt.dcp.future import SaveFuture
from async_ckpt.dcp.services import shared
from async_ckpt.dcp.stager import Stager
from async_ckpt.dcp.storage_reader import StorageReader
from async_ckpt.dcp.storage_writer import StorageWriter
from async_ckpt.errors import OptionError
from async_ckpt.service import CheckpointService
from async_ckpt.stores import Given, locate

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata
    from torch.distributed.checkpoint.planner import LoadPlanner

__all__ = ["async_save", "close", "configure", "load", "save"]


def configure(**options: Any) -> None:
    """Set the options of saves and loads, such as ``queue_depth``, ``memory_limit``, ``storage_options``.

    Call it before the first save, with the same options on every rank. A later call first waits for the saves that are
    under way.

    Args:
        **options: see ``ServiceOptions``; an option that is not given gets its default.

    Raises:
        OptionError: an option is not valid.
        Exception: an earlier save failed, and its error has not been raised yet.
    """
    shared.configure(options)


def close(timeout: float | None = None) -> None:
    """Finish everything that was accepted, then free threads, memory and connections; the next call acquires them anew.

    The end of the program does the same. Call it before ``destroy_process_group``, because the ranks communicate
    through the store of the process group.

    Args:
        timeout: seconds; see ``CheckpointService.close``.

    Raises:
        Exception: a save failed, and its error has not been raised yet; several are raised as one ``FlushError``.
    """
    shared.close(timeout)


def save(
    state_dict: Mapping[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_writer: object = None,
    planner: object = None,
    process_group: Any = None,
    no_dist: bool = False,
    use_collectives: bool = True,
) -> Metadata | None:
    """Save what the ranks hold together; returns when it is durable on all of them.

    Args:
        state_dict: this rank's part.
        checkpoint_id: the directory: a local path, any URL that fsspec knows, or a ``UPath``.
        storage_writer: ``None``, or our own ``StorageWriter``, whose directory and service are used.
        planner: ``None``, or a ``DefaultSavePlanner()``.
        process_group: the ranks that save together; ``None`` means all.
        no_dist: this process saves by itself.
        use_collectives: must be true; no collective operation is called in either case.

    Returns:
        The checkpoint's metadata on the first rank, ``None`` on the others.

    Raises:
        OptionError: an argument cannot be honoured; the message says what to do instead.
        ShardedSaveError: the save is not durable; every rank raises the same.
        Exception: as ``CheckpointService.save_sharded`` raises. The error of an earlier save that has not been raised
            yet is raised once this one is durable.
    """
    ours = storage_writer if isinstance(storage_writer, StorageWriter) else None
    check_save(
        storage_writer=None if ours else storage_writer, planner=planner, use_collectives=use_collectives
    )
    service, url = _chosen(ours, checkpoint_id, process_group, no_dist)
    location = locate(url, storage_options=service.options.storage_options)
    handle, writer = service.submit_sharded(state_dict, location, tell=False)
    handle.wait()
    service.failures.raise_unless_in_flight(but=handle)
    return writer.metadata


def async_save(
    state_dict: Mapping[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_writer: object = None,
    planner: object = None,
    process_group: Any = None,
    async_checkpointer_type: object = THREAD,
    async_stager: object = None,
    no_dist: bool = False,
    use_collectives: bool = True,
) -> SaveFuture:
    """Save what the ranks hold together; returns once the state may be changed.

    Saves may overlap. The third waits for the first, unless ``configure(queue_depth=…)`` allows more at a time.

    Args:
        state_dict: this rank's part.
        checkpoint_id: the directory: a local path, any URL that fsspec knows, or a ``UPath``.
        storage_writer: ``None``, or our own ``StorageWriter``, whose directory and service are used.
        planner: ``None``, or a ``DefaultSavePlanner()``.
        process_group: the ranks that save together; ``None`` means all.
        async_checkpointer_type: ``AsyncCheckpointerType.THREAD``.
        async_stager: ``None``, or our own ``Stager``, which is not needed: the state is copied anyway.
        no_dist: this process saves by itself.
        use_collectives: must be true; no collective operation is called in either case.

    Returns:
        A future with the result of ``save``. If nobody asks it for its failure, the next call raises that.

    Raises:
        OptionError: an argument cannot be honoured; the message says what to do instead.
        Exception: as ``CheckpointService.save_sharded`` raises. That may be the error of an earlier save that has not
            been raised yet; this save is accepted all the same, and if it fails, the next call says so.
    """
    ours = storage_writer if isinstance(storage_writer, StorageWriter) else None
    check_save(
        storage_writer=None if ours else storage_writer,
        planner=planner,
        use_collectives=use_collectives,
        kind=async_checkpointer_type,
        stager=None if isinstance(async_stager, Stager) else async_stager,
    )
    service, url = _chosen(ours, checkpoint_id, process_group, no_dist)
    location = locate(url, storage_options=service.options.storage_options)
    return SaveFuture(*service.submit_sharded(state_dict, location))


def load(
    state_dict: MutableMapping[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_reader: object = None,
    planner: LoadPlanner | None = None,
    process_group: Any = None,
    no_dist: bool = False,
    weights_only: bool = True,
) -> None:
    """Fill *state_dict* in place, after the pending saves of that directory; no rank waits for another.

    Args:
        state_dict: this rank's part, sharded in any way.
        checkpoint_id: the directory, or a plain file of ``torch.save``; see ``save``.
        storage_reader: ``None``, or our own ``StorageReader``, whose directory and service are used.
        planner: any ``LoadPlanner``; ``None`` uses torch's default.
        process_group: whose saves to wait for, as for ``save``.
        no_dist: as for ``save``.
        weights_only: as for ``torch.load``, for values that are not tensors. torch's own function uses ``False``,
            which runs any code that the checkpoint names.

    Raises:
        OptionError: an argument cannot be honoured; the message says what to do instead.
        Exception: as ``CheckpointService.load_sharded`` raises, on the rank that cannot load.
    """
    ours = storage_reader if isinstance(storage_reader, StorageReader) else None
    check_load(storage_reader=None if ours else storage_reader, planner=planner)
    service, url = _chosen(ours, checkpoint_id, process_group, no_dist)
    is_trusted = not weights_only or (ours is not None and not ours.weights_only)
    service.load_sharded(state_dict, url, weights_only=not is_trusted, planner=planner)


def _chosen(
    storage: StorageWriter | StorageReader | None, checkpoint_id: Any, process_group: Any, no_dist: bool
) -> tuple[CheckpointService, Given]:
    """Return the service to use, and the directory."""
    url = place(checkpoint_id if storage is None else checkpoint_id or storage.checkpoint_id)
    if storage is None or storage.service is None:
        return shared.of(process_group, no_dist=no_dist), url
    if process_group is not None or no_dist:
        raise OptionError(
            "process_group and no_dist: the service that was given has a process group of its own; leave them out"
        )
    return storage.service, url
