"""Finds and deletes the objects that a new checkpoint replaces in its directory, or that failed saves have left there.

Guarantees: nothing is deleted before the new checkpoint is durable, and a deletion that fails does not make the save
fail (D5). Only objects in this directory are deleted, whatever a ``.metadata`` says.

What does not belong here: which objects are leftovers (`leftovers`), when to delete (`writer`, `objects`).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator

import anyio

from async_ckpt.errors import StoreError
from async_ckpt.sharded.leftovers import find_leftovers
from async_ckpt.sharded.manifest import read_manifest
from async_ckpt.sharded.writing.plan import OBJECT_SUFFIX
from async_ckpt.stores.base import Location, Store, Workers

__all__ = ["delete_replaced", "find_replaced", "read_extra"]

logger = logging.getLogger(__name__)

_DELETIONS_AT_A_TIME = 16
_LONGEST_KEPT_BYTES = 64 << 20


async def find_replaced(store: Store, location: Location, workers: Workers) -> frozenset[str]:
    """Return the names of the objects of the checkpoint that is now at *location*."""
    try:
        found = await read_manifest(store, location, workers)
    except FileNotFoundError:
        return frozenset()
    except StoreError as error:
        logger.warning(
            "the objects of the checkpoint that is replaced at %r stay there, because its .metadata cannot be read: %s",
            location.url,
            error,
        )
        return frozenset()
    names = {str(stored.relative_path) for stored in found.storage_data.values()}
    # A .metadata of somebody else's must not make us delete files outside the directory.
    return frozenset(name for name in names if name.endswith(OBJECT_SUFFIX) and "/" not in name)


async def read_extra(store: Store, location: Location) -> bytes | None:
    """Return the content of a file beside ``.metadata`` before it is deleted, so that a failed save can restore it.

    Returns ``None`` if there is no such file, or if it cannot be read; that does not make the save fail.
    """
    try:
        source = await store.source(location)
        try:
            if source.nbytes > _LONGEST_KEPT_BYTES:
                return None
            data = bytearray(source.nbytes)
            await source.read_into(0, memoryview(data))
        finally:
            with anyio.CancelScope(shield=True):
                await source.aclose()
    except FileNotFoundError:
        return None
    except StoreError as error:
        logger.info(
            "%r cannot be read, so it cannot be restored if the save that replaces it fails: %s",
            location.url,
            error,
        )
        return None
    return bytes(data)


async def delete_replaced(
    store: Store,
    location: Location,
    replaced: Collection[str],
    *,
    run: str,
    number: int,
    kept: Collection[str],
) -> None:
    """Delete the objects that the checkpoint at *location* has replaced, and leftovers.

    Args:
        store: serves the directory.
        location: of the directory.
        replaced: from `find_replaced`.
        run: the name of this run.
        number: of the save that has written the checkpoint.
        kept: the names of the checkpoint's objects.
    """
    names = set(replaced)
    try:
        names.update(await find_leftovers(store, location, run=run, number=number, kept=kept))
    except StoreError as error:
        logger.warning(
            "%r cannot be searched for objects that failed saves have left: %s", location.url, error
        )
    remaining = iter(sorted(names - set(kept)))

    async def delete(names: Iterator[str]) -> None:
        for name in names:
            try:
                await store.delete(location.below(name))
            except StoreError as error:
                logger.warning(
                    "%r belongs to no checkpoint any more, but cannot be deleted from %r: %s",
                    name,
                    location.url,
                    error,
                )

    async with anyio.create_task_group() as deleting:
        for _ in range(min(len(names), _DELETIONS_AT_A_TIME)):
            deleting.start_soon(delete, remaining)
