"""Reads an object of Google Cloud Storage.

Guarantees: every byte is of the generation that was opened; once that is gone, reading raises a ``StoreError``. Bytes
go from the connection straight into the reader's memory, and an interrupted range is resumed, not begun again (E3).
"""

from __future__ import annotations

import errno

from async_ckpt.errors import StoreError, TransientStoreError
from async_ckpt.stores.base import Location
from async_ckpt.stores.gcs.client import Client, Target
from async_ckpt.stores.requests import Pace, Requests, stall_timeout
from async_ckpt.stores.scatter import Scatter

__all__ = ["GCSSource"]


class GCSSource:
    """One object; see ``stores.base.Source``. Made by ``GCSStore.source``.

    Args:
        location: for messages.
        target: the object, with its generation.
        nbytes: the object's length.
        client: makes the requests.
        requests: times and repeats requests.
        pace: limits the requests that carry data.
    """

    max_concurrent_reads: int | None = None

    def __init__(
        self,
        location: Location,
        target: Target,
        nbytes: int,
        *,
        client: Client,
        requests: Requests,
        pace: Pace,
    ) -> None:
        self.nbytes = nbytes
        self._location = location
        self._target = target
        self._client = client
        self._requests = requests
        self._pace = pace

    async def read_into(self, start: int, *targets: memoryview) -> None:
        """Fill *targets* with a range of the object."""
        scatter = Scatter(targets)

        async def go_on() -> None:
            first = start + scatter.done
            last = first + scatter.left - 1
            async with self._pace.turn():
                with (
                    self._requests.translating("read", self._location),
                    stall_timeout(self._requests.stall_seconds) as moved,
                ):
                    span = f"bytes={first}-{last}"
                    async with self._client.open(
                        "GET",
                        self._target.path,
                        root="download/storage/v1",
                        params={"alt": "media", "generation": self._target.generation},
                        # Nothing may be decompressed on the way: the range counts stored bytes.
                        headers={"Range": span, "Accept-Encoding": "identity"},
                    ) as response:
                        expected = f"bytes {first}-{last}/{self.nbytes}"
                        if response.headers.get("Content-Range") != expected:
                            raise self._error("the server did not answer with the range it was asked for")
                        async for data in response.content.iter_any():
                            moved()
                            scatter.take(data)
            if scatter.left:
                raise TransientStoreError.during("read", self._location.url, OSError("the answer broke off"))

        try:
            await self._requests.fill(scatter, go_on)
        except FileNotFoundError as error:
            raise self._error("it was replaced or deleted while it was read") from error

    async def aclose(self) -> None:
        """Do nothing: there is nothing to close."""

    def _error(self, reason: str) -> StoreError:
        return StoreError.during("read", self._location.url, OSError(errno.ESTALE, reason))
