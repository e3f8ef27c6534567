"""Shows ``ModelCheckpoint`` the files as they will be once pending saves have ended.

Guarantees: a pending save counts as a file, and a file whose removal is pending does not, so version counters in file
names are those of synchronous checkpoints; ``last.ckpt`` of ``save_last="link"`` leads to a whole checkpoint at any
moment, or is absent. Lightning's collective operations are called exactly as without the plugin.

What does not belong here: when files are removed (removals), and notifying loggers of saves (notifications).
"""

from __future__ import annotations

import os
from contextlib import suppress
from functools import partial
from typing import Any

from fsspec import AbstractFileSystem

from async_ckpt.errors import MissingDependencyError, OptionError, StoreError, UnknownProtocolError
from async_ckpt.lightning.deferral import replaces
from async_ckpt.lightning.overrides import Overrides
from async_ckpt.lightning.plugin import AsyncCheckpointIO
from async_ckpt.lightning.removals import Removals

__all__ = ["PendingFileSystem", "show_pending_files"]


def show_pending_files(
    checkpoint: Any, plugin: AsyncCheckpointIO, removals: Removals, overrides: Overrides, *, is_deferred: bool
) -> None:
    """Make the plugin's pending files visible to *checkpoint*, any callback, if it looks at files.

    Args:
        checkpoint: the callback.
        plugin: writes its files.
        removals: the plugin's removals.
        overrides: the overrides of the fit.
        is_deferred: whether the callback's saves are deferred; then its links may be pending, too.

    Raises:
        OptionError: no checkpoint can be saved to its directory; otherwise its first save would fail, an epoch later.
    """
    file_system = getattr(checkpoint, "_fs", None)
    if isinstance(file_system, AbstractFileSystem):  # another attribute of that name otherwise
        _check_directory(checkpoint, plugin)
        overrides.replace(checkpoint, "_fs", PendingFileSystem(file_system, plugin, removals))
    if getattr(checkpoint, "save_last", None) == "link" and hasattr(checkpoint, "_link_checkpoint"):
        if not is_deferred and replaces(checkpoint, "_link_checkpoint"):
            return  # its own method may read the file, which is durable by now
        removals.wait_for_links = True
        make_link = plugin.link if is_deferred else partial(plugin.link, waits=True)
        link = partial(_link, make_link, removals, checkpoint._link_checkpoint)
        overrides.replace(checkpoint, "_link_checkpoint", link)


def _check_directory(checkpoint: Any, plugin: AsyncCheckpointIO) -> None:
    directory = getattr(checkpoint, "dirpath", None)
    saves = getattr(checkpoint, "save_top_k", 1) != 0 or getattr(checkpoint, "save_last", None)
    if saves and isinstance(directory, str) and directory:
        with suppress(MissingDependencyError, StoreError):
            plugin.key_of(os.path.join(directory, "….ckpt"))


def _link(
    make_link: Any, removals: Removals, link_now: Any, trainer: Any, filepath: str, linkpath: str
) -> None:
    """Like ``ModelCheckpoint._link_checkpoint``, but once *filepath* is durable."""
    if trainer.is_global_zero and not os.path.isdir(filepath):
        if os.path.abspath(filepath) != os.path.abspath(linkpath):
            removals.before_replacing(linkpath, partial(make_link, linkpath, filepath))
        trainer.strategy.barrier()
    else:  # another rank, or a directory, which a strategy has written by itself
        link_now(trainer, filepath, linkpath)
    removals.release()


class PendingFileSystem:
    """A file system as it will be once all pending requests have ended; it behaves like the one that it wraps."""

    def __init__(self, file_system: Any, plugin: AsyncCheckpointIO, removals: Removals) -> None:
        self._file_system = file_system
        self._plugin = plugin
        self._removals = removals

    def exists(self, path: Any, **options: Any) -> bool:
        """Return whether *path* will exist."""
        try:
            self._removals.release_path(path)
            expected = self._plugin.will_exist(path, leaves=self._removals.holds)
        except (OptionError, UnknownProtocolError, MissingDependencyError):  # not the path of a checkpoint
            expected = None
        return bool(self._file_system.exists(path, **options)) if expected is None else expected

    @property
    def __class__(self) -> Any:
        """Return the class of the wrapped file system, for ``isinstance``."""
        return type(self._file_system)

    @__class__.setter
    def __class__(self, value: Any) -> None:
        raise AttributeError("the class of a wrapped file system cannot be changed")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._file_system, name)

    def __reduce__(self) -> Any:
        """A copy is the wrapped file system alone: it may be used after the training."""
        return _unwrapped, (self._file_system,)


def _unwrapped(file_system: Any) -> Any:
    return file_system
