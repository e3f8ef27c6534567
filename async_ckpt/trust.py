"""Whose links are followed, and whose files are replaced, in directories where anybody may put something.

Guarantees: the rule is the one that Linux has for ``open`` where it is told to (``protected_symlinks`` and
``protected_regular`` in proc_sys_fs(5)), here for every step of a path and on every system: in a directory that is
sticky and that everybody may write to, such as ``/tmp``, only our own names count, and those of the directory's owner.

What does not belong here: raising; each caller knows what it was about to do.
"""

from __future__ import annotations

import os
import stat

__all__ = ["foreign_link_on", "is_foreign", "resolved"]

_MOST_LINKS = 40  # as the kernel has it


def resolved(path: str) -> tuple[str, str]:
    """Return what ``os.path.realpath`` does, and the first foreign link that was followed; empty if there is none.

    In one walk, so that what is checked is what is returned. Links that lead in a circle are left as they are.
    """
    steps = os.path.join(os.getcwd() if not path.startswith("/") else "/", path).split("/")[::-1]
    reached, foreign, links = "/", "", 0
    while steps:
        name = steps.pop()
        if name in ("", "."):
            continue
        if name == "..":
            reached = os.path.dirname(reached)
            continue
        step = os.path.join(reached, name)
        try:
            followed = os.readlink(step)
            found = os.lstat(step)
        except OSError:  # it is no link, nothing is there, or we may not look
            reached = step
            continue
        links += 1
        if links > _MOST_LINKS:
            reached = step
            continue
        if not foreign and is_foreign(found, reached):
            foreign = step
        if followed.startswith("/"):
            reached = "/"
        steps += followed.split("/")[::-1]
    return reached, foreign


def foreign_link_on(path: str) -> str:
    """Return the first foreign link on the way to *path*, itself included; empty if there is none."""
    return resolved(path)[1]


def is_foreign(found: os.stat_result, directory: str) -> bool:
    """Tell whether somebody whom we need not trust has put what was *found* into *directory*, as anybody may."""
    try:
        place = os.stat(directory)
    except OSError:
        return False
    open_to_all = place.st_mode & stat.S_ISVTX and place.st_mode & stat.S_IWOTH
    return bool(open_to_all) and found.st_uid not in (os.geteuid(), place.st_uid)
