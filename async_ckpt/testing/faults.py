"""Stores and disks that fail, wait or crash where a test wants them to.

Guarantees: a fault affects exactly the calls with its numbers, counted per operation from 1, over all threads; all
other calls reach the real object unchanged.
"""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import threading
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, ParamSpec, TypeVar

import anyio

from async_ckpt.stores import open_store
from async_ckpt.stores.base import (
    Child,
    Content,
    Location,
    Part,
    Receipt,
    Source,
    Store,
    Upload,
    Workers,
    aborted_on_error,
)
from async_ckpt.stores.disk import Disk

__all__ = ["Fault", "FaultyDisk", "FaultyStore", "Gate", "crash", "slowed"]

P = ParamSpec("P")
T = TypeVar("T")

Operation = Literal["begin", "put", "commit", "abort", "delete", "exists", "list", "source", "read"]


def crash() -> NoReturn:
    """Kill this process at once, as a power loss or the kernel would; use it as a fault's ``error``."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


class Gate:
    """Blocks callers until a test, on any thread, opens it.

    Attributes:
        reached: set once a caller has reached the gate.
    """

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._lock = threading.Lock()
        self._is_open = False
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    def open(self) -> None:
        """Let all callers pass, now and later."""
        with self._lock:
            self._is_open = True
            waiting, self._waiting = self._waiting, []
        for loop, event in waiting:
            with suppress(RuntimeError):  # that loop has ended, and its waiter with it
                loop.call_soon_threadsafe(event.set)

    async def passage(self) -> None:
        """Wait until the gate is open."""
        event = asyncio.Event()
        with self._lock:
            if not self._is_open:
                self._waiting.append((asyncio.get_running_loop(), event))
            else:
                event.set()
        self.reached.set()
        await event.wait()


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A fault of some calls of one operation of a store; applied in this order: gate, delay, error.

    Attributes:
        operation: the operation.
        calls: the numbers of the affected calls, counted from 1; ``None`` affects every call.
        error: makes the exception to raise, such as an exception class.
        delay_seconds: how long to delay the call.
        gate: blocks the call until a test opens it.
        after: whether to apply the fault after the real call, so that only the answer is lost.
    """

    operation: Operation
    calls: Collection[int] | None = None
    error: Callable[[], BaseException] | None = None
    delay_seconds: float = 0.0
    gate: Gate | None = None
    after: bool = False


class FaultyStore:
    """A store with faults, around another store.

    Args:
        inner: the real store.
        faults: the faults; ``add`` adds more.
        sleep: awaits the delays of faults.

    Attributes:
        calls: the number of calls of each operation.
    """

    def __init__(
        self,
        inner: Store,
        faults: Iterable[Fault] = (),
        *,
        sleep: Callable[[float], Awaitable[object]] = anyio.sleep,
    ) -> None:
        self.calls: Counter[str] = Counter()
        self._inner = inner
        self._faults = list(faults)
        self._sleep = sleep
        self._lock = threading.Lock()

    def add(self, fault: Fault) -> None:
        """Add a fault; its numbers count from the store's first call on."""
        with self._lock:
            self._faults.append(fault)

    @property
    def repeats_parts(self) -> bool:
        """The real store's value."""
        return self._inner.repeats_parts

    async def begin(self, location: Location, nbytes: int) -> Upload:
        """Begin a file."""
        struck = self._strike("begin")
        await self._suffer(struck, after=False)
        upload = await self._inner.begin(location, nbytes)
        async with aborted_on_error(upload):
            await self._suffer(struck, after=True)
        return _FaultyUpload(upload, self)

    async def delete(self, location: Location) -> None:
        """Delete the file or directory."""
        await self.through("delete", self._inner.delete, location)

    async def exists(self, location: Location) -> bool:
        """Return whether the location exists."""
        return await self.through("exists", self._inner.exists, location)

    async def list(
        self, location: Location, *, starting_with: str = ""
    ) -> AsyncGenerator[Sequence[Child], None]:
        """Yield what is right below; a fault that strikes afterwards does so at the end."""
        struck = self._strike("list")
        await self._suffer(struck, after=False)
        async with aclosing(self._inner.list(location, starting_with=starting_with)) as pages:
            async for page in pages:
                yield page
        await self._suffer(struck, after=True)

    async def source(self, location: Location) -> Source:
        """Open the file for reading."""
        struck = self._strike("source")
        await self._suffer(struck, after=False)
        source = await self._inner.source(location)
        try:
            await self._suffer(struck, after=True)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await source.aclose()
            raise
        return _FaultySource(source, self)

    async def aclose(self) -> None:
        """Close the real store."""
        await self._inner.aclose()

    async def through(
        self, operation: Operation, function: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Call *function* with the faults of *operation* around it."""
        struck = self._strike(operation)
        await self._suffer(struck, after=False)
        result = await function(*args, **kwargs)
        await self._suffer(struck, after=True)
        return result

    def _strike(self, operation: Operation) -> Sequence[Fault]:
        with self._lock:
            self.calls[operation] += 1
            number = self.calls[operation]
            return [
                fault
                for fault in self._faults
                if fault.operation == operation and (fault.calls is None or number in fault.calls)
            ]

    async def _suffer(self, faults: Sequence[Fault], *, after: bool) -> None:
        for fault in faults:
            if fault.after is not after:
                continue
            if fault.gate is not None:
                await fault.gate.passage()
            if fault.delay_seconds:
                await self._sleep(fault.delay_seconds)
            if fault.error is not None:
                raise fault.error()


def slowed(seconds: float, **options: Any) -> Callable[[Location, Workers], Store]:
    """Slow every save down, like slow storage: ``AsyncCheckpointIO(store_factory=slowed(0.15))``.

    A test that passes with synchronous checkpoints, but not with this, reads a file before it is durable.

    Args:
        seconds: how much longer each save takes, before the file becomes visible.
        **options: as for ``async_ckpt.stores.open_store``; the service's options do not apply to its stores here.

    Returns:
        A ``store_factory``, which can be pickled.
    """
    return functools.partial(_open_slowed, seconds, options)


def _open_slowed(seconds: float, options: dict[str, Any], location: Location, workers: Workers) -> Store:
    fault = Fault(operation="commit", delay_seconds=seconds)
    return FaultyStore(open_store(location, workers=workers, **options), [fault])


class _FaultyUpload:
    """An upload around another; the store has the faults and the counters."""

    def __init__(self, inner: Upload, store: FaultyStore) -> None:
        self._inner = inner
        self._store = store

    @property
    def part_size(self) -> int | None:
        return self._inner.part_size

    @property
    def max_concurrent_parts(self) -> int | None:
        return self._inner.max_concurrent_parts

    @property
    def is_paced(self) -> bool:
        return self._inner.is_paced

    @property
    def swept(self) -> tuple[str, ...]:
        return self._inner.swept

    async def put(self, part: Part, content: Content) -> Receipt:
        return await self._store.through("put", self._inner.put, part, content)

    async def commit(self, receipts: Sequence[Receipt]) -> None:
        await self._store.through("commit", self._inner.commit, receipts)

    async def abort(self) -> None:
        await self._store.through("abort", self._inner.abort)


class _FaultySource:
    """A source around another; the store has the faults and the counters."""

    def __init__(self, inner: Source, store: FaultyStore) -> None:
        self._inner = inner
        self._store = store

    @property
    def nbytes(self) -> int:
        return self._inner.nbytes

    @property
    def max_concurrent_reads(self) -> int | None:
        return self._inner.max_concurrent_reads

    async def read_into(self, start: int, *targets: memoryview) -> None:
        await self._store.through("read", self._inner.read_into, start, *targets)

    async def aclose(self) -> None:
        await self._inner.aclose()


_OPENING = ("create", "open_direct", "open_existing", "open_in_place", "open_to_read", "duplicate")


class FaultyDisk(Disk):
    """A disk on which chosen system calls fail.

    Args:
        faults: by method of ``Disk``, the numbers of the failing calls and the errno; the number 0 stands for every
            call.
        after: whether to fail after the real call, so that only the answer is lost.

    Attributes:
        calls: the called methods, in order.
        open_descriptors: how many of its descriptors are open.
    """

    def __init__(self, faults: dict[str, tuple[int, int]] | None = None, *, after: bool = False) -> None:
        self.calls: list[str] = []
        self.open_descriptors = 0
        self._faults = faults or {}
        self._after = after
        self._count_lock = threading.Lock()

    def __getattribute__(self, name: str) -> Any:
        attribute = super().__getattribute__(name)
        if name.startswith("_") or name not in vars(Disk):
            return attribute

        def call(*args: Any, **kwargs: Any) -> Any:
            number = self._failure(name)
            if number and not self._after:
                raise OSError(number, os.strerror(number))
            result = attribute(*args, **kwargs)
            with self._count_lock:
                self.open_descriptors += name in _OPENING
                self.open_descriptors -= name == "close"
            if number:
                raise OSError(number, os.strerror(number))
            return result

        return call

    def _failure(self, name: str) -> int:
        with self._count_lock:
            self.calls.append(name)
            which, number = self._faults.get(name, (-1, 0))
            return number if which in (0, self.calls.count(name)) else 0
