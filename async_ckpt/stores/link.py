"""A second name for a checkpoint on a local disk: a symbolic link, replaced in one step.

Guarantees: whoever looks at the name finds what it was before or what it is now, never nothing (D2); when this
returns, the link survives the loss of power (D1). What a killed process left, the next link of that name removes.

What does not belong here: when the link may be made; that is the queue's (rule 5).
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress

from async_ckpt.stores.base import Location
from async_ckpt.stores.local import sync_path
from async_ckpt.stores.target import translated

__all__ = ["make_link"]


def make_link(location: Location, target: Location) -> None:
    """Let *location* lead to *target*, in place of what was there.

    The link is relative, so that the directory may be moved as a whole. Where the file system has no links, it is
    a copy.

    Raises:
        StoreError: it could not be made; what was there stays.
    """
    path = location.path
    directory, name = os.path.split(path)
    made = os.path.join(directory, f".{name}.async_ckpt-link")
    try:
        os.makedirs(directory, exist_ok=True)
        # A checkpoint of many files, which another strategy has written.
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        with suppress(FileNotFoundError):
            os.remove(made)
        try:
            try:
                os.symlink(os.path.relpath(target.path, directory), made)
            except OSError:
                shutil.copy(target.path, made)
            os.replace(made, path)
        except BaseException:
            with suppress(FileNotFoundError):
                os.remove(made)
            raise
        sync_path(path)
    except OSError as error:
        raise translated("link", location, error) from error
