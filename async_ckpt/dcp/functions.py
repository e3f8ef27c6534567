"""The functions: torch's arguments in, requests of a service out.

What does not belong here: which arguments can be honoured (`arguments`), which service it is (`services`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from async_ckpt.dcp.arguments import THREAD, check_save, place
from async_ckpt.dcp.future import SaveFuture
from async_ckpt.dcp.services import Services
from async_ckpt.stores import locate

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

__all__ = ["async_save", "close", "configure", "save"]

_services = Services()


def configure(**options: Any) -> None:
    """Set the options of saves and loads, such as ``queue_depth``, ``memory_limit``, ``storage_options``.

    Called before the first save, on every rank alike; later it waits for the saves that are under way.

    Args:
        **options: see ``ServiceOptions``; those that are not given take their defaults.

    Raises:
        OptionError: an option cannot work.
        Exception: an earlier save failed and nobody has been told yet.
    """
    _services.configure(options)


def close(timeout: float | None = None) -> None:
    """See everything to its end, and free threads, memory and connections; the next call takes them anew.

    The interpreter's exit does as much. To be called before ``destroy_process_group``, as the ranks talk through
    its store.

    Args:
        timeout: seconds; see ``CheckpointService.close``.

    Raises:
        Exception: a save failed and nobody has been told yet; several come as one ``FlushError``.
    """
    _services.close(timeout)


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
        storage_writer: none.
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
    check_save(storage_writer=storage_writer, planner=planner, use_collectives=use_collectives)
    url = place(checkpoint_id)
    service = _services.of(process_group, no_dist=no_dist)
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
        storage_writer: none.
        planner: none, or a ``DefaultSavePlanner()``.
        process_group: who saves; all ranks, if it is ``None``.
        async_checkpointer_type: ``AsyncCheckpointerType.THREAD``.
        async_stager: none.
        no_dist: this process saves by itself.
        use_collectives: none is called.

    Returns:
        A future. Its result is that of ``save``; a failure of which nobody asks it is raised by the next call.

    Raises:
        OptionError: an argument cannot be honoured; the message says what to do instead.
        Exception: as ``CheckpointService.save_sharded`` raises, an error of an earlier save among them, of which
            nobody has been told; this one is accepted all the same, and the next call tells of its failure, if any.
    """
    check_save(
        storage_writer=storage_writer,
        planner=planner,
        use_collectives=use_collectives,
        kind=async_checkpointer_type,
        stager=async_stager,
    )
    url = place(checkpoint_id)
    service = _services.of(process_group, no_dist=no_dist)
    location = locate(url, storage_options=service.options.storage_options)
    return SaveFuture(*service.submit_sharded(state_dict, location))
