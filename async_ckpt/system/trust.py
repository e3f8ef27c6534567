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
from collections.abc import Callable, Mapping
from typing import NamedTuple

__all__ = ["Look", "Resolved", "foreign_link_on", "is_foreign", "resolve"]

_MOST_LINKS = 40  # as Linux has it
_MOST_KNOWN = 256  # directories; a run has a few


class Look(NamedTuple):
    """What somebody has seen at a path: nothing, where *found* is ``None``."""

    found: os.stat_result | None


class Resolved(NamedTuple):
    """Where a path leads.

    Attributes:
        path: absolute, and without links.
        links: those that it leads through, in order.
        foreign: one of them that another user has put where anybody may, or has in a directory put there from which it
            leads away; empty if there is none.
        in_directory: whether the directory of that name is there.
        look: at what is there; ``None`` where nobody has looked.
    """

    path: str
    links: tuple[str, ...]
    foreign: str
    in_directory: bool = False
    look: Look | None = None


def resolve(path: str, *, follow: bool = True, changes: Mapping[str, str | None] | None = None) -> Resolved:
    """Return where *path* leads; what is missing of it may be made yet.

    A directory that is known, and is still where it was, costs one system call, or two where links lead there.

    Args:
        path: relative to the working directory, or absolute.
        follow: whether the last name, if it is a link, stands for what it leads to.
        changes: names that will be something else than they are: a link to the path given, or no link.

    Raises:
        OSError: links lead in a circle.
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
    """Where somebody is on the way, and what has been passed.

    Attributes:
        here: a directory, without links.
        links: passed so far.
        theirs: the directory that another user has put where anybody may, and that we are in.
        is_clean: nothing of another user's has been passed that could lead anywhere else tomorrow.
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
        """Go on to *path*; all of it is the way to something else where *is_way*."""
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
        """Return where this has led."""
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
    """A directory that somebody has walked to, past nothing that another user has put where anybody may.

    Attributes:
        path: without links.
        links: on the way to it.
        identity: by which it is told from another that has its name by now, and we from who trusts others than we do.
    """

    path: str
    links: tuple[str, ...]
    identity: tuple[int, int, int, int]

    @classmethod
    def at(cls, directory: str) -> _Known | None:
        """Return what is known of *directory*, if that leads where it led, and nothing else has come there."""
        known = _known.get(directory)
        if known is None or _identity(os.lstat, known.path) != known.identity:
            return None
        if directory != known.path and _identity(os.stat, directory) != known.identity:
            return None
        return known

    @classmethod
    def remember(cls, directory: str, walk: _Walk) -> bool:
        """Remember where *directory* leads, as *walk* has found; return whether it is there."""
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
    """Return the names on the way, the last one first."""
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
    """Return the first foreign link on the way to *path*, itself included; empty if there is none.

    All of the way is looked at, also where it is known.
    """
    walk = _Walk("/")
    try:
        walk.go(os.path.join(os.getcwd(), path))
    except OSError:  # it leads nowhere
        return ""
    return walk.end().foreign


def is_foreign(found: os.stat_result, directory: str) -> bool:
    """Return whether somebody whom we need not trust has put what was *found* into *directory*, as anybody may."""
    if found.st_uid == os.geteuid():
        return False
    try:
        place = os.stat(directory)
    except OSError:
        return False
    open_to_all = place.st_mode & stat.S_ISVTX and place.st_mode & stat.S_IWOTH
    return bool(open_to_all) and found.st_uid != place.st_uid
