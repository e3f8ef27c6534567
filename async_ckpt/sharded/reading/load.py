"""Loads into a sharded state, on the caller's thread.

Guarantees: a checkpoint that is replaced while it is being read is read again from the start.

What does not belong here: waiting for pending saves (service).
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.distributed.checkpoint.planner import LoadPlanner

from async_ckpt.engine.loading import Loads
from async_ckpt.engine.resources import Resources
from async_ckpt.engine.runtime import Runtime
from async_ckpt.errors import IncompleteCheckpointError, StoreError
from async_ckpt.format.reading.reader import read_skeleton
from async_ckpt.format.reading.unpickling import Unpickling
from async_ckpt.retry import is_transient
from async_ckpt.sharded.manifest import fetch_manifest, parse_manifest
from async_ckpt.sharded.reading.fetching import Fetcher
from async_ckpt.sharded.reading.origins import Directory, PlainFile
from async_ckpt.sharded.reading.reader import Origin, fill
from async_ckpt.stores.base import Location, Source, Store

__all__ = ["Loading"]

_log = logging.getLogger("async_ckpt.sharded")

_ATTEMPTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """What a load needs of its service.

    Attributes:
        store: serves the location.
        runtime: runs the requests.
        loads: the loads of the service.
        at_a_time: how many requests may run at the same time.
    """

    store: Store
    runtime: Runtime
    loads: Loads
    at_a_time: int

    @classmethod
    def of(cls, resources: Resources, location: Location) -> Loading:
        """Return what a load from *location* needs of the service that has *resources*."""
        return cls(
            store=resources.store(location),
            runtime=resources.running(),
            loads=resources.loads,
            at_a_time=resources.options.max_concurrent_parts,
        )

    def load(
        self,
        state: MutableMapping[str, Any],
        location: Location,
        *,
        strict: bool = True,
        weights_only: bool = True,
        planner: LoadPlanner | None = None,
    ) -> None:
        """Fill *state*; see ``CheckpointService.load_sharded``."""
        url = location.url
        filling = partial(fill, state, url=url, strict=strict, weights_only=weights_only, planner=planner)
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                data = self.manifest(location)
            except IncompleteCheckpointError as error:
                return self._load_plain(location, filling, error, weights_only=weights_only)
            origin = Directory(parse_manifest(data, url), url)
            try:
                return filling(origin, self.fetcher(location))
            except StoreError as error:
                if attempt == _ATTEMPTS or is_transient(error) or self.manifest(location) == data:
                    raise
                _log.info("reading %s again, because it was replaced meanwhile: %s", url, error)

    def _load_plain(
        self,
        location: Location,
        filling: Callable[[Origin, Fetcher], None],
        otherwise: IncompleteCheckpointError,
        *,
        weights_only: bool,
    ) -> None:
        """Fill a state from a plain file if there is one; otherwise raise *otherwise*."""
        url = location.url
        try:
            with self.loads.kept_open(self.runtime, partial(self.store.source, location)) as source:
                # The pickle and the tensors must come from one and the same file.
                async def borrow(_: str = "") -> Source:
                    return _Borrowed(source)

                with self.loads.opened(borrow, location, self.runtime) as file:
                    skeleton = read_skeleton(file, url=url, unpickling=Unpickling(weights_only=weights_only))
                if skeleton is None:
                    raise StoreError(
                        f"cannot read {url!r} into a sharded state: its layout is not that of torch.save. "
                        "Load it with async_ckpt.load.",
                        location=url,
                        stage="read",
                    )
                filling(PlainFile(skeleton, url), self.fetcher(location, borrow))
        except FileNotFoundError:
            raise otherwise from None
        except StoreError as error:
            if error.errno == errno.EISDIR:
                raise otherwise from None
            raise

    def manifest(self, location: Location) -> bytes:
        """Return the bytes of the ``.metadata`` of a directory."""
        return self.loads.run(self.runtime, partial(fetch_manifest, self.store, location))

    def fetcher(
        self, location: Location, borrow: Callable[[str], Awaitable[Source]] | None = None
    ) -> Fetcher:
        """Return a fetcher for the files of a directory; *borrow* opens them in place of the store."""

        async def open_source(path: str) -> Source:
            return await self.store.source(location.below(path))

        return Fetcher(
            borrow or open_source,
            loads=self.loads,
            runtime=self.runtime,
            at_a_time=self.at_a_time,
            url=location.url,
        )


class _Borrowed:
    """A file that `aclose` leaves open."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.nbytes = source.nbytes
        self.max_concurrent_reads = source.max_concurrent_reads

    async def read_into(self, start: int, *targets: memoryview) -> None:
        """Fill *targets*."""
        await self._source.read_into(start, *targets)

    async def aclose(self) -> None:
        """Do nothing."""
