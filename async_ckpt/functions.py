"""Functions that need no service: each call makes one, and closes it.

What does not belong here: any work of their own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, TypeVar

from async_ckpt.retry import RetryPolicy
from async_ckpt.service import CheckpointService
from async_ckpt.stores import Given
from async_ckpt.stores.addresses import UniversalPath

if TYPE_CHECKING:
    from torch.distributed.checkpoint.planner import LoadPlanner

__all__ = ["consolidate", "latest", "load", "load_sharded"]

AnyGiven = TypeVar("AnyGiven", bound=Given)

READS_OF_LOAD = 8
"""Concurrent requests of ``load``, which shares its connections with no save."""

DEFAULT_RETRY = RetryPolicy()


def load(
    url: Given,
    *,
    map_location: Any = None,
    weights_only: bool | None = True,
    keys: str | Sequence[str] | None = None,
    progress: bool | None = None,
    storage_options: Mapping[str, Any] | None = None,
    pickle_module: Any = None,
    **pickle_load_args: Any,
) -> Any:
    """Load a checkpoint with ``torch.load``; wait for pending saves of *url* in this process (O2).

    Args:
        url: a local path, any URL that fsspec knows, or a ``UPath``.
        map_location: as for ``torch.load``.
        weights_only: as for ``torch.load``; ``None`` is its default, ``False`` lets the file run any code.
        keys: patterns of the values to load; see ``CheckpointService.load``.
        progress: whether to show progress; ``None`` shows it on a terminal if the load takes long.
        storage_options: passed to the fsspec file system.
        pickle_module: as for ``torch.load``; needs ``weights_only=False``.
        **pickle_load_args: as for ``torch.load``, such as ``encoding``.

    Returns:
        The state; with *keys*, only the values that match, nested as they were.

    Raises:
        FileNotFoundError: *url* does not exist.
        KeyError: a pattern of *keys* matches nothing.
        CorruptCheckpointError: the file is damaged.
        StoreError: the file cannot be read.
    """
    with CheckpointService(storage_options=storage_options, max_concurrent_parts=READS_OF_LOAD) as service:
        return service.load(
            url,
            map_location=map_location,
            weights_only=weights_only,
            keys=keys,
            progress=progress,
            pickle_module=pickle_module,
            **pickle_load_args,
        )


def load_sharded(
    state: MutableMapping[str, Any],
    url: Given,
    *,
    strict: bool = True,
    weights_only: bool = True,
    planner: LoadPlanner | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> None:
    """Fill *state* in place from a sharded checkpoint, or a plain file; see ``CheckpointService.load_sharded``.

    Args:
        state: what ``torch.distributed.checkpoint.load`` takes.
        url: of a directory that we, or torch, have written, or of a file of torch's; on any storage.
        strict: whether what the checkpoint does not have is an error; else it is left as it is.
        weights_only: as for ``torch.load``; of what is no tensor, ``False`` runs code that the checkpoint names.
        planner: what says what goes where; ``None`` takes torch's.
        storage_options: passed to the fsspec file system.
    """
    with CheckpointService(storage_options=storage_options, max_concurrent_parts=READS_OF_LOAD) as service:
        service.load_sharded(state, url, strict=strict, weights_only=weights_only, planner=planner)


def consolidate(
    directory_url: Given,
    file_url: Given,
    *,
    weights_only: bool = True,
    overwrite: bool = True,
    retry: RetryPolicy = DEFAULT_RETRY,
    storage_options: Mapping[str, Any] | None = None,
    file_storage_options: Mapping[str, Any] | None = None,
) -> None:
    """Make one ordinary file of ``torch.save`` from a sharded checkpoint, in bounded memory, from any storage to any.

    The file holds the state as it was nested, every tensor whole and on the CPU: what torch's ``dcp_to_torch_save``
    makes, in a process that need not have room for it. Each byte is fetched once. The file appears when all of it is
    durable, and until then what was there before stays (D1, D2). It waits for pending saves of both places in this
    process (O1, O2).

    Args:
        directory_url: what ``save_sharded``, or torch, has written.
        file_url: where the file goes.
        weights_only: as for ``torch.load``; of what is no tensor, ``False`` runs code that the checkpoint names.
        overwrite: whether the file may replace an earlier one.
        retry: how often a request to storage is repeated.
        storage_options: passed to the fsspec file systems of both places.
        file_storage_options: passed to that of *file_url*, in place of *storage_options*.

    Raises:
        IncompleteCheckpointError: there is no sharded checkpoint at *directory_url*, or none that is complete.
        pickle.UnpicklingError: a value needs more than ``weights_only`` allows; the message names it.
        CorruptCheckpointError: the checkpoint is damaged.
        CheckpointExistsError: there is a file at *file_url*, and ``overwrite=False``.
        StoreError: the checkpoint cannot be read, or the file not be written.
    """
    with CheckpointService(
        storage_options=storage_options,
        max_concurrent_parts=READS_OF_LOAD,
        overwrite=overwrite,
        retry=retry,
    ) as service:
        service.consolidate(
            directory_url, file_url, weights_only=weights_only, file_storage_options=file_storage_options
        )


def latest(url: AnyGiven, *, storage_options: Mapping[str, Any] | None = None) -> AnyGiven | None:
    """Return the newest complete checkpoint in the directory at *url*, in a form that ``load`` takes.

    A checkpoint is a file named ``*.ckpt``, ``*.pt`` or ``*.pth``, or a directory with a ``.metadata`` file, as sharded
    checkpoints are. The newest is the one whose file, or ``.metadata``, was written last; of several with the same
    time, the last by name, with ``step-10`` after ``step-9``. Unfinished checkpoints do not count.

    Args:
        url: a local directory, any URL that fsspec knows, or a ``UPath``; if it is a sharded checkpoint itself, it is
            returned.
        storage_options: passed to the fsspec file system.

    Returns:
        The checkpoint's location, of the same type as *url*; None if there is no checkpoint.

    Raises:
        StoreError: the directory cannot be listed, for example because the bucket does not exist.
    """
    with CheckpointService(storage_options=storage_options) as service:
        name = service.newest(url)
    return None if name is None else _below(url, name) if name else url


def _below(url: Any, name: str) -> Any:
    if isinstance(url, (PurePath, UniversalPath)):
        return url / name  # type: ignore[operator]  # of a UPath, which is known by what it has
    text = os.fspath(url)
    return text + name if text.endswith("/") else f"{text}/{name}"
