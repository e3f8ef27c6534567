"""Ranges of many files, several at a time, some straight into memory that is given.

Guarantees: what is fetched beside that memory is bounded; ranges that are near each other in a file are one request
(B2). What is under way ends with its service, and with who waits for it. Memory that is given is kept alive for a read
that storage holds up.

What does not belong here: what the bytes are.
"""

from __future__ import annotations

import queue
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import anyio

from async_ckpt.engine.errand import Errand
from async_ckpt.engine.loading import Loads
from async_ckpt.engine.runtime import Runtime
from async_ckpt.errors import CorruptCheckpointError
from async_ckpt.stores.base import Source

__all__ = ["BLOCK_BYTES", "Fetcher", "Request", "Segment", "plan_requests"]

BLOCK_BYTES = 8 << 20
"""How much a segment that has no memory of its own should be at most."""

_ROOM_BYTES = 48 << 20  # for all such segments that are under way, or have come and are not used yet
_WIDEST_GAP_BYTES = 64 << 10  # to read over it costs less than another request
_LONGEST_BYTES = 32 << 20
_LEAST_BYTES = 4 << 20


@dataclass(slots=True, kw_only=True, eq=False)
class Segment:
    """Bytes of a file that somebody wants.

    Attributes:
        path: of the file.
        start: where they begin.
        nbytes: how many they are.
        memory: where they go; None lets the request have memory for them, as long as it lasts.
        alone: that memory is to be its own, and with that aligned.
        owner: who wants them.
        what: what they are to the owner.
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
        """Where they end."""
        return self.start + self.nbytes

    def cut(self, room: int) -> tuple[Segment, Segment]:
        """Return the first *room* bytes and the rest, of a segment with memory."""
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
        path: of the file.
        start: where it begins.
        stop: where it ends.
        segments: what is wanted of it, in order.
        aside_nbytes: how much memory it takes of its own.
    """

    path: str
    start: int
    stop: int
    segments: list[Segment] = field(default_factory=list)
    aside_nbytes: int = 0

    def add(self, segment: Segment) -> None:
        """Have it cover *segment* as well, which begins where it ends, or a little further on."""
        gap = segment.start - self.stop
        self.aside_nbytes += gap + (segment.nbytes if segment.memory is None else 0)
        self.segments.append(segment)
        self.stop = segment.stop

    def make_targets(self) -> list[memoryview]:
        """Return where the bytes go, one after the other, and give the segments what is theirs of that."""
        targets: list[memoryview] = []
        at = self.start
        shared: list[tuple[int, Segment | None, int]] = []  # in the next memory that several share

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
        segments: what is wanted, in any order.
        at_a_time: how many requests will be under way.
        first: with which of the files, in the order of their names, to begin; so that not everybody begins with one.
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
    """Memory for what is fetched aside; what is more than all of it has it alone. For one thread, the loop's."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._used = 0
        self._changed = anyio.Event()

    async def take(self, nbytes: int) -> None:
        """Wait for so much room."""
        while self._used and self._used + nbytes > self._nbytes:
            await self._changed.wait()
        self._used += nbytes

    def give(self, nbytes: int) -> None:
        """Give it back."""
        self._used -= nbytes
        self._changed.set()
        self._changed = anyio.Event()


class _File:
    """One file while requests for it are left."""

    def __init__(self, path: str, requests: int) -> None:
        self.path = path
        self.left = requests
        self.lock = anyio.Lock()
        self.source: Source | None = None
        self.turns: anyio.CapacityLimiter | None = None


class Fetcher:
    """Fetches from one directory, or one file.

    Args:
        open_source: opens a file by its path there.
        loads: what the service has under way.
        runtime: where everything awaits.
        at_a_time: how many requests may be under way.
        url: for messages.
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
        """Yield the requests as they are answered, in any order; when the next is asked for, one has been dealt with.

        Raises:
            CorruptCheckpointError: a file is not there, or too short.
            StoreError: it cannot be read.
        """
        if not requests:
            return
        answered: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        run = _Run(requests, answered, self._open_source, self.at_a_time, self._url)
        errand = Errand(self._runtime, run)
        with self._loads.held(errand):
            errand.outcome.add_done_callback(partial(answered.put, None))
            errand.start()
            while (request := answered.get()) is not None:
                yield request
                for segment in request.segments:
                    segment.memory = None
                self._runtime.post(run.room.give, request.aside_nbytes)
            errand.outcome.result()


class _Run:
    """The awaiting side of one `Fetcher.fetch`, on the loop thread."""

    def __init__(
        self,
        requests: Sequence[Request],
        answered: queue.SimpleQueue[Request | None],
        open_source: Callable[[str], Awaitable[Source]],
        at_a_time: int,
        url: str,
    ) -> None:
        self.room: _Room  # as everything that awaits, made on the loop
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
            raise self._corrupt(
                f"{file.path!r} has {source.nbytes} bytes, and should have {request.stop} at least"
            )
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
            f"{self._url!r} is no whole checkpoint: {reason}. Load an earlier one.",
            location=self._url,
            stage="read",
        )
