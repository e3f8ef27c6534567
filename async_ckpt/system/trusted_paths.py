"""Resolves local paths, and finds links of users who are not trusted.

Guarantees: a path is resolved as the kernel does it, in one walk, so that the checked path is the returned one; the
result contains no links, except its last name if that is not to be followed. The trusted links and files are those that
Linux allows with ``protected_symlinks`` and ``protected_regular`` (see proc_sys_fs(5)), here for every step of a path
and on every system: in a sticky directory that everybody may write to, such as ``/tmp``, only entries of our own and of
the directory's owner are trusted. A directory that another user has put there may be used, but no link in it, other
than our own, may lead out of it.

What does not belong here: refusing a path; the caller does that.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Mapping
from typing import NamedTuple

__all__ = ["Look", "Resolved", "foreign_link_on", "is_foreign", "resolve"]

_MOST_LINKS = 40  # as Linux has it
_MOST_KNOWN = 256  # directories; a run has a few


class Look(NamedTuple):
    """The status that was found at a path; *found* is ``None`` if nothing was there."""

    found: os.stat_result | None


class Resolved(NamedTuple):
    """Where a path leads.

    Attributes:
        path: the absolute path, without links.
        links: the links on the path, in order.
        foreign: one of them that is not trusted: another user has put it into a directory that anyone may write to, or
            it leads out of a directory that another user has put there; empty if there is none.
        in_directory: whether the directory of the path exists.
        look: the status of the path; ``None`` if it was not looked up.
    """

    path: str
    links: tuple[str, ...]
    foreign: str
    in_directory: bool = False
    look: Look | None = None


def resolve(path: str, *, follow: bool = True, changes: Mapping[str, str | None] | None = None) -> Resolved:
    """Resolve *path*; parts of it need not exist.

    A known directory that has not moved costs one system call, or two if links lead to it.

    Args:
        path: relative to the working directory, or absolute.
        follow: whether to follow the last name, if it is a link.
        changes: pending changes: by name, the target of a future link, or ``None`` for no link.

    Raises:
        OSError: there is a cycle of links.
    """
    path = path if path.startswith("/") else f"{os.getcwd()}/{path}"
    directory, _, name = path.rstrip("/").rpartition("/")
    if changes or not directory or name in (".", ".."):
        walk = _Walk("/", changes or {})
        walk.go(path, follow=follow)
        return walk.end()
    known = _Known.at(directory)
    if known is not None:
        is_there = True
        walk = _Walk(known.path)
        walk.links += known.links
    else:
        walk = _Walk("/")
        walk.go(directory, is_way=True)
        is_there = _Known.remember(directory, walk)
    beside = walk.here
    walk.go(name, follow=follow)
    return walk.end()._replace(in_directory=is_there and os.path.dirname(walk.here) == beside)


class _Walk:
    """A walk along a path.

    Attributes:
        here: the present directory, without links.
        links: the links passed so far.
        theirs: the directory around ``here`` that another user has put into a directory that anyone may write to.
        is_clean: whether nothing passed belongs to another user who could redirect it later.
    """

    def __init__(self, here: str, changes: Mapping[str, str | None] | None = None) -> None:
        self.here = here
        self.links: list[str] = []
        self.theirs = ""
        self._changes = changes or {}
        self._foreign = ""
        self._leading: list[tuple[str, str]] = []  # links of others in a directory of theirs
        self._look: Look | None = None

    @property
    def is_clean(self) -> bool:
        return not (self._foreign or self.theirs or self._leading)

    def go(self, path: str, *, follow: bool = True, is_way: bool = False) -> None:
        """Go on to *path*; with *is_way*, the last name is followed, too."""
        ahead = _names(path)
        while ahead:
            name = ahead.pop()
            if name in (".", ".."):
                self.here = self.here if name == "." else os.path.dirname(self.here)
                self.theirs = self.theirs if _lies_in(self.here, self.theirs) else ""
                continue
            there = os.path.join(self.here, name)
            on_the_way = bool(ahead) or is_way
            target = self._target(there, on_the_way=on_the_way) if on_the_way or follow else None
            if target is None:
                if on_the_way and not self.theirs and _is_foreign(there, self.here):
                    self.theirs = there
                self.here = there
                continue
            self._pass(there)
            if len(self.links) > _MOST_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
            ahead += _names(target)
            if target.startswith("/"):
                self.here, self.theirs = "/", ""

    def end(self) -> Resolved:
        """Return the result."""
        away = (link for link, directory in self._leading if not _lies_in(self.here, directory))
        foreign = self._foreign or next(away, "")
        return Resolved(self.here, tuple(self.links), foreign, look=self._look)

    def _target(self, there: str, *, on_the_way: bool) -> str | None:
        if there in self._changes:
            return self._changes[there]
        if not on_the_way:
            self._look = _look(there)
            if self._look is None or self._look.found is None or not stat.S_ISLNK(self._look.found.st_mode):
                return None
            self._look = None
        return _target(there)

    def _pass(self, link: str) -> None:
        self.links.append(link)
        if not self._foreign and _is_foreign(link, self.here):
            self._foreign = link
        if self.theirs and not _is_ours(link):
            self._leading.append((link, self.theirs))


class _Known(NamedTuple):
    """A known directory, whose path contains nothing that another user could redirect.

    Attributes:
        path: the path without links.
        links: the links on the path to it.
        identity: the directory's identity, and that of this process's user.
    """

    path: str
    links: tuple[str, ...]
    identity: tuple[int, int, int, int]

    @classmethod
    def at(cls, directory: str) -> _Known | None:
        """Return the knowledge of *directory*, if it still leads to the same directory."""
        known = _known.get(directory)
        if known is None or _identity(os.lstat, known.path) != known.identity:
            return None
        if directory != known.path and _identity(os.stat, directory) != known.identity:
            return None
        return known

    @classmethod
    def remember(cls, directory: str, walk: _Walk) -> bool:
        """Remember the result of *walk* for *directory*; return whether the directory exists."""
        identity = _identity(os.lstat, walk.here)
        if identity is not None and walk.is_clean:
            if len(_known) >= _MOST_KNOWN:
                _known.clear()
            _known[directory] = cls(walk.here, tuple(walk.links), identity)
        return identity is not None


_known: dict[str, _Known] = {}


def _identity(look: Callable[[str], os.stat_result], path: str) -> tuple[int, int, int, int] | None:
    try:
        found = look(path)
    except OSError:
        return None
    if not stat.S_ISDIR(found.st_mode):
        return None
    return found.st_dev, found.st_ino, found.st_uid, os.geteuid()


def _names(path: str) -> list[str]:
    """Return the names of a path, last one first."""
    return [name for name in reversed(path.split("/")) if name]


def _look(path: str) -> Look | None:
    try:
        return Look(os.lstat(path))
    except FileNotFoundError:
        return Look(None)
    except OSError:  # not for us to see
        return None


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
    """Return the first link on *path*, its last name included, that is not trusted; empty if there is none.

    The whole path is checked, even if its directory is known.
    """
    walk = _Walk("/")
    try:
        walk.go(os.path.join(os.getcwd(), path))
    except OSError:  # it leads nowhere
        return ""
    return walk.end().foreign


def is_foreign(found: os.stat_result, directory: str) -> bool:
    """Return whether *found* belongs to an untrusted user, in a *directory* that anyone may write to."""
    if found.st_uid == os.geteuid():
        return False
    try:
        place = os.stat(directory)
    except OSError:
        return False
    open_to_all = place.st_mode & stat.S_ISVTX and place.st_mode & stat.S_IWOTH
    return bool(open_to_all) and found.st_uid != place.st_uid
