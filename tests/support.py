"""What several test files of the core share: a queue played by hand, stores in memory, rigs, scripts."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import AsyncGenerator, Iterable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch

import async_ckpt
from async_ckpt import CheckpointService, FlushTimeoutError
from async_ckpt.engine.queue import (
    Action,
    Admit,
    Cancel,
    Drop,
    Kind,
    Lane,
    Op,
    Phase,
    Queue,
    Refuse,
    Start,
    Supersede,
)
from async_ckpt.events import Event
from async_ckpt.handle import Handle
from async_ckpt.retry import RetryPolicy
from async_ckpt.stores import open_store
from async_ckpt.stores.base import Child, Content, Location, Part, Receipt, Workers
from async_ckpt.stores.local.store import LocalStore
from async_ckpt.testing import Fault, FaultyStore, Gate

#: An upper bound for what takes milliseconds; only a test that fails waits for so long.
PATIENCE_SECONDS = 20.0


# -- the queue, played by hand


def lane(depth: int = 10, *, concurrent: int = 1, overflow: str = "block") -> Lane:
    """Return one service's share of the queue."""
    return Lane(queue_depth=depth, max_concurrent_saves=concurrent, overflow=overflow)  # type: ignore[arg-type]


class Play:
    """A queue with a hand that carries out what it decides at once, and a budget for each lane.

    Attributes:
        actions: all that was decided, oldest first.
    """

    def __init__(self, limit: int = 10**9) -> None:
        self.queue = Queue()
        self.actions: list[Action] = []
        self._held: Counter[int] = Counter()  # by lane
        self._limit = limit
        self._ids = count(1)
        self._threads = count(1)  # every caller its own thread, where the test does not say

    def add(
        self,
        of: Lane,
        kind: Kind,
        key: str,
        *,
        thread: int = 0,
        nbytes: int = 0,
        group: str | None = None,
        target: str | None = None,
        through: tuple[str, ...] = (),
    ) -> Op:
        """Add an operation and let the queue decide."""
        phase = Phase.WAITING if kind is Kind.SAVE else Phase.QUEUED
        op = Op(
            id=next(self._ids),
            lane=of,
            kind=kind,
            key=key,
            phase=phase,
            thread=thread or -next(self._threads),
            nbytes=nbytes,
            group=group,
            target=target,
            through=through,
        )
        self.arrived(op)
        self.queue.add(op)
        self.settle()
        return op

    def arrived(self, op: Op) -> None:
        """Be told of an operation before the queue is; for those who watch."""

    def save(self, of: Lane, key: str, *, stage: bool = True, **more: Any) -> Op:
        """Add a save and, if it is admitted and *stage*, complete its snapshot."""
        op = self.add(of, Kind.SAVE, key, **more)
        if stage and op.phase is Phase.STAGING:
            self.stage(op)
        return op

    def remove(self, of: Lane, key: str, **more: Any) -> Op:
        """Add a removal."""
        return self.add(of, Kind.REMOVE, key, **more)

    def link(self, of: Lane, key: str, target: str, **more: Any) -> Op:
        """Add a link of *key* to *target*."""
        return self.add(of, Kind.LINK, key, target=target, **more)

    def load(self, of: Lane, key: str, **more: Any) -> Op:
        """Add a load."""
        return self.add(of, Kind.LOAD, key, **more)

    def stage(self, op: Op) -> None:
        """Complete the snapshot of an admitted save."""
        assert op.phase is Phase.STAGING, op
        op.phase = Phase.QUEUED
        self.settle()

    def end(self, op: Op, *, ok: bool = True) -> None:
        """End a running operation."""
        assert op.phase is Phase.RUNNING, op
        self._give_back(op)
        (self.queue.durable if ok else self.queue.failed)(op)
        self.settle()

    def withdraw(self, op: Op) -> None:
        """Let the caller of an operation go away."""
        self._give_back(op)
        self.queue.withdraw(op)
        self.settle()

    def settle(self) -> None:
        """Carry out whatever can be done."""
        while (action := self.queue.decide(self._fits)) is not None:
            self.actions.append(action)
            self.carry_out(action)

    def carry_out(self, action: Action) -> None:
        """Do to the records what the dispatcher does."""
        match action:
            case Admit(op):
                self._held[id(op.lane)] += op.nbytes
                op.phase = Phase.STAGING
            case Refuse(op) | Drop(op):
                self.queue.withdraw(op)
            case Supersede(op, by) | Cancel(op, by):
                self._give_back(op)
                self.queue.replaced(op, by)
            case Start(op):
                op.phase = Phase.RUNNING

    def _fits(self, op: Op, instead_of: Op | None) -> bool:
        others = self._held[id(op.lane)] - (instead_of.nbytes if instead_of is not None else 0)
        return others == 0 or others + op.nbytes <= self._limit

    def _give_back(self, op: Op) -> None:
        if op.kind is Kind.SAVE and op.phase is not Phase.WAITING:
            self._held[id(op.lane)] -= op.nbytes


# -- states and what became of them


def state(number: float, *, nbytes: int = 4096) -> dict[str, Any]:
    """Return a state that tells its number, whole or torn."""
    return {"number": number, "weights": torch.full((nbytes // 4,), float(number))}


def number_of(loaded: Any) -> float:
    """Return the number of a loaded state, after checking that it is whole."""
    assert (loaded["weights"] == loaded["number"]).all()
    return float(loaded["number"])


def number_at(path: Path) -> float:
    """Return the number of the checkpoint at *path*, which plain torch opens."""
    return number_of(torch.load(path, weights_only=True))


# -- stores


class MemoryStore:
    """A store that is a dict, so that thousands of saves take no time.

    Attributes:
        files: bytes of each path.
        log: what took effect, in order: ``("save", path)``, ``("remove", path)``.
    """

    repeats_parts = True

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.log: list[tuple[str, str]] = []

    async def begin(self, location: Location, nbytes: int) -> MemoryUpload:
        return MemoryUpload(self, location, nbytes)

    async def delete(self, location: Location) -> None:
        self.files.pop(location.path, None)
        self.log.append(("remove", location.path))

    async def exists(self, location: Location) -> bool:
        return location.path in self.files

    async def list(
        self, location: Location, *, starting_with: str = ""
    ) -> AsyncGenerator[Sequence[Child], None]:
        directory = f"{location.path}/"
        below = [path.removeprefix(directory) for path in self.files if path.startswith(directory)]
        found = {name: bool(rest) for name, _, rest in (path.partition("/") for path in below)}
        yield [
            Child(name=name, is_directory=deeper)
            for name, deeper in found.items()
            if name.startswith(starting_with)
        ]

    async def source(self, location: Location) -> MemorySource:
        if location.path not in self.files:
            raise FileNotFoundError(location.url)
        return MemorySource(self.files[location.path])

    async def aclose(self) -> None:
        return


class MemoryUpload:
    """One file on its way into the dict."""

    part_size = None
    max_concurrent_parts = None
    is_paced = False
    swept = ()

    def __init__(self, store: MemoryStore, location: Location, nbytes: int) -> None:
        self._store = store
        self._location = location
        self._bytes = bytearray(nbytes)

    async def put(self, part: Part, content: Content) -> Receipt:
        self._bytes[part.start : part.stop] = b"".join(content.read(part.start, part.stop))
        return Receipt(index=part.index)

    async def commit(self, receipts: Sequence[Receipt]) -> None:
        self._store.files[self._location.path] = bytes(self._bytes)
        self._store.log.append(("save", self._location.path))

    async def abort(self) -> None:
        return


class MemorySource:
    """Bytes, open for reading.

    Attributes:
        reads: what was read, in order: ``(start, stop)``.
    """

    max_concurrent_reads = None

    def __init__(self, data: bytes) -> None:
        self.nbytes = len(data)
        self.reads: list[tuple[int, int]] = []
        self._data = data

    async def read_into(self, start: int, *targets: memoryview) -> None:
        for target in targets:
            assert 0 <= start <= self.nbytes - target.nbytes
            self.reads.append((start, start + target.nbytes))
            target[:] = self._data[start : start + target.nbytes]
            start += target.nbytes

    async def aclose(self) -> None:
        return


class Harness:
    """A service whose store has faults and whose events are kept.

    Args:
        *faults: what befalls the store.
        memory: keep the files in a dict instead of on disk.
        real: keep them where their URL says, object stores included.
        **options: of the service.

    Attributes:
        events: all events, oldest first.
        store: the faulty store; there once the service has been used.
    """

    def __init__(self, *faults: Fault, memory: bool = False, real: bool = False, **options: Any) -> None:
        self.events: list[Event] = []
        # A server that is slow to answer is asked again before the test has lost its patience.
        retry = RetryPolicy(stall_seconds=PATIENCE_SECONDS / 4)
        real_options: dict[str, Any] = {"storage_options": options.get("storage_options"), "retry": retry}
        self._real = real_options if real else None
        self.memory = MemoryStore() if memory else None
        self.store = FaultyStore(self.memory or _NoStore(), faults)
        self._faults = faults
        options.setdefault("observer", self.events.append)
        options.setdefault("durability", "process")
        options.setdefault("flush_timeout", PATIENCE_SECONDS)
        self.service = CheckpointService(store_factory=self._make, **options)

    def _make(self, location: Location, workers: Workers) -> FaultyStore:
        if self._real is not None:
            self.store = FaultyStore(open_store(location, workers=workers, **self._real), self._faults)
        elif self.memory is None:
            self.store = FaultyStore(LocalStore(workers=workers, durability="process"), self._faults)
        return self.store

    def names(self, url: object = None) -> list[str]:
        """Return the names of the events, of one URL if it is given."""
        return [type(e).__name__ for e in list(self.events) if url is None or e.url == str(url)]

    def __enter__(self) -> Harness:
        return self

    def __exit__(self, *error: object) -> None:
        for fault in self._faults:
            if fault.gate is not None:
                fault.gate.open()
        self.service.close()


class _NoStore(MemoryStore):
    """In place of the store that is not made yet."""


def gated(operation: Any = "begin", calls: Iterable[int] | None = None) -> tuple[Gate, Fault]:
    """Return a gate, and the fault that holds calls of *operation* at it."""
    gate = Gate()
    return gate, Fault(operation=operation, gate=gate, calls=None if calls is None else tuple(calls))


def reached(gate: Gate) -> None:
    """Wait until somebody has come to the gate."""
    assert gate.reached.wait(PATIENCE_SECONDS), "nobody came"


# -- processes


def python(
    code: str | Path, *arguments: object, timeout: float = 60.0, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run *code*, text or a file, in a fresh interpreter to its end."""
    process = start_python(code, *arguments, **options)
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException:
        process.kill()
        process.communicate()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def complaints(done: subprocess.CompletedProcess[str]) -> str:
    """Return what a process wrote to stderr, but for the word of a slow machine that the exit waits for saves."""
    lines = done.stderr.splitlines(keepends=True)
    return "".join(line for line in lines if not line.endswith("Ctrl-C gives up\n"))


def start_python(code: str | Path, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    """Start *code*, text or a file, in a fresh interpreter that finds this package and ``tests``."""
    script = [str(code)] if isinstance(code, Path) else ["-c", textwrap.dedent(code)]
    roots = [str(Path(async_ckpt.__file__).parents[1]), str(Path(__file__).parents[1])]
    roots += filter(None, [os.environ.get("PYTHONPATH")])  # another Lightning, in tox
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(roots), **options.pop("env", {})}
    return subprocess.Popen(
        [sys.executable, *script, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


def accepted(service: CheckpointService, what: Any, url: object) -> Handle:
    """Save, again where a *flush_timeout* that is short for the sake of a later wait was too short for this one."""
    while True:
        try:
            return service.save(what, str(url))
        except FlushTimeoutError:
            continue


def wait_until_one_waits(service: CheckpointService, kind: Kind = Kind.SAVE) -> None:
    """Return once some thread's save waits for admission, or its load for its turn.

    It asks the loop again and again, so it is a thread's job.
    """
    while not one_waits(service, kind):
        pass


def one_waits(service: CheckpointService, kind: Kind) -> bool:
    """Tell whether some thread's save waits for admission, or its load for its turn."""
    runtime = service._resources.held()
    assert runtime is not None
    live = runtime.call(lambda: [(op.kind, op.phase) for op in runtime.dispatcher._queue._ops.values()])
    return (kind, Phase.WAITING if kind is Kind.SAVE else Phase.QUEUED) in live
