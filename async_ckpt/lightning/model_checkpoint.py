"""What ``ModelCheckpoint`` believes and does while saves are pending.

Guarantees: a pending save counts as a file, and one whose removal is pending does not, so names are counted up as
with synchronous checkpoints; ``last.ckpt`` of ``save_last="link"`` leads to a whole checkpoint at any moment, or is
absent. Lightning's collective operations are called exactly as it calls them.

What does not belong here: when files are removed (removals), and loggers, which ``ModelCheckpoint`` tells of its saves
(notifications).
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

__all__ = ["Foresight", "make_aware"]


def make_aware(
    checkpoint: Any, plugin: AsyncCheckpointIO, removals: Removals, overrides: Overrides, *, is_deferred: bool
) -> None:
    """Have *checkpoint*, any callback, know of the plugin's pending files, if it looks at files.

    Args:
        checkpoint: the callback.
        plugin: which writes its files.
        removals: of the plugin.
        overrides: of the fit.
        is_deferred: whether its own files may be pending, when it goes on; then its links may be, too.

    Raises:
        OptionError: its files are to be where no checkpoint can be; its first save would say so, an epoch later.
    """
    file_system = getattr(checkpoint, "_fs", None)
    if isinstance(file_system, AbstractFileSystem):  # else it is something else's short name
        _check_directory(checkpoint, plugin)
        overrides.replace(checkpoint, "_fs", Foresight(file_system, plugin, removals))
    if getattr(checkpoint, "save_last", None) == "link" and hasattr(checkpoint, "_link_checkpoint"):
        if not is_deferred and replaces(checkpoint, "_link_checkpoint"):
            return  # it may copy, or upload, and the file is there
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
    """Like ``ModelCheckpoint._link_checkpoint``, once *filepath* is durable."""
    if trainer.is_global_zero and not os.path.isdir(filepath):
        if os.path.abspath(filepath) != os.path.abspath(linkpath):
            removals.before_replacing(linkpath, partial(make_link, linkpath, filepath))
        trainer.strategy.barrier()
    else:  # another rank, or a directory, which a strategy has written past the plugin
        link_now(trainer, filepath, linkpath)
    removals.release()


class Foresight:
    """A file system as it will be once what is pending has ended; passes for the one that it wraps."""

    def __init__(self, file_system: Any, plugin: AsyncCheckpointIO, removals: Removals) -> None:
        self._file_system = file_system
        self._plugin = plugin
        self._removals = removals

    def exists(self, path: Any, **options: Any) -> bool:
        """Return whether *path* will be there."""
        try:
            self._removals.release_path(path)
            foreseen = self._plugin.will_exist(path, leaves=self._removals.holds)
        except (OptionError, UnknownProtocolError, MissingDependencyError):  # what can be no checkpoint
            foreseen = None
        return bool(self._file_system.exists(path, **options)) if foreseen is None else foreseen

    @property
    def __class__(self) -> Any:
        """Return the class of the wrapped one, for ``isinstance``."""
        return type(self._file_system)

    @__class__.setter
    def __class__(self, value: Any) -> None:
        raise AttributeError("it is not ours to change")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._file_system, name)

    def __reduce__(self) -> Any:
        """A copy is the file system alone: it may be used when the training is over."""
        return _itself, (self._file_system,)


def _itself(file_system: Any) -> Any:
    return file_system
