"""Objects in a directory that belong to no checkpoint, and never will: found by their names.

Guarantees: only objects with names of ours are told, and of those only what is surely nobody's (D2): of an earlier save
of this very run, which has ended; of a run whose first process was one of this host and lives no more; or what was left
for longer than ``ABANDONED_SECONDS``. Who decides over a save is in its id, so that no file has to say it.

What does not belong here: deleting; what a checkpoint refers to (`manifest`).
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
    """Return a word that no other run has, by which its first process is known."""
    return f"{owner_mark()}.{secrets.token_hex(4)}"


async def find_leftovers(
    store: Store, directory: Location, *, run: str, number: int, kept: Collection[str]
) -> list[str]:
    """Return the names of objects that are nobody's.

    Args:
        store: which serves the directory.
        directory: with a checkpoint that has just been written.
        run: the word of this run.
        number: of the save that has written it.
        kept: the objects that it is made of.
    """
    found = []
    async with aclosing(store.list(directory)) as pages:
        async for page in pages:
            found += [
                child.name for child in page if child.name not in kept and _is_nobodys(child, run, number)
            ]
    return found


def _is_nobodys(child: Child, run: str, number: int) -> bool:
    match = None if child.is_directory else _NAME.fullmatch(child.name)
    if match is None:
        return False
    if match["run"] == run:
        return int(match["number"]) < number
    return marked_owner_is_dead(match["owner"]) or _age_seconds(child) > ABANDONED_SECONDS


def _age_seconds(child: Child) -> float:
    return 0.0 if child.modified_seconds is None else time.time() - child.modified_seconds
