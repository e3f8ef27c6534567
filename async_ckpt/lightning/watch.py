"""Whether a base CheckpointIO has done what it was told: what can be seen of it, before and after its calls.

Guarantees: where a base is known to write to the path that it is given, a save that leaves nothing new there has
failed, whatever the base says (D1). With ``overwrite=False``, it is not called where something is. A removal that
leaves what it was to remove, or would remove what saves that nobody has seen were to replace, is not carried out (D3).

A base may write elsewhere by design: under another name, into a registry, on another host. It is known to write to its
paths if it is Lightning's own ``TorchCheckpointIO``, which swallows PermissionErrors, or once it has left something
at one; what cannot be known is not held against it, but told. It may say so itself: ``writes_elsewhere = True``.

What does not belong here: when a base is called.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import time
from collections.abc import Callable
from typing import Any, TypeAlias

from async_ckpt.errors import OptionError, RemovalDroppedError, StoreError
from async_ckpt.stores import is_local
from async_ckpt.stores.base import Location
from async_ckpt.stores.fsspec_calls import version_in
from async_ckpt.stores.target import exists_already

__all__ = ["Watch", "refuse_unknown_place"]

_log = logging.getLogger("async_ckpt.lightning")

_LIGHTNINGS = frozenset({"lightning", "lightning_fabric", "pytorch_lightning"})
_TICK_SECONDS = 0.02  # no clock of a local file system is coarser, but for those that count in seconds
_ELSEWHERE = "If it is right that it writes elsewhere, set writes_elsewhere = True on it."

Sight: TypeAlias = "tuple[object, ...] | None"
"""What changes when a file is written anew; None where nothing is."""


class Watch:
    """Looks after the calls of one base.

    Args:
        base: the CheckpointIO.
    """

    def __init__(self, base: Any) -> None:
        self._base = base
        self._is_ordinary = _is_lightnings_own(base)
        self._leaves_traces = False
        self._left_nothing = False

    def save(self, place: Location, write: Callable[[], object], *, overwrite: bool) -> None:
        """Have the base *write*.

        Raises:
            CheckpointExistsError: something is there, and may not be replaced.
            StoreError: there is nothing new where the base is known to write.
            Exception: the base's own.
        """
        before = self._before(place, overwrite=overwrite)
        write()
        if not self._can_look(place):
            return
        after = _sight(place, "write")
        if _is_whole(after) and (after != before or _is_directory(after)):
            self._leaves_traces = True
        elif self._writes_there:
            reason = f"{self._name} returned, but {'nothing' if after is None else 'nothing new'} is there"
            raise StoreError.during("write", place.url, OSError(errno.EIO, reason), _ELSEWHERE)
        else:
            self._tell_once(place)

    def remove(self, place: Location, delete: Callable[[], object]) -> None:
        """Have the base *delete*.

        Raises:
            RemovalDroppedError: what was there is there still, or is all that is known to be there.
            Exception: the base's own.
        """
        if not self._can_look(place):
            delete()
            return
        if self._left_nothing and not self._leaves_traces and _sight(place, "delete") is not None:
            raise RemovalDroppedError(
                f"{place.url!r} was not deleted: {self._name} has left nothing where it saved since. {_ELSEWHERE}"
            )
        before = _sight(place, "delete")
        delete()
        if before is not None and _sight(place, "delete") is not None:
            raise RemovalDroppedError(
                f"{place.url!r} was not deleted: {self._name} returned, and it is still there"
            )

    @property
    def _writes_there(self) -> bool:
        return self._is_ordinary or self._leaves_traces

    @property
    def _name(self) -> str:
        return type(self._base).__name__

    def _can_look(self, place: Location) -> bool:
        """Tell whether what the base does there can be seen: it may have a login of its own for what is remote."""
        if place.group == "base" or getattr(self._base, "writes_elsewhere", False):
            return False
        return is_local(place) or self._is_ordinary

    def _before(self, place: Location, *, overwrite: bool) -> Sight:
        """Look before a save; refuse to replace, where that is wished."""
        if overwrite and not self._can_look(place):
            return None
        before = _sight(place, "begin")
        if before is not None and not overwrite:
            raise exists_already("begin", place)
        if before is not None and is_local(place):
            _let_clock_tick(place.path)
        return before

    def _tell_once(self, place: Location) -> None:
        if not self._left_nothing:
            self._left_nothing = True
            told = f"{self._name} has returned from saving {place.url!r}, and nothing new is there"
            _log.warning("%s, so whether it is durable is its word alone. %s", told, _ELSEWHERE)


def refuse_unknown_place(place: Location) -> None:
    """Refuse ``overwrite=False`` for a name that only the base understands.

    Raises:
        OptionError: nobody else can tell whether something is there.
    """
    if place.group == "base":
        raise OptionError(
            f"overwrite=False: whether something is at {place.url!r} only the base knows; leave that to the base"
        )


def _is_lightnings_own(base: Any) -> bool:
    """Tell whether *base* saves as ``TorchCheckpointIO`` does, and nothing of another's comes in between."""
    save = getattr(type(base), "save_checkpoint", None)
    return (
        getattr(save, "__qualname__", "") == "TorchCheckpointIO.save_checkpoint"
        and str(getattr(save, "__module__", "")).partition(".")[0] in _LIGHTNINGS
    )


def _sight(place: Location, stage: str) -> Sight:
    if is_local(place):
        return _local_sight(place.path)
    import fsspec

    try:  # as Lightning does, and so with the very same file system
        file_system, path = fsspec.core.url_to_fs(place.address)
        file_system.invalidate_cache()
        return tuple(map(repr, version_in(file_system.info(path))))
    except FileNotFoundError:
        return None
    except Exception as error:
        shown = place.presentable(error)
        advice = "Whether it is there could not be looked at."
        raise StoreError.during(stage, place.url, shown, advice) from shown


def _local_sight(path: str) -> Sight:
    try:
        own = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        led_to = os.stat(path)
    except OSError:
        return (own.st_mode, own.st_ino, own.st_mtime_ns, own.st_ctime_ns)
    names = (own, led_to) if stat.S_ISLNK(own.st_mode) else (led_to,)
    return (
        led_to.st_mode,
        *((each.st_ino, each.st_size, each.st_mtime_ns, each.st_ctime_ns) for each in names),
    )


def _is_whole(sight: Sight) -> bool:
    """Tell whether there is something, and not a link to nothing."""
    return sight is not None and not (isinstance(sight[0], int) and stat.S_ISLNK(sight[0]))


def _is_directory(sight: Sight) -> bool:
    """Tell whether it is a directory, of which it is not known what is to change in it."""
    return sight is not None and isinstance(sight[0], int) and stat.S_ISDIR(sight[0])


def _let_clock_tick(path: str) -> None:
    """Wait, if *path* was changed this very moment, until a change of now has another time; in a worker."""
    try:
        changed = os.stat(path).st_ctime
    except OSError:
        return
    if 0 <= (age := time.time() - changed) < _TICK_SECONDS:
        time.sleep(_TICK_SECONDS - age)
