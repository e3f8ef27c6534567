"""What needs no service of one's own: each call makes one, and closes it.

What does not belong here: how anything is done.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, TypeVar

from async_ckpt.service import CheckpointService
from async_ckpt.stores import Given
from async_ckpt.stores.addresses import UniversalPath

__all__ = ["latest", "load"]

AnyGiven = TypeVar("AnyGiven", bound=Given)

READS_OF_LOAD = 8
"""Requests at a time of a load on its own, beside which no save wants the connections."""


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
    """Load a checkpoint with ``torch.load``, after the pending saves of *url* in this process (O2).

    Args:
        url: a local path, any URL that fsspec knows, or a ``UPath``.
        map_location: as for ``torch.load``.
        weights_only: as for ``torch.load``, whose default ``None`` takes; ``False`` runs code that the file names.
        keys: load only what these patterns match, and fetch no more; see ``CheckpointService.load``.
        progress: whether to show how far it is; ``None`` does so on a terminal, when it takes long.
        storage_options: passed to the fsspec file system.
        pickle_module: as for ``torch.load``, which takes it with ``weights_only=False`` only.
        **pickle_load_args: as for ``torch.load``, such as ``encoding``.

    Returns:
        The state; with *keys*, nested as it was, with nothing but what matched.

    Raises:
        FileNotFoundError: there is nothing at *url*.
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


def latest(url: AnyGiven, *, storage_options: Mapping[str, Any] | None = None) -> AnyGiven | None:
    """Return where the newest complete checkpoint is in the directory at *url*, as ``load`` takes it.

    A checkpoint is a file named ``*.ckpt``, ``*.pt`` or ``*.pth``, or a directory that holds a ``.metadata``, as
    sharded ones do. The newest is the one whose file, or ``.metadata``, was written last; of several written at one
    time the last by name, with ``step-10`` after ``step-9``. What is being written does not count.

    Args:
        url: a local directory, any URL that fsspec knows, or a ``UPath``; where it is a sharded checkpoint itself, it
            is returned.
        storage_options: passed to the fsspec file system.

    Returns:
        The place, of the kind that *url* is; None if there is no checkpoint.

    Raises:
        StoreError: storage cannot be asked; a bucket that is not there counts.
    """
    with CheckpointService(storage_options=storage_options) as service:
        name = service.newest(url)
    return None if name is None else _below(url, name) if name else url


def _below(url: Any, name: str) -> Any:
    if isinstance(url, (PurePath, UniversalPath)):
        return url / name  # type: ignore[operator]  # of a UPath, which is known by what it has
    text = os.fspath(url)
    return text + name if text.endswith("/") else f"{text}/{name}"
