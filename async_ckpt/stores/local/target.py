"""Checks whether a local path can be saved to, and explains why not.

Guarantees: nothing is changed, and only names and permissions are looked at.
"""

from __future__ import annotations

import errno
import os
import stat

from async_ckpt.errors import StoreError
from async_ckpt.stores.base import Location
from async_ckpt.stores.disk import Disk
from async_ckpt.stores.local.strategy import IN_PLACE_ADVICE
from async_ckpt.system.trusted_paths import foreign_link_on, is_foreign

__all__ = ["check_local_target", "refuse_foreign_file", "refuse_foreign_link", "translated"]

_ADVICE = {
    errno.ENOSPC: "Free space there, or save elsewhere. An earlier file is untouched.",
    errno.EDQUOT: "Free space within the quota, or save elsewhere. An earlier file is untouched.",
    errno.EACCES: "Save where this user may write.",
    errno.EROFS: "Save elsewhere.",
    errno.EISDIR: "Give the path of a file.",
}


def check_local_target(
    location: Location, disk: Disk, *, in_place: bool = False, at_call: bool = False
) -> os.stat_result | None:
    """Refuse a location that cannot be saved to; blocks for a few system calls.

    Args:
        location: the location to save to; a symlink there would be replaced.
        disk: the system calls.
        in_place: whether an existing file may be written in place if no other can be created beside it.
        at_call: whether *location* has just been made, so that the status it carries is up to date.

    Returns:
        The status of the file or symlink that is there now, or ``None``.

    Raises:
        StoreError: it is a directory or another special file, or this user may not write there.
    """
    if location.foreign_link or not at_call:
        refuse_foreign_link("begin", location)
    look = location.look if at_call else None
    earlier = _found(location, disk) if look is None else look.found
    if location.url.endswith("/") or (earlier is not None and stat.S_ISDIR(earlier.st_mode)):
        raise _refusal(location, errno.EISDIR)
    if earlier is not None and not stat.S_ISLNK(earlier.st_mode):
        _check_file(location, earlier, disk, at_call=at_call)
    if not disk.takes_names(os.path.dirname(location.path)):
        _check_directories(location, earlier, disk, in_place=in_place)
    return earlier


def _check_file(location: Location, earlier: os.stat_result, disk: Disk, *, at_call: bool) -> None:
    """Refuse to replace anything but a regular file of ours that may be written to."""
    if not stat.S_ISREG(earlier.st_mode):
        raise _refusal(location, errno.EINVAL, "Only a regular file, or a symlink, can be replaced.")
    refuse_foreign_file("begin", location, earlier)
    if not (at_call and _is_plainly_ours(earlier)) and _is_refused(location.path, disk):
        raise _refusal(location, _reason(location.path))


def _check_directories(
    location: Location, earlier: os.stat_result | None, disk: Disk, *, in_place: bool
) -> None:
    """Refuse a path if neither the file nor missing directories can be created."""
    directory = os.path.dirname(location.path)
    while not os.path.lexists(directory):
        directory = os.path.dirname(directory)
    if not os.path.isdir(directory):
        raise _refusal(location, errno.ENOTDIR, f"{directory!r} is no directory.")
    if _is_refused(directory, disk):
        advice = f"It is the directory {directory!r} that cannot be written to."
        if earlier is not None and stat.S_ISREG(earlier.st_mode):
            if in_place:
                return
            advice = f"{advice} {IN_PLACE_ADVICE}"
        raise _refusal(location, _reason(directory), advice)


def refuse_foreign_link(stage: str, location: Location) -> None:
    """Refuse a path that another user could redirect.

    Raises:
        StoreError: there is such a link on the path.
    """
    link = location.foreign_link or foreign_link_on(os.path.dirname(location.path))
    if link:
        whose = f"Another user has put the link {link!r} into a directory that anyone may write to"
        advice = f"{whose}; give the path that it leads to, if you trust it."
        raise _refusal(location, errno.EACCES, advice, stage)


def refuse_foreign_file(stage: str, location: Location, found: os.stat_result) -> None:
    """Refuse to replace the file *found* if it is another user's: the checkpoint would get its owner and mode.

    Raises:
        StoreError: another user has put it into a directory that anyone may write to.
    """
    if is_foreign(found, os.path.dirname(location.path)):
        advice = "Another user has put a file of that name into a directory that anyone may write to; save to another."
        raise _refusal(location, errno.EACCES, advice, stage)


def _found(location: Location, disk: Disk) -> os.stat_result | None:
    try:
        return disk.lstat(location.path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise translated("begin", location, error) from error


def _is_plainly_ours(found: os.stat_result) -> bool:
    """Return whether the file is ours and writable by its mode; if not, the worker asks the system later."""
    return found.st_uid == os.geteuid() and bool(found.st_mode & stat.S_IWUSR)


def _is_refused(path: str, disk: Disk) -> bool:
    """Return whether *path* exists and may not be written; it may be gone by now, perhaps by a removal of ours."""
    return not disk.writable(path) and os.path.lexists(path)


def _reason(path: str) -> int:
    try:
        return errno.EROFS if os.statvfs(path).f_flag & os.ST_RDONLY else errno.EACCES
    except OSError:
        return errno.EACCES


def _refusal(location: Location, number: int, advice: str = "", stage: str = "begin") -> StoreError:
    return translated(stage, location, OSError(number, os.strerror(number)), advice)


def translated(stage: str, location: Location, error: OSError, advice: str = "") -> StoreError:
    """Return *error* as a StoreError that names the stage, the location and what to do."""
    return StoreError.during(stage, location.url, error, advice or _ADVICE.get(error.errno or 0, ""))
