"""What is right below a local directory, by the page.

Guarantees: memory is bounded by the page; a link counts as what it leads to; what vanishes meanwhile is left out.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice

from async_ckpt.stores.base import Child, Location
from async_ckpt.stores.disk import Disk
from async_ckpt.stores.local.target import translated

__all__ = ["Listing"]

_PAGE = 1000


class Listing:
    """One look into one directory; its methods block.

    Args:
        location: of the directory.
        starting_with: how the names that are wanted begin.
        disk: the system calls.
    """

    def __init__(self, location: Location, starting_with: str, disk: Disk) -> None:
        self._location = location
        self._starting_with = starting_with
        self._disk = disk
        self._open = ExitStack()
        self._entries: Iterator[os.DirEntry[str]] | None = None

    def page(self) -> list[Child]:
        """Return the next children; none once there are no more, or where there is no such directory.

        Raises:
            StoreError: the directory cannot be looked into.
        """
        try:
            if self._entries is None:
                entries = self._open.enter_context(self._disk.scan(self._location.path))
                self._entries = (entry for entry in entries if entry.name.startswith(self._starting_with))
            while page := list(islice(self._entries, _PAGE)):
                if found := [child for entry in page if (child := _child(entry)) is not None]:
                    return found
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            raise translated("list", self._location, error) from error
        return []

    def close(self) -> None:
        """Let go of the directory."""
        self._open.close()


def _child(entry: os.DirEntry[str]) -> Child | None:
    try:
        found = entry.stat()
    except FileNotFoundError:  # gone, or a link that leads nowhere
        return None
    is_directory = stat.S_ISDIR(found.st_mode)
    return Child(
        name=entry.name,
        is_directory=is_directory,
        nbytes=None if is_directory else found.st_size,
        modified_seconds=found.st_mtime,
    )
