"""Finds the newest checkpoint in a directory.

Guarantees: only complete checkpoints count: a plain file, which is whole whenever it is visible (D2), or a directory
with its marker, which is written last (D5). The directory is listed once, and so is each directory in it, a few at a
time (B2).

What does not belong here: what is in a checkpoint.
"""

from __future__ import annotations

import errno
import math
import re
from collections.abc import Iterator
from contextlib import aclosing

import anyio

from async_ckpt.errors import StoreError
from async_ckpt.stores.base import MARKER, Child, Location, Store

__all__ = ["find_newest"]

_ENDINGS = (".ckpt", ".pt", ".pth")
_AT_A_TIME = 16
_PERMISSION_ERRORS = frozenset({errno.EACCES, errno.EPERM})


async def find_newest(store: Store, location: Location) -> str | None:
    """Return the name of the newest complete checkpoint right below *location*.

    It is the one whose marker, or file, was written last. If several have the same time, or storage reports no times,
    it is the last by name, where numbers are compared as numbers.

    Args:
        store: serves the directory.
        location: the directory.

    Returns:
        The name; ``""`` if the directory is a checkpoint itself; None if there is none.

    Raises:
        StoreError: the directory cannot be listed.
    """
    found: list[Child] = []
    directories: list[str] = []
    async with aclosing(store.list(location)) as pages:
        async for page in pages:
            for child in page:
                if child.is_directory:
                    directories.append(child.name)
                elif child.name == MARKER:
                    return ""
                elif child.name.endswith(_ENDINGS) and not child.name.startswith("."):
                    found.append(child)
    found += await _complete_checkpoints(store, location, directories)
    return max(found, key=_order).name if found else None


async def _complete_checkpoints(store: Store, location: Location, directories: list[str]) -> list[Child]:
    """Return those of *directories* that have a marker, each with the time of its marker."""
    found: list[Child] = []
    errors: list[Exception] = []

    async def search(remaining: Iterator[str]) -> None:
        for name in remaining:
            try:
                marker = await _marker(store, location.below(name))
            except Exception as error:
                errors.append(error)
                group.cancel_scope.cancel()
                return
            if marker is not None:
                found.append(Child(name=name, is_directory=True, modified_seconds=marker.modified_seconds))

    async with anyio.create_task_group() as group:
        remaining = iter(directories)
        for _ in range(min(len(directories), _AT_A_TIME)):
            group.start_soon(search, remaining)
    if errors:
        raise errors[0]
    return found


async def _marker(store: Store, location: Location) -> Child | None:
    try:
        async with aclosing(store.list(location, starting_with=MARKER)) as pages:
            async for page in pages:
                for child in page:
                    if child.name == MARKER and not child.is_directory and child.nbytes != 0:
                        return child
    except StoreError as error:
        if (
            error.errno not in _PERMISSION_ERRORS
        ):  # a directory that may not be listed cannot be loaded either
            raise
    return None


def _order(child: Child) -> tuple[float, list[str | int]]:
    written = -math.inf if child.modified_seconds is None else child.modified_seconds
    pieces = re.split("([0-9]+)", child.name)  # text and numbers alternate
    return written, [int(piece) if at % 2 else piece for at, piece in enumerate(pieces)]
