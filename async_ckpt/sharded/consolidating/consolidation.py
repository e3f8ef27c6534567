"""Makes one file from a sharded checkpoint, on the caller's thread.

Guarantees: a checkpoint that is replaced while it is being read is read again from the start. A checkpoint that is
damaged or incomplete leaves no file (D2): the file is committed only when all of it has been read and verified. No code
that a checkpoint names is run unless the caller asks for it.

What does not belong here: waiting for pending saves (service), writing the file (`engine.writers`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from async_ckpt.errors import StoreError
from async_ckpt.retry import is_transient
from async_ckpt.sharded.consolidating.content import Consolidated
from async_ckpt.sharded.consolidating.files import OpenFiles
from async_ckpt.sharded.consolidating.gathering import Gatherer
from async_ckpt.sharded.consolidating.state import Values, items_of_values, lay_out
from async_ckpt.sharded.consolidating.tensors import tensors_of
from async_ckpt.sharded.manifest import parse_manifest
from async_ckpt.sharded.reading.load import Loading
from async_ckpt.sharded.reading.origins import Directory
from async_ckpt.sharded.reading.reader import read_items
from async_ckpt.stores.base import Content, Location, Source

__all__ = ["consolidate", "parts_at_a_time"]

_log = logging.getLogger("async_ckpt.sharded")

_ATTEMPTS = 3
_PARTS_BYTES = 48 << 20  # a store that paces its requests prepares one more part
_MOST_PARTS = 9_000  # fewer than any store takes

PART_BYTES = 16 << 20
"""How much of the file goes into one request, unless the store would need more requests than it takes."""


def parts_at_a_time(nbytes: int, most: int) -> int:
    """Return how many parts of a file may be in memory at the same time. The longer the file, the larger its parts."""
    part = max(PART_BYTES, -(-nbytes // _MOST_PARTS))
    return max(1, min(most, _PARTS_BYTES // part))


def consolidate(
    loading: Loading, location: Location, write: Callable[[Content], None], *, weights_only: bool
) -> None:
    """Have *write* write what is in the sharded checkpoint at *location* as one file.

    Raises:
        IncompleteCheckpointError: there is no sharded checkpoint.
        CorruptCheckpointError: it is damaged.
        pickle.UnpicklingError: a value needs more than *weights_only* allows.
        StoreError: it cannot be read.
        Exception: what *write* raises.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        data = loading.manifest(location)
        reading = _Reading(Directory(parse_manifest(data, location.url), location.url), location)
        try:
            return reading.run(loading, write, weights_only=weights_only)
        except StoreError as error:
            if attempt == _ATTEMPTS or is_transient(error) or loading.manifest(location) == data:
                raise
            _log.info("reading %s again, because it was replaced meanwhile: %s", location.url, error)


class _Reading:
    """One attempt."""

    def __init__(self, origin: Directory, location: Location) -> None:
        self._origin = origin
        self._location = location

    def run(self, loading: Loading, write: Callable[[Content], None], *, weights_only: bool) -> None:
        """Read everything."""
        metadata, url = self._origin.metadata, self._location.url

        async def open_source(path: str) -> Source:
            return await loading.store.source(self._location.below(path))

        async def open_files() -> OpenFiles:
            return OpenFiles(open_source)

        with loading.loads.kept_open(loading.runtime, open_files) as files:
            fetcher = loading.fetcher(self._location, files.open)
            values = Values()
            items = items_of_values(metadata)
            read_items(items, self._origin, fetcher, url=url, weights_only=weights_only, planner=values)
            tensors = tensors_of(metadata, self._origin)
            frame = lay_out(metadata, values.found, url)
            content = Consolidated(frame, tensors, Gatherer(fetcher, url))
            failure: BaseException | None = None
            try:
                write(content)
            except Exception:
                failure = content.failure
                if failure is None:
                    raise
            if failure is not None:  # outside of the handler, so that it keeps its cause
                raise failure
