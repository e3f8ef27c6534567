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
from contextlib import nullcontext, suppress
from datetime import datetime
from typing import Any, TypeAlias

from async_ckpt.errors import OptionError, RemovalDroppedError, StoreError
from async_ckpt.lightning.bases import layers_of
from async_ckpt.stores import is_given, is_local, refuse_mangled
from async_ckpt.stores.base import Location, exists_already
from async_ckpt.stores.fsspec_calls import version_in
from async_ckpt.stores.local.link import detach
from async_ckpt.stores.vanished import refuse_vanished, removing

__all__ = ["Watch", "refuse_unknown_place"]

_log = logging.getLogger("async_ckpt.lightning")

_LIGHTNINGS = frozenset({"lightning", "lightning_fabric", "pytorch_lightning"})
_TICK_SECONDS = 0.02  # no clock of a local file system is coarser, but for those that count in seconds
_ELSEWHERE = "If it is right that it writes elsewhere, set writes_elsewhere = True on it."

_REMOTE_TICK_SECONDS = 1.1

Sight: TypeAlias = "tuple[object, ...] | None"
"""What changes when a file is written anew; None where nothing is."""

_UNKNOWN: Sight = ("not seen",)


class Watch:
    """Looks after the calls of one base.

    Args:
        base: the CheckpointIO.
    """

    def __init__(self, base: Any) -> None:
        self._base = base
        self._is_ordinary = _is_lightnings_own(base)
        self._is_related = base is not None and _is_related(base)
        self._written: dict[str, float] = {}  # when what is remote was seen to be new
        self._leaves_traces = False
        self._left_nothing = False

    def save(self, place: Location, write: Callable[[], object], *, overwrite: bool) -> None:
        """Have the base *write*.

        Raises:
            CheckpointExistsError: something is there, and may not be replaced.
            StoreError: there is nothing new where the base is known to write, or its directory was removed meanwhile.
            Exception: the base's own.
        """
        if is_local(place) and self._can_look(place) and (self._is_ordinary or self._leaves_traces):
            refuse_vanished(place)
        if overwrite and is_local(place) and self._can_look(place):
            detach(place)  # it may write in place, and then never through a link
        before = self._before(place, overwrite=overwrite)
        write()
        after = self._look(place, "write") if self._can_look(place) else _UNKNOWN
        if after is _UNKNOWN:
            return
        if _is_whole(after) and (after != before or _is_directory(after)):
            self._leaves_traces = True
            if not is_local(place):
                self._written[place.key] = time.monotonic()
        elif self._is_ordinary or self._leaves_traces:
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
        with removing(place.path) if is_local(place) else nullcontext():
            self._remove(place, delete)

    def _remove(self, place: Location, delete: Callable[[], object]) -> None:
        before = self._look(place, "delete") if self._can_look(place) else None
        if before in (None, _UNKNOWN):
            delete()
            return
        if self._left_nothing and not self._leaves_traces:
            raise RemovalDroppedError(
                f"{place.url!r} was not deleted: {self._name} has left nothing where it saved since. {_ELSEWHERE}"
            )
        delete()
        if self._look(place, "delete") not in (None, _UNKNOWN):
            raise RemovalDroppedError(
                f"{place.url!r} was not deleted: {self._name} returned, and it is still there"
            )

    def refuse_mangled(self, path: Any) -> None:
        """Refuse a URL that lost a slash, where it is known that the base would take it for a local path.

        Raises:
            OptionError: *path* is one.
        """
        if self._is_ordinary and is_given(path):
            refuse_mangled(str(path))

    @property
    def _name(self) -> str:
        return type(self._base).__name__

    def _can_look(self, place: Location) -> bool:
        """Return whether what the base does there can be seen: it may have a login of its own for what is remote."""
        if place.group == "base" or getattr(self._base, "writes_elsewhere", False):
            return False
        return is_local(place) or self._is_related

    def _look(self, place: Location, stage: str) -> Sight:
        """Look, where that can be; that Lightning's own base is denied a look is a failure, as it hides just that."""
        try:
            return _sight(place, stage)
        except StoreError:
            if self._is_ordinary:
                raise
            return _UNKNOWN

    def _before(self, place: Location, *, overwrite: bool) -> Sight:
        """Look before a save; refuse to replace, where that is wished."""
        if overwrite:
            before = self._look(place, "begin") if self._can_look(place) else None
        else:
            before = _sight(place, "begin")
            if before is not None:
                raise exists_already("begin", place)
        if before is not None:
            self._let_clock_tick(place, before)
        return before

    def _let_clock_tick(self, place: Location, before: Sight) -> None:
        """Wait, if what is there was written this very moment, until what is written now has another time."""
        if is_local(place):
            with suppress(OSError):
                _sleep_until(time.time() - os.stat(place.path).st_ctime, _TICK_SECONDS)
        elif place.key in self._written and not _has_fine_time(before):
            _sleep_until(time.monotonic() - self._written.pop(place.key), _REMOTE_TICK_SECONDS)

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
    """Return whether *base* saves as ``TorchCheckpointIO`` does, and nothing of another's comes in between."""
    save = getattr(type(base), "save_checkpoint", None)
    return (
        getattr(save, "__qualname__", "") == "TorchCheckpointIO.save_checkpoint"
        and str(getattr(save, "__module__", "")).partition(".")[0] in _LIGHTNINGS
    )


def _is_related(base: Any) -> bool:
    """Return whether *base*, or what it wraps, is made from ``TorchCheckpointIO``, and so asks fsspec as that does."""
    *_, innermost = layers_of(base)
    kinds = [kind for kind in type(innermost).__mro__ if kind.__name__ == "TorchCheckpointIO"]
    return any(kind.__module__.partition(".")[0] in _LIGHTNINGS for kind in kinds)


def _sight(place: Location, stage: str) -> Sight:
    if is_local(place):
        return _local_sight(place.path)
    import fsspec

    try:  # as Lightning does, and so with the very same file system
        file_system, path = fsspec.core.url_to_fs(place.address)
        file_system.invalidate_cache()
        return tuple(version_in(file_system.info(path)))
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
    """Return whether there is something, and not a link to nothing."""
    return sight is not None and not (isinstance(sight[0], int) and stat.S_ISLNK(sight[0]))


def _is_directory(sight: Sight) -> bool:
    """Return whether it is a directory, of which it is not known what is to change in it."""
    return sight is not None and isinstance(sight[0], int) and stat.S_ISDIR(sight[0])


def _has_fine_time(sight: Sight) -> bool:
    """Return whether it has a time that counts in less than seconds; that of S3 does not."""
    return any(isinstance(each, datetime) and each.microsecond for each in sight or ())


def _sleep_until(age: float, least: float) -> None:
    if 0 <= age < least:
        time.sleep(least - age)
