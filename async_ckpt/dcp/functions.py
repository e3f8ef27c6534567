"""The functions: torch's arguments in, requests of a service out.

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

    Called before the first save, on every rank alike; later it waits for the saves that are under way.

    Args:
        **options: see ``ServiceOptions``; those that are not given take their defaults.

    Raises:
        OptionError: an option cannot work.
        Exception: an earlier save failed and nobody has been told yet.
    """
    shared.configure(options)


def close(timeout: float | None = None) -> None:
    """See everything to its end, and free threads, memory and connections; the next call takes them anew.

    The interpreter's exit does as much. To be called before ``destroy_process_group``, as the ranks talk through
    its store.

    Args:
        timeout: seconds; see ``CheckpointService.close``.

    Raises:
        Exception: a save failed and nobody has been told yet; several come as one ``FlushError``.
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
        storage_writer: none, or a ``StorageWriter`` of ours, whose directory and service it is then.
        planner: none, or a ``DefaultSavePlanner()``.
        process_group: who saves; all ranks, if it is ``None``.
        no_dist: this process saves by itself.
        use_collectives: none is called.

    Returns:
        The checkpoint's metadata on the first rank, ``None`` on the others.

    Raises:
        OptionError: an argument cannot be honoured; the message says what to do instead.
        ShardedSaveError: the save is not durable; every rank raises the same.
        Exception: as ``CheckpointService.save_sharded`` raises. An error of an earlier save, which nobody has been
            told of, is raised when this one is durable.
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

    Saves may overlap. The third waits for the first, unless ``configure(queue_depth=…)`` lets more be under way.

    Args:
        state_dict: this rank's part.
        checkpoint_id: the directory: a local path, any URL that fsspec knows, or a ``UPath``.
        storage_writer: none, or a ``StorageWriter`` of ours, whose directory and service it is then.
        planner: none, or a ``DefaultSavePlanner()``.
        process_group: who saves; all ranks, if it is ``None``.
        async_checkpointer_type: ``AsyncCheckpointerType.THREAD``.
        async_stager: none, or a ``Stager`` of ours, which does what is done anyway.
        no_dist: this process saves by itself.
        use_collectives: none is called.

    Returns:
        A future. Its result is that of ``save``; a failure of which nobody asks it is raised by the next call.

    Raises:
        OptionError: an argument cannot be honoured; the message says what to do instead.
        Exception: as ``CheckpointService.save_sharded`` raises, an error of an earlier save among them, of which
            nobody has been told; this one is accepted all the same, and the next call tells of its failure, if any.
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
        storage_reader: none, or a ``StorageReader`` of ours, whose directory and service it is then.
        planner: any; ``None`` takes torch's.
        process_group: whose saves to wait for, as for ``save``.
        no_dist: as for ``save``.
        weights_only: as for ``torch.load``, of what is no tensor; torch's own takes ``False``, which runs code that the
            checkpoint names.

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
    """Return which service is meant, and where."""
    url = place(checkpoint_id if storage is None else checkpoint_id or storage.checkpoint_id)
    if storage is None or storage.service is None:
        return shared.of(process_group, no_dist=no_dist), url
    if process_group is not None or no_dist:
        raise OptionError(
            "process_group and no_dist: the service that was given has a process group of its own; leave them out"
        )
    return storage.service, url
