"""What mounts refuse: a switch each, and the kinds of mounts that people save to."""

from __future__ import annotations

import errno
from dataclasses import asdict, dataclass, replace
from typing import Any

__all__ = ["ALLUXIO", "EXPRESS", "HDFS", "MOUNTPOINT", "PLAIN", "VOLUMES", "Rules"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What a mount refuses, each with the number that it answers; 0 is a thing that it does.

    Attributes:
        rename: giving a file a free name.
        replace: giving it the name of another file.
        unlink: removing a file.
        unlink_open: removing one that is being written.
        offset: writing anywhere but at the end of what has been written.
        overwrite: opening a present file for writing.
        change: opening one without emptying it.
        both: opening one for reading and writing.
        direct: opening one for direct I/O.
        direct_write: writing to one that was opened so.
        mode: chmod and its kin.
        sync: fsync of a file.
        sync_directory: fsync of a directory.
        allocate: fallocate.
        create: making a file.
        seals: a close, of whichever descriptor, or an fsync ends the writing.
        late: a file that is being written has no length yet.
        late_offset: what was written anywhere else is told of at the close, with this number.
        kill: ``(what, number)``: who asks for this the so-manieth time is killed once it is done.
    """

    rename: int = 0
    replace: int = 0
    unlink: int = 0
    unlink_open: int = 0
    offset: int = 0
    overwrite: int = 0
    change: int = 0
    both: int = 0
    direct: int = 0
    direct_write: int = 0
    mode: int = 0
    sync: int = 0
    sync_directory: int = 0
    allocate: int = 0
    create: int = 0
    seals: bool = False
    late: bool = False
    late_offset: int = 0
    kill: tuple[str, int] = ("", 0)

    def but(self, **changes: Any) -> Rules:
        """Return the same with *changes*."""
        return replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON takes."""
        return asdict(self)


PLAIN = Rules()
"""A mount that refuses nothing."""

MOUNTPOINT = Rules(
    rename=errno.ENOSYS,
    replace=errno.ENOSYS,
    unlink=errno.EPERM,
    unlink_open=errno.EPERM,
    offset=errno.EINVAL,
    overwrite=errno.EPERM,
    change=errno.EPERM,
    mode=errno.EPERM,
    sync_directory=errno.ENOSYS,
    allocate=errno.EOPNOTSUPP,
    seals=True,
)
"""Mountpoint for S3, without ``--allow-delete`` and ``--allow-overwrite``."""

EXPRESS = MOUNTPOINT.but(rename=0, replace=0, unlink=0)
"""Mountpoint for a directory bucket, with both."""

HDFS = Rules(
    replace=errno.EIO,
    offset=errno.EIO,
    change=errno.EINVAL,
    both=errno.EOPNOTSUPP,
    sync=errno.ENOSYS,
    sync_directory=errno.ENOSYS,
    allocate=errno.EOPNOTSUPP,
    late=True,
)
"""HDFS by fuse_dfs."""

ALLUXIO = Rules(
    replace=errno.EEXIST,
    offset=errno.EOPNOTSUPP,
    change=errno.EOPNOTSUPP,
    both=errno.EOPNOTSUPP,
    allocate=errno.EOPNOTSUPP,
    late=True,
)
"""Alluxio by FUSE."""

VOLUMES = Rules(
    late_offset=errno.EOPNOTSUPP,
    change=errno.EOPNOTSUPP,
    mode=errno.EPERM,
    sync=errno.EINVAL,
    sync_directory=errno.EINVAL,
    allocate=errno.EOPNOTSUPP,
)
"""A Databricks volume, which tells of a write out of order when the file is closed."""
