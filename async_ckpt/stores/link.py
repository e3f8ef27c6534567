"""A second name for a checkpoint on a local disk: a symbolic link, replaced in one step.

Guarantees: whoever looks at the name of a file or link finds what it was before or what it is now, never nothing (D2);
what the name stood for is not written to. When this returns, the link survives the loss of power (D1). What a killed
process left, the next link of that name removes.

What does not belong here: when the link may be made; that is the queue's (rule 5).
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from contextlib import suppress

from async_ckpt.options import Durability
from async_ckpt.permissions import create_private, take_after
from async_ckpt.stores.base import Location
from async_ckpt.stores.local import sync_path
from async_ckpt.stores.target import refuse_foreign_link, translated

__all__ = ["make_link"]


_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP}


def make_link(location: Location, target: Location, durability: Durability) -> None:
    """Let *location* lead to *target*, in place of what was there.

    The link is relative, so that the directory may be moved as a whole. Where the file system has no links, it is
    a copy.

    Raises:
        StoreError: it could not be made; a file or link that was there stays.
    """
    refuse_foreign_link("link", location)
    path = location.path
    directory, name = os.path.split(path)
    # Not the name itself, which may be as long as a name can be.
    digest = hashlib.blake2b(os.fsencode(name), digest_size=8).hexdigest()
    made = os.path.join(directory, f".async_ckpt-link.{digest}")
    try:
        os.makedirs(directory, exist_ok=True)
        with suppress(FileNotFoundError):
            os.remove(made)
        try:
            _make(made, target.path, directory)
            # A checkpoint of many files, which another strategy has written.
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            os.replace(made, path)
        except BaseException:
            with suppress(FileNotFoundError):
                os.remove(made)
            raise
        if durability == "fsync":
            sync_path(path)
    except OSError as error:
        raise translated("link", location, error) from error


def _make(made: str, target: str, directory: str) -> None:
    try:
        os.symlink(os.path.relpath(target, directory), made)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # Never through a link that is there, and nobody else's before it is what the checkpoint is.
        with open(target, "rb") as source, open(create_private(made), "wb") as copy:
            shutil.copyfileobj(source, copy)
            copy.flush()
            take_after(copy.fileno(), target, os.fstat(source.fileno()))
            os.fsync(copy.fileno())
