"""The real service under random programs of several threads, against a model of order per location (O1, O2, O3, D4)."""

from __future__ import annotations

import threading
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from async_ckpt import Handle, State
from async_ckpt.events import Cancelled, Durable, Event, Removed, Superseded
from async_ckpt.testing import Fault, Gate
from tests.support import PATIENCE_SECONDS, Harness, number_of, state

PATHS = [f"memory://{name}" for name in "abcde"]
THREADS = 3
ENDS = (Durable, Removed, Cancelled, Superseded)


class Threads(RuleBasedStateMachine):
    """Three threads, each with paths of its own, save, remove and load; storage stops and goes on.

    The order of one path is that of its thread, so the model is a dict.
    """

    @initialize(
        depth=st.integers(1, 4),
        concurrent=st.integers(1, 3),
        overflow=st.sampled_from(["block", "supersede"]),
    )
    def begin(self, depth: int, concurrent: int, overflow: str) -> None:
        self.harness = Harness(
            memory=True,
            queue_depth=depth,
            max_concurrent_saves=concurrent,
            overflow=overflow,
            memory_limit=20_000,
        )
        self.threads = [ThreadPoolExecutor(1) for _ in range(THREADS)]
        self.expected: dict[str, int | None] = dict.fromkeys(PATHS)
        self.handles: list[Future[Handle]] = []
        self.loads: list[tuple[Future[float | None], int | None]] = []
        self.gates: list[Gate] = []
        self.number = 0

    @rule(path=st.sampled_from(PATHS), nbytes=st.sampled_from([4096, 8192, 30_000]))
    def save(self, path: str, nbytes: int) -> None:
        self.number += 1
        self.expected[path] = self.number
        self.handles.append(
            self._on(path).submit(self.harness.service.save, state(self.number, nbytes=nbytes), path)
        )

    @rule(path=st.sampled_from(PATHS))
    def remove(self, path: str) -> None:
        self.expected[path] = None
        self.handles.append(self._on(path).submit(self.harness.service.remove, path))

    @rule(path=st.sampled_from(PATHS))
    def load(self, path: str) -> None:
        self.loads.append((self._on(path).submit(partial(self._load, path)), self.expected[path]))

    @rule(operation=st.sampled_from(["begin", "put", "commit", "delete"]))
    def stop_storage(self, operation: str) -> None:
        gate = Gate()
        self.gates.append(gate)
        self.harness.store.add(Fault(operation=operation, gate=gate))  # type: ignore[arg-type]

    @rule()
    def let_storage_go_on(self) -> None:
        for gate in self.gates:
            gate.open()
        self.gates.clear()

    def teardown(self) -> None:
        """Compare with the model once everything has ended."""
        if not hasattr(self, "harness"):
            return
        self.let_storage_go_on()
        try:
            loads = [(load.result(PATIENCE_SECONDS), expected) for load, expected in self.loads]
            handles = [handle.result(PATIENCE_SECONDS) for handle in self.handles]
            self.harness.service.wait()
            assert all(load == expected for load, expected in loads), loads
            assert {path: self._load(path) for path in PATHS} == self.expected
            self._check_ends(handles)
        finally:
            for thread in self.threads:
                thread.shutdown()
            self.harness.service.close()

    def _check_ends(self, handles: list[Handle]) -> None:
        """Every handle has ended, in the one way that its last event tells (D4)."""
        final = {State.DURABLE, State.REMOVED, State.CANCELLED, State.SUPERSEDED}
        assert {handle.state for handle in handles} <= final
        ends: dict[int, list[Event]] = defaultdict(list)
        for event in self.harness.events:
            if isinstance(event, ENDS):
                ends[event.request_id].append(event)
        assert sorted(len(events) for events in ends.values()) == [1] * len(handles)

    def _on(self, path: str) -> ThreadPoolExecutor:
        return self.threads[PATHS.index(path) % THREADS]

    def _load(self, path: str) -> float | None:
        try:
            return number_of(self.harness.service.load(path))
        except FileNotFoundError:
            return None


TestThreads = Threads.TestCase
TestThreads.settings = settings(settings.default, max_examples=max(10, settings.default.max_examples // 2))


def test_threads_on_the_same_paths() -> None:
    """Three threads save 200 checkpoints to five paths while a fourth removes and loads them.

    Whatever takes effect on a path does so in the order of acceptance (O1); every load gives one whole checkpoint
    of its path, or none (D2); every request ends exactly once (D4).
    """
    with Harness(memory=True, queue_depth=4, max_concurrent_saves=3) as harness:
        saved: dict[str, set[float]] = {path: set() for path in PATHS}
        handles: list[Handle] = []
        saving = [True] * 3

        def save(thread: int) -> None:
            try:
                for number in range(thread, 200, 3):
                    path = PATHS[number % 5]
                    saved[path].add(number)
                    handles.append(harness.service.save(state(number), path))
            finally:
                saving[thread] = False

        def remove_and_load() -> int:
            loaded = 0
            while any(saving):
                for path in PATHS:
                    handles.append(harness.service.remove(path))
                    try:
                        assert number_of(harness.service.load(path)) in saved[path]
                        loaded += 1
                    except FileNotFoundError:
                        continue
            return loaded

        with ThreadPoolExecutor(4) as pool:
            work = [pool.submit(remove_and_load), *[pool.submit(save, thread) for thread in range(3)]]
            for each in work:
                each.result(60)
        harness.service.wait()

        assert harness.memory is not None
        effects: dict[str, list[int]] = defaultdict(list)
        ended: dict[int, int] = defaultdict(int)
        for event in harness.events:
            if isinstance(event, ENDS):
                ended[event.request_id] += 1
            if isinstance(event, Durable | Removed):
                effects[event.url].append(event.request_id)
        assert all(order == sorted(order) for order in effects.values())
        assert set(ended.values()) == {1}
        assert len(ended) == len(handles)
        assert {handle.state for handle in handles} <= {State.DURABLE, State.REMOVED, State.CANCELLED}
        assert threading.active_count() < 20
