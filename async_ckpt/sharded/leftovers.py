"""Finds, by their names, the objects in a directory that belong to no checkpoint and never will.

Guarantees: only objects that carry our names are found, and only if certainly nobody needs them (D2). That is so for
objects of an earlier save of this run, which has ended; of a run whose first process was on this host and has ended;
and for those that are older than ``ABANDONED_SECONDS``. The id of a save names its owner, so no file has to.

What does not belong here: deleting them; which objects a checkpoint refers to (`manifest`).
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Collection
from contextlib import aclosing

from async_ckpt.stores.base import Child, Location, Store
from async_ckpt.stores.leftovers import marked_owner_is_dead, owner_mark

__all__ = ["ABANDONED_SECONDS", "find_leftovers", "new_run"]

ABANDONED_SECONDS = 7 * 24 * 3600.0

_NAME = re.compile(
    r"__\d+_0\.(?P<run>(?P<owner>[0-9a-f]{12}\.[0-9]{1,10})\.[0-9a-f]{8})-(?P<number>\d+)\.distcp"
)


def new_run() -> str:
    """Return an id that no other run has, and that identifies its first process."""
    return f"{owner_mark()}.{secrets.token_hex(4)}"


async def find_leftovers(
    store: Store, directory: Location, *, run: str, number: int, kept: Collection[str]
) -> list[str]:
    """Return the names of objects that nobody needs.

    Args:
        store: serves the directory.
        directory: holds a checkpoint that has just been written.
        run: the id of this run.
        number: the number of the save that has written the checkpoint.
        kept: the names of the checkpoint's objects.
    """
    found = []
    async with aclosing(store.list(directory)) as pages:
        async for page in pages:
            found += [
                child.name for child in page if child.name not in kept and _is_leftover(child, run, number)
            ]
    return found


def _is_leftover(child: Child, run: str, number: int) -> bool:
    match = None if child.is_directory else _NAME.fullmatch(child.name)
    if match is None:
        return False
    if match["run"] == run:
        return int(match["number"]) < number
    return marked_owner_is_dead(match["owner"]) or _age_seconds(child) > ABANDONED_SECONDS


def _age_seconds(child: Child) -> float:
    return 0.0 if child.modified_seconds is None else time.time() - child.modified_seconds
