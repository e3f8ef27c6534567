"""Checks that a base CheckpointIO did what it was called for, by looking at the files before and after its calls.

Guarantees: if a base is known to write to the given path, a save that leaves nothing new there has failed, even if the
base raised no error (D1). With ``overwrite=False``, the base is not called if the path exists. A removal after which
the file still exists counts as dropped, and a removal is dropped if no later save was seen to leave a file (D3).

A base may write elsewhere by design: under another name, into a registry, on another host. It is known to write to its
paths if it is Lightning's own ``TorchCheckpointIO``, which swallows PermissionErrors, or once it has left a file at one
of them. Until then, a missing file is a warning, not a failure. A base that writes elsewhere can say so:
``writes_elsewhere = True``.

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
from async_ckpt.stores.removed_directories import refuse_removed_directory, removing

__all__ = ["CheckedBase", "refuse_unknown_location"]

_log = logging.getLogger("async_ckpt.lightning")

_LIGHTNING_PACKAGES = frozenset({"lightning", "lightning_fabric", "pytorch_lightning"})
_TICK_SECONDS = 0.02  # the coarsest clock of a local file system, apart from those that count in seconds
_ELSEWHERE = "If it writes elsewhere on purpose, set writes_elsewhere = True on it."

_REMOTE_TICK_SECONDS = 1.1

Fingerprint: TypeAlias = "tuple[object, ...] | None"
"""Values that change when a file is written again; None if there is no file."""

_UNKNOWN: Fingerprint = ("not seen",)


class CheckedBase:
    """Calls one base, and checks what it did.

    Args:
        base: the CheckpointIO.
    """

    def __init__(self, base: Any) -> None:
        self._base = base
        self._is_ordinary = _is_lightning_class(base)
        self._is_related = base is not None and _is_related(base)
        self._written: dict[str, float] = {}  # by key: when a remote file was first seen
        self._leaves_traces = False
        self._left_nothing = False

    def save(self, location: Location, write: Callable[[], object], *, overwrite: bool) -> None:
        """Call *write* of the base.

        Raises:
            CheckpointExistsError: the location exists, and may not be replaced.
            StoreError: the base is known to write there, and left nothing new; or the directory was removed meanwhile.
            Exception: the base's error.
        """
        if is_local(location) and self._can_see(location) and (self._is_ordinary or self._leaves_traces):
            refuse_removed_directory(location)
        if overwrite and is_local(location) and self._can_see(location):
            detach(location)  # a base that writes in place must not write through a link
        before = self._before(location, overwrite=overwrite)
        write()
        after = self._look(location, "write") if self._can_see(location) else _UNKNOWN
        if after is _UNKNOWN:
            return
        if _is_whole(after) and (after != before or _is_directory(after)):
            self._leaves_traces = True
            if not is_local(location):
                self._written[location.key] = time.monotonic()
        elif self._is_ordinary or self._leaves_traces:
            reason = f"{self._name} returned, but left {'no file' if after is None else 'no new file'} there"
            raise StoreError.during("write", location.url, OSError(errno.EIO, reason), _ELSEWHERE)
        else:
            self._warn_once(location)

    def remove(self, location: Location, delete: Callable[[], object]) -> None:
        """Call *delete* of the base.

        Raises:
            RemovalDroppedError: the file still exists, or no later save was seen to leave one.
            Exception: the base's error.
        """
        with removing(location.path) if is_local(location) else nullcontext():
            self._remove(location, delete)

    def _remove(self, location: Location, delete: Callable[[], object]) -> None:
        before = self._look(location, "delete") if self._can_see(location) else None
        if before in (None, _UNKNOWN):
            delete()
            return
        if self._left_nothing and not self._leaves_traces:
            raise RemovalDroppedError(
                f"{location.url!r} was not deleted: {self._name} has left no file at the paths of "
                f"later saves. {_ELSEWHERE}"
            )
        delete()
        if self._look(location, "delete") not in (None, _UNKNOWN):
            raise RemovalDroppedError(
                f"{location.url!r} was not deleted: {self._name} returned, but it still exists"
            )

    def refuse_mangled(self, path: Any) -> None:
        """Refuse a URL that lost a slash, if the base is known to take it for a local path.

        Raises:
            OptionError: *path* is such a URL.
        """
        if self._is_ordinary and is_given(path):
            refuse_mangled(str(path))

    @property
    def _name(self) -> str:
        return type(self._base).__name__

    def _can_see(self, location: Location) -> bool:
        """Return whether we can look at the base's files: for remote storage, it may use credentials of its own."""
        if location.group == "base" or getattr(self._base, "writes_elsewhere", False):
            return False
        return is_local(location) or self._is_related

    def _look(self, location: Location, stage: str) -> Fingerprint:
        """Return the file's fingerprint, if possible; raise errors only for Lightning's own base, which hides them."""
        try:
            return _fingerprint(location, stage)
        except StoreError:
            if self._is_ordinary:
                raise
            return _UNKNOWN

    def _before(self, location: Location, *, overwrite: bool) -> Fingerprint:
        """Return the file's fingerprint before a save; refuse to replace it unless *overwrite*."""
        if overwrite:
            before = self._look(location, "begin") if self._can_see(location) else None
        else:
            before = _fingerprint(location, "begin")
            if before is not None:
                raise exists_already("begin", location)
        if before is not None:
            self._wait_for_clock_tick(location, before)
        return before

    def _wait_for_clock_tick(self, location: Location, before: Fingerprint) -> None:
        """If the file was written just now, wait until a new one gets another modification time."""
        if is_local(location):
            with suppress(OSError):
                _sleep_until(time.time() - os.stat(location.path).st_ctime, _TICK_SECONDS)
        elif location.key in self._written and not _has_fine_time(before):
            _sleep_until(time.monotonic() - self._written.pop(location.key), _REMOTE_TICK_SECONDS)

    def _warn_once(self, location: Location) -> None:
        if not self._left_nothing:
            self._left_nothing = True
            told = f"{self._name} returned from saving {location.url!r}, but left no new file there"
            _log.warning("%s, so durability cannot be verified. %s", told, _ELSEWHERE)


def refuse_unknown_location(location: Location) -> None:
    """Refuse ``overwrite=False`` for a path that only the base understands.

    Raises:
        OptionError: only the base can check whether it exists.
    """
    if location.group == "base":
        raise OptionError(
            f"overwrite=False: only the base can find out whether {location.url!r} exists; "
            "drop this option, and let the base refuse to overwrite files"
        )


def _is_lightning_class(base: Any) -> bool:
    """Return whether *base* has the ``save_checkpoint`` of Lightning's ``TorchCheckpointIO``."""
    save = getattr(type(base), "save_checkpoint", None)
    return (
        getattr(save, "__qualname__", "") == "TorchCheckpointIO.save_checkpoint"
        and str(getattr(save, "__module__", "")).partition(".")[0] in _LIGHTNING_PACKAGES
    )


def _is_related(base: Any) -> bool:
    """Return whether the innermost CheckpointIO of *base* derives from ``TorchCheckpointIO``, which uses fsspec."""
    *_, innermost = layers_of(base)
    kinds = [kind for kind in type(innermost).__mro__ if kind.__name__ == "TorchCheckpointIO"]
    return any(kind.__module__.partition(".")[0] in _LIGHTNING_PACKAGES for kind in kinds)


def _fingerprint(location: Location, stage: str) -> Fingerprint:
    if is_local(location):
        return _local_fingerprint(location.path)
    import fsspec

    try:  # as Lightning does, to get the same file system
        file_system, path = fsspec.core.url_to_fs(location.address)
        file_system.invalidate_cache()
        return tuple(version_in(file_system.info(path)))
    except FileNotFoundError:
        return None
    except Exception as error:
        shown = location.presentable(error)
        advice = "It could not be checked whether the file exists."
        raise StoreError.during(stage, location.url, shown, advice) from shown


def _local_fingerprint(path: str) -> Fingerprint:
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


def _is_whole(fingerprint: Fingerprint) -> bool:
    """Return whether the file exists, and is not a dangling link."""
    return fingerprint is not None and not (isinstance(fingerprint[0], int) and stat.S_ISLNK(fingerprint[0]))


def _is_directory(fingerprint: Fingerprint) -> bool:
    """Return whether it is a directory, in which any file may have changed."""
    return fingerprint is not None and isinstance(fingerprint[0], int) and stat.S_ISDIR(fingerprint[0])


def _has_fine_time(fingerprint: Fingerprint) -> bool:
    """Return whether its modification time is finer than a second; S3's is not."""
    return any(isinstance(each, datetime) and each.microsecond for each in fingerprint or ())


def _sleep_until(age: float, least: float) -> None:
    if 0 <= age < least:
        time.sleep(least - age)
