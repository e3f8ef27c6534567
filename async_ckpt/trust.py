"""Where a local path leads, and whose links lead there.

Guarantees: a path is resolved as the kernel does it, in one walk, so that what is checked is what is returned; what
comes out leads through no link any more, but for its last name where that is not to be followed. Whose links, and whose
files, may be used is what Linux has for ``open`` where it is told to (``protected_symlinks`` and ``protected_regular``
in proc_sys_fs(5)), here for every step of a path and on every system: in a directory that is sticky and that everybody
may write to, such as ``/tmp``, only our own names count, and those of the directory's owner. A directory that another
user has put there is that user's to share, but no link in it, but for our own, leads out of it.

What does not belong here: refusing; each caller knows what it was about to do.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["Resolved", "foreign_link_on", "is_foreign", "resolve"]

_MOST_LINKS = 40  # as Linux has it


class Resolved(NamedTuple):
    """Where a path leads.

    Attributes:
        path: absolute, and without links.
        links: those that it leads through, in order.
        foreign: one of them that another user has put where anybody may, or has in a directory put there from which it
            leads away; empty if there is none.
    """

    path: str
    links: tuple[str, ...]
    foreign: str


def resolve(path: str, *, follow: bool = True, changes: Mapping[str, str | None] | None = None) -> Resolved:
    """Return where *path* leads; what is missing of it may be made yet.

    Args:
        path: relative to the working directory, or absolute.
        follow: whether the last name, if it is a link, stands for what it leads to.
        changes: names that will be something else than they are: a link to the path given, or no link.

    Raises:
        OSError: links lead in a circle.
    """
    changes = changes or {}
    here, foreign = "/" if path.startswith("/") else os.getcwd(), ""
    ahead = _names(path)
    links: list[str] = []
    # The directory that another user has put where anybody may, and that we are in.
    theirs = _directory_of_theirs(here)
    leading: list[tuple[str, str]] = []  # links of others in such a one
    while ahead:
        name = ahead.pop()
        if name in (".", ".."):
            here = here if name == "." else os.path.dirname(here)
            theirs = theirs if _lies_in(here, theirs) else ""
            continue
        there = os.path.join(here, name)
        target = None
        if ahead or follow:
            target = changes[there] if there in changes else _target(there)
        if target is None:
            if ahead and not theirs and _is_foreign(there, here):
                theirs = there
            here = there
            continue
        links.append(there)
        if len(links) > _MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
        if not foreign and _is_foreign(there, here):
            foreign = there
        if theirs and not _is_ours(there):
            leading.append((there, theirs))
        ahead += _names(target)
        if target.startswith("/"):
            here, theirs = "/", ""
    away = (link for link, directory in leading if not _lies_in(here, directory))
    return Resolved(here, tuple(links), foreign or next(away, ""))


def _directory_of_theirs(path: str) -> str:
    """Return the outermost directory of a *path* without links that another user has put where anybody may."""
    way = [""]
    for name in reversed(_names(path)):
        way.append(f"{way[-1]}/{name}")
    return next((each for each in way[1:] if _is_foreign(each, os.path.dirname(each))), "")


def _names(path: str) -> list[str]:
    """Return the names on the way, the last one first."""
    return [name for name in reversed(path.split("/")) if name]


def _target(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:  # no link, not there, or not for us to see
        return None


def _lies_in(path: str, directory: str) -> bool:
    return path == directory or path.startswith(f"{directory}/")


def _is_foreign(path: str, directory: str) -> bool:
    try:
        return is_foreign(os.lstat(path), directory)
    except OSError:  # it is one yet to be made, by us
        return False


def _is_ours(path: str) -> bool:
    try:
        return os.lstat(path).st_uid == os.geteuid()
    except OSError:  # as above
        return True


def foreign_link_on(path: str) -> str:
    """Return the first foreign link on the way to *path*, itself included; empty if there is none."""
    try:
        return resolve(path).foreign
    except OSError:  # it leads nowhere
        return ""


def is_foreign(found: os.stat_result, directory: str) -> bool:
    """Tell whether somebody whom we need not trust has put what was *found* into *directory*, as anybody may."""
    try:
        place = os.stat(directory)
    except OSError:
        return False
    open_to_all = place.st_mode & stat.S_ISVTX and place.st_mode & stat.S_IWOTH
    return bool(open_to_all) and found.st_uid not in (os.geteuid(), place.st_uid)
