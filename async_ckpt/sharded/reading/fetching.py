"""Fetches ranges of many files, several at a time, some of them straight into the caller's memory.

Guarantees: the memory for all other ranges is bounded; ranges that are close together in a file become one request
(B2). Requests end when their service is closed or their caller stops waiting. The caller's memory stays alive for a
read that storage does not answer.

What does not belong here: what the bytes mean.
"""

from __future__ import annotations

import queue
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import anyio

from async_ckpt.engine.loading import Loads
from async_ckpt.engine.loop_task import LoopTask
from async_ckpt.engine.runtime import Runtime
from async_ckpt.errors import CorruptCheckpointError
from async_ckpt.stores.base import Source

__all__ = ["BLOCK_BYTES", "Fetcher", "Request", "Segment", "plan_requests"]

BLOCK_BYTES = 8 << 20
"""The longest segment that a caller should ask for without giving memory for it."""

_ROOM_BYTES = 48 << 20  # for all such segments that are being fetched or not used yet
_WIDEST_GAP_BYTES = 64 << 10  # fetching these bytes costs less than another request
_LONGEST_BYTES = 32 << 20
_LEAST_BYTES = 4 << 20


@dataclass(slots=True, kw_only=True, eq=False)
class Segment:
    """A range of a file to fetch.

    Attributes:
        path: the path of the file.
        start: its first byte.
        nbytes: its length.
        memory: where the bytes go. If it is None, the request provides memory until the next one is asked for.
        alone: whether that memory must not be shared with other segments, so that it is aligned.
        owner: the object that uses the bytes.
        what: what the owner knows them by.
    """

    path: str
    start: int
    nbytes: int
    memory: memoryview | None = None
    alone: bool = False
    owner: Any = None
    what: Any = None

    @property
    def stop(self) -> int:
        """Its end, exclusive."""
        return self.start + self.nbytes

    def cut(self, room: int) -> tuple[Segment, Segment]:
        """Split a segment that has memory after *room* bytes."""
        assert self.memory is not None
        common = {"path": self.path, "owner": self.owner, "what": self.what}
        return (
            Segment(start=self.start, nbytes=room, memory=self.memory[:room], **common),
            Segment(start=self.start + room, nbytes=self.nbytes - room, memory=self.memory[room:], **common),
        )


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """One range of a file.

    Attributes:
        path: the path of the file.
        start: its first byte.
        stop: its end, exclusive.
        segments: the segments in it, in order.
        aside_nbytes: how much memory it allocates.
    """

    path: str
    start: int
    stop: int
    segments: list[Segment] = field(default_factory=list)
    aside_nbytes: int = 0

    def add(self, segment: Segment) -> None:
        """Extend it by *segment*, which begins at its end or a little later."""
        gap = segment.start - self.stop
        self.aside_nbytes += gap + (segment.nbytes if segment.memory is None else 0)
        self.segments.append(segment)
        self.stop = segment.stop

    def make_targets(self) -> list[memoryview]:
        """Return the memory for its bytes, in order, and give each segment its share."""
        targets: list[memoryview] = []
        at = self.start
        shared: list[tuple[int, Segment | None, int]] = []  # in the next buffer that several segments share

        def flush() -> None:
            if shared:
                memory = memoryview(bytearray(sum(nbytes for _, _, nbytes in shared)))
                for offset, segment, nbytes in shared:
                    if segment is not None:
                        segment.memory = memory[offset : offset + nbytes]
                targets.append(memory)
                shared.clear()

        def share(segment: Segment | None, nbytes: int) -> None:
            offset = shared[-1][0] + shared[-1][2] if shared else 0
            shared.append((offset, segment, nbytes))

        for segment in self.segments:
            if segment.start > at:
                share(None, segment.start - at)
            at = segment.stop
            if segment.memory is None and not segment.alone:
                share(segment, segment.nbytes)
                continue
            flush()
            if segment.memory is None:
                segment.memory = memoryview(bytearray(segment.nbytes))
            targets.append(segment.memory)
        flush()
        return targets


def plan_requests(segments: Iterable[Segment], *, at_a_time: int, first: int = 0) -> list[Request]:
    """Return the requests that fetch *segments*.

    Args:
        segments: the segments, in any order.
        at_a_time: how many requests will run at the same time.
        first: the number of the file to begin with, in the order of their names, so that ranks begin with different
            files.
    """
    by_path: dict[str, list[Segment]] = {}
    total = 0
    for segment in segments:
        by_path.setdefault(segment.path, []).append(segment)
        total += segment.nbytes
    longest = min(max(total // (2 * at_a_time), _LEAST_BYTES), _LONGEST_BYTES)
    paths = sorted(by_path)
    first = first % len(paths) if paths else 0
    requests: list[Request] = []
    for path in paths[first:] + paths[:first]:
        requests += _requests_of_file(
            sorted(by_path[path], key=lambda each: (each.start, each.stop)), longest
        )
    return requests


def _requests_of_file(segments: Sequence[Segment], longest: int) -> Iterator[Request]:
    request: Request | None = None
    for segment in segments:
        left = segment
        while True:
            if request is not None and not _takes(request, left, longest):
                yield request
                request = None
            if request is None:
                request = Request(path=left.path, start=left.start, stop=left.start)
            room = longest - (request.stop - request.start)
            if left.memory is None or left.nbytes <= room:
                request.add(left)
                break
            piece, left = left.cut(room)
            request.add(piece)
    if request is not None:
        yield request


def _takes(request: Request, segment: Segment, longest: int) -> bool:
    gap = segment.start - request.stop
    aside = request.aside_nbytes + gap + (segment.nbytes if segment.memory is None else 0)
    return (
        0 <= gap <= _WIDEST_GAP_BYTES
        and request.stop - request.start + gap < longest
        and aside <= BLOCK_BYTES
    )


class _Room:
    """A bound on the memory of requests; one that exceeds it alone runs alone. Used on the loop thread only."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._used = 0
        self._changed = anyio.Event()

    async def take(self, nbytes: int) -> None:
        """Wait until *nbytes* fit, and take them."""
        while self._used and self._used + nbytes > self._nbytes:
            await self._changed.wait()
        self._used += nbytes

    def give(self, nbytes: int) -> None:
        """Give *nbytes* back."""
        self._used -= nbytes
        self._changed.set()
        self._changed = anyio.Event()


class _File:
    """A file for which requests remain."""

    def __init__(self, path: str, requests: int) -> None:
        self.path = path
        self.left = requests
        self.lock = anyio.Lock()
        self.source: Source | None = None
        self.turns: anyio.CapacityLimiter | None = None


class Fetcher:
    """Fetches from one directory, or one file.

    Args:
        open_source: opens a file by its path in the directory.
        loads: the loads of the service.
        runtime: runs the requests.
        at_a_time: how many requests may run at the same time.
        url: the location, for messages.
    """

    def __init__(
        self,
        open_source: Callable[[str], Awaitable[Source]],
        *,
        loads: Loads,
        runtime: Runtime,
        at_a_time: int,
        url: str,
    ) -> None:
        self._open_source = open_source
        self._loads = loads
        self._runtime = runtime
        self._url = url
        self.at_a_time = at_a_time

    def fetch(self, requests: Sequence[Request]) -> Iterator[Request]:
        """Yield the requests as they are answered, in any order. Asking for the next one frees the memory of the last.

        Raises:
            CorruptCheckpointError: a file is missing, or too short.
            StoreError: it cannot be read.
        """
        if not requests:
            return
        answered: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        run = _Run(requests, answered, self._open_source, self.at_a_time, self._url)
        task = LoopTask(self._runtime, run)
        with self._loads.held(task):
            task.outcome.add_done_callback(partial(answered.put, None))
            task.start()
            while (request := answered.get()) is not None:
                yield request
                for segment in request.segments:
                    segment.memory = None
                self._runtime.post(run.room.give, request.aside_nbytes)
            task.outcome.result()


class _Run:
    """One `Fetcher.fetch` on the loop thread."""

    def __init__(
        self,
        requests: Sequence[Request],
        answered: queue.SimpleQueue[Request | None],
        open_source: Callable[[str], Awaitable[Source]],
        at_a_time: int,
        url: str,
    ) -> None:
        self.room: _Room  # made on the loop, as it is awaited there
        self._files: dict[str, _File]
        self._requests = requests
        self._answered = answered
        self._open_source = open_source
        self._at_a_time = at_a_time
        self._url = url
        self._errors: list[Exception] = []

    async def __call__(self) -> None:
        self.room = _Room(_ROOM_BYTES)
        counts = Counter(request.path for request in self._requests)
        self._files = {path: _File(path, count) for path, count in counts.items()}
        remaining = iter(self._requests)
        try:
            async with anyio.create_task_group() as group:
                for _ in range(min(self._at_a_time, len(self._requests))):
                    group.start_soon(self._keep_reading, remaining, group.cancel_scope)
        finally:
            with anyio.CancelScope(shield=True):
                for file in self._files.values():
                    if file.source is not None:
                        await file.source.aclose()
        if self._errors:
            raise self._errors[0]

    async def _keep_reading(self, remaining: Iterator[Request], scope: anyio.CancelScope) -> None:
        try:
            for request in remaining:
                await self.room.take(request.aside_nbytes)
                await self._read(self._files[request.path], request)
                self._answered.put(request)
        except Exception as error:
            self._errors.append(error)
            scope.cancel()

    async def _read(self, file: _File, request: Request) -> None:
        source = await self._source(file)
        if request.stop > source.nbytes:
            raise self._corrupt(f"{file.path!r} has {source.nbytes} bytes instead of at least {request.stop}")
        if file.turns is None:
            await source.read_into(request.start, *request.make_targets())
        else:
            async with file.turns:
                await source.read_into(request.start, *request.make_targets())
        file.left -= 1
        if not file.left:
            file.source = None
            await source.aclose()

    async def _source(self, file: _File) -> Source:
        async with file.lock:
            if file.source is None:
                try:
                    file.source = await self._open_source(file.path)
                except FileNotFoundError as error:
                    raise self._corrupt(f"{file.path!r} is missing") from error
                if file.source.max_concurrent_reads is not None:
                    file.turns = anyio.CapacityLimiter(file.source.max_concurrent_reads)
            return file.source

    def _corrupt(self, reason: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(
            f"{self._url!r} is incomplete: {reason}. Load an earlier checkpoint.",
            location=self._url,
            stage="read",
        )
