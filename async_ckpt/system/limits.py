"""Finds out how much memory this process may use, and which limit applies.

Guarantees: all control groups of the process count, up to the root, of both versions, however a container or a batch
system has mounted them; a group that cannot be read sets no limit, and no content of those files is an error.

What does not belong here: the share of it for snapshots (options).
"""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

__all__ = ["Bound", "smallest_bound"]

_MOST_BYTES = 1 << 20
_OF_VERSION_1, _OF_VERSION_2 = ("memory.limit_in_bytes",), ("memory.max", "memory.high")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """A limit on the memory of this process.

    Attributes:
        nbytes: the limit in bytes.
        source: where the limit comes from: a file, or its name.
    """

    nbytes: int
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mount:
    """A mounted hierarchy of control groups: its visible root, and the mount point."""

    root: PurePosixPath
    place: PurePosixPath
    is_version_2: bool


def smallest_bound(root: Path = Path("/")) -> Bound:
    """Return the smallest limit on the memory of this process.

    Args:
        root: the directory with ``/proc`` and the control groups.
    """
    nbytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    bounds = [Bound(nbytes=nbytes, source="the machine's memory")]
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        bounds.append(Bound(nbytes=soft, source="RLIMIT_AS (ulimit -v)"))
    return min([*bounds, *_of_groups(root)], key=lambda bound: bound.nbytes)


def _of_groups(root: Path) -> Iterator[Bound]:
    groups = _own_groups(_read(root / "proc/self/cgroup"))
    mounts = _mounts(_read(root / "proc/self/mountinfo"))
    for is_version_2, group in groups.items():
        of_version = [mount for mount in mounts if mount.is_version_2 is is_version_2]
        # If the process's own group is not visible, as in some containers, the topmost visible group contains it.
        for mount in [each for each in of_version if _is_below(group, each.root)] or of_version:
            place = mount.place
            if _is_below(group, mount.root):
                place /= group.relative_to(mount.root)
            while _is_below(place, mount.place):
                yield from _of_group(root, place, is_version_2)
                if place == place.parent:
                    break
                place = place.parent


def _of_group(root: Path, place: PurePosixPath, is_version_2: bool) -> Iterator[Bound]:
    for name in _OF_VERSION_2 if is_version_2 else _OF_VERSION_1:
        text = _read(_under(root, place / name)).strip()
        if re.fullmatch("[0-9]{1,20}", text, re.ASCII) and int(text):  # else there is none: "max", or nothing
            yield Bound(nbytes=int(text), source=str(place / name))
    if not is_version_2:  # it tells of groups around a container, too
        found = re.search(
            "^hierarchical_memory_limit ([0-9]{1,20})$", _read(_under(root, place / "memory.stat")), re.M
        )
        if found and int(found[1]):
            yield Bound(nbytes=int(found[1]), source=f"hierarchical_memory_limit in {place / 'memory.stat'}")


def _own_groups(text: str) -> dict[bool, PurePosixPath]:
    """Return the memory groups in ``/proc/self/cgroup``, by whether they are of version 2."""
    groups = {}
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if path.startswith("/") and (number, controllers) == ("0", ""):
            groups[True] = PurePosixPath(path)
        elif path.startswith("/") and "memory" in controllers.split(","):
            groups[False] = PurePosixPath(path)
    return groups


def _mounts(text: str) -> list[_Mount]:
    """Return the mounted memory hierarchies, from ``/proc/self/mountinfo``."""
    mounts = []
    for line in text.splitlines():
        here, _, kind = line.partition(" - ")
        fields, (name, *more) = here.split(" "), kind.split(" ")
        controllers = more[1].split(",") if len(more) > 1 else []
        if len(fields) > 5 and (name == "cgroup2" or (name == "cgroup" and "memory" in controllers)):
            root, place = (PurePosixPath(_unescaped(field)) for field in fields[3:5])
            mounts.append(_Mount(root=root, place=place, is_version_2=name == "cgroup2"))
    return mounts


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _is_below(path: PurePosixPath, around: PurePosixPath) -> bool:
    return ".." not in path.parts and path.is_relative_to(around)


def _under(root: Path, path: PurePosixPath) -> Path:
    return root / path.relative_to("/")


def _read(path: Path) -> str:
    """Return the content of a small file; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(_MOST_BYTES).decode(errors="surrogateescape")
    except OSError:
        return ""
