"""Two saves of the same bytes at a time, as ``ModelCheckpoint(save_last=True)`` makes them: one memory serves both."""

from __future__ import annotations

import io
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import async_ckpt
from async_ckpt import AbandonedError, CancelledSaveError, MemoryLimitError, StoreError, SupersededError
from async_ckpt.engine.queue import Kind, Phase
from async_ckpt.engine.writers import DelegatingWriter
from async_ckpt.events import Accepted
from async_ckpt.stores import locate
from async_ckpt.testing import Fault
from tests.integration.test_signals import OURS, at_line, handling, walk
from tests.support import PATIENCE_SECONDS, Harness, gated, one_waits, reached, wait_until_one_waits

pytestmark = pytest.mark.integration

MIB = 1 << 20
#: Room for one snapshot of `weights`, and not for two.
ROOM = 3 * MIB
#: What a caller goes through while it borrows memory.
SNAPSHOT = Path(async_ckpt.__file__).parent / "snapshot"
WALKED = OURS | {str(SNAPSHOT / name) for name in ("capture.py", "sharing.py")}


def weights(number: float = 1.0) -> dict[str, torch.Tensor]:
    """Return what takes most of the limit."""
    return {
        "a": torch.full((MIB // 4,), number),
        "b": torch.full((MIB // 4,), number),
        "c": torch.tensor(number),
    }


def dumped(bulk: dict[str, torch.Tensor], last_model_path: str) -> dict[str, Any]:
    """Return a state as Lightning dumps one: built anew at each call, over the same memory."""
    return {"callbacks": {"last_model_path": last_model_path}, "state_dict": dict(bulk)}


def written(state: Any) -> bytes:
    """Return what a synchronous save writes."""
    torch.save(state, file := io.BytesIO())
    return file.getvalue()


def needs(harness: Harness, url: str) -> list[int]:
    """Return the memory that the saves of *url* were given for themselves."""
    return [e.nbytes for e in list(harness.events) if isinstance(e, Accepted) and e.url == url]


def test_the_second_save_needs_no_memory() -> None:
    """Beside a save that is being written, one of the same bytes is accepted where there is memory for one (B1).

    Both files equal synchronous ones, though the weights change at once; once both are durable, the memory is free.
    """
    gate, hold = gated(calls=[1])
    bulk = weights()
    with Harness(hold, memory=True, queue_depth=5, memory_limit=ROOM, overflow="raise") as harness:
        assert harness.memory is not None
        states = [dumped(bulk, ""), dumped(bulk, "memory://top"), dumped(bulk, "memory://other")]
        expected = [written(state) for state in states]
        urls = ["memory://top", "memory://last", "memory://third"]
        harness.service.save(states[0], urls[0])
        reached(gate)
        harness.service.save(states[1], urls[1])
        harness.service.save(states[2], urls[2])
        bulk["a"].zero_()
        with pytest.raises(MemoryLimitError):
            harness.service.save(dumped(bulk, ""), "memory://changed")
        gate.open()
        harness.service.wait()
        assert [harness.memory.files[locate(url).path] for url in urls] == expected
        assert [needs(harness, url)[0] > 0 for url in urls] == [True, False, False]
        harness.service.save(dumped(bulk, ""), "memory://changed").wait()


@pytest.mark.parametrize(
    "change",
    [
        lambda bulk: bulk["a"].data.__setitem__(7, 5.0),
        lambda bulk: bulk["b"].numpy().__setitem__(-9, 5.0),
        lambda bulk: bulk["c"].untyped_storage().__setitem__(3, 1),
    ],
    ids=["through data", "through a numpy alias", "the last byte"],
)
def test_a_change_between_the_two_is_written(change: Callable[[Any], object]) -> None:
    """Whatever a hook writes between the two saves, by ways that torch does not count, is in the second file (S1)."""
    gate, hold = gated(calls=[1])
    bulk = weights()
    with Harness(hold, memory=True, queue_depth=5) as harness:
        assert harness.memory is not None
        first = dumped(bulk, "")
        expected = [written(first)]
        harness.service.save(first, "memory://top")
        reached(gate)
        change(bulk)
        second = dumped(bulk, "memory://top")
        expected.append(written(second))
        harness.service.save(second, "memory://last")
        gate.open()
        harness.service.wait()
        files = harness.memory.files
        assert [files[locate(url).path] for url in ("memory://top", "memory://last")] == expected
        assert needs(harness, "memory://last")[0] > 2 * MIB


@pytest.mark.parametrize("end", ["failed", "superseded", "cancelled"])
def test_the_second_outlives_the_first(end: str) -> None:
    """Where the save whose memory is shared fails, is superseded or cancelled, the second is written all the same."""
    gate, hold = gated(calls=[1])
    fails = Fault(operation="commit", calls=(2,), error=lambda: StoreError("no more room"))
    bulk = weights()
    faults = [hold, fails] if end == "failed" else [hold]
    with Harness(
        *faults, memory=True, queue_depth=4, memory_limit=ROOM + MIB // 2, overflow="supersede"
    ) as harness:
        assert harness.memory is not None
        harness.service.save({"small": torch.ones(10)}, "memory://before")
        reached(gate)
        first = harness.service.save(dumped(bulk, ""), "memory://top")
        state = dumped(bulk, "memory://top")
        expected = written(state)
        second = harness.service.save(state, "memory://last")
        bulk["a"].zero_()
        if end == "superseded":
            harness.service.save({"small": torch.ones(10)}, "memory://another")
            harness.service.save({"small": torch.ones(20)}, "memory://top")
        elif end == "cancelled":
            harness.service.remove("memory://top")
        gate.open()
        second.wait(PATIENCE_SECONDS)
        kinds = {"failed": StoreError, "superseded": SupersededError, "cancelled": CancelledSaveError}
        with pytest.raises(kinds[end]):
            first.wait(PATIENCE_SECONDS)
        harness.service.wait()
        assert harness.memory.files[locate("memory://last").path] == expected
        assert needs(harness, "memory://last") == [0]
        harness.service.save(dumped(bulk, ""), "memory://next").wait(PATIENCE_SECONDS)


def test_superseding_one_of_two_makes_no_room() -> None:
    """A save that would need the memory of a queued one does not get past the limit while another shares that (B1)."""
    gate, hold = gated(calls=[1])
    bulk = weights()
    with (
        ThreadPoolExecutor(1) as another_thread,
        Harness(hold, memory=True, queue_depth=5, memory_limit=ROOM, overflow="supersede") as harness,
    ):
        harness.service.save({"small": torch.ones(10)}, "memory://before")
        reached(gate)
        harness.service.save(dumped(bulk, ""), "memory://top")
        harness.service.save(dumped(bulk, "memory://top"), "memory://last")
        new = another_thread.submit(harness.service.save, dumped(weights(2.0), ""), "memory://top")
        while not one_waits(harness.service, Kind.SAVE):
            assert not new.done()
        gate.open()
        new.result(PATIENCE_SECONDS).wait(PATIENCE_SECONDS)
        assert harness.names("memory://top").count("Durable") == 2
        assert "Superseded" not in harness.names()


def test_closing_gives_up_both() -> None:
    """A service that is closed at its deadline while two saves share memory ends each of them once (D4)."""
    gate, hold = gated(calls=[1])
    bulk = weights()
    with Harness(hold, memory=True, queue_depth=5, abandon_grace_seconds=0.1) as harness:
        handles = [harness.service.save(dumped(bulk, name), f"memory://{name}") for name in ("top", "last")]
        reached(gate)
        with pytest.raises(async_ckpt.FlushError) as caught:
            harness.service.close(timeout=0)
    assert [type(error) for error in caught.value.exceptions] == [AbandonedError, AbandonedError]
    assert all(handle.done() for handle in handles)
    assert needs(harness, "memory://last") == [0]


def test_a_base_shares_with_nobody() -> None:
    """A base CheckpointIO may change the state that it is given, so it shares memory with no other save."""
    bulk = weights()
    gate, hold = gated(calls=[1])
    given: list[Any] = []
    with Harness(hold, memory=True, queue_depth=5) as harness:
        entered, leave = threading.Event(), threading.Event()

        def save(state: Any) -> None:
            given.append(state)
            entered.set()
            assert leave.wait(PATIENCE_SECONDS)

        writer = DelegatingWriter(
            save=save,
            delete=lambda: None,
            group="base",
            workers=harness.service.workers(),
            durability="process",
        )
        harness.service.submit(dumped(bulk, ""), locate("memory://top"), writer)
        assert entered.wait(PATIENCE_SECONDS)
        harness.service.save(dumped(bulk, ""), "memory://last")
        harness.service.submit(dumped(bulk, ""), locate("memory://base"), writer)
        given[0]["state_dict"]["a"].zero_()
        leave.set()
        gate.open()
        harness.service.wait()
        assert min(needs(harness, f"memory://{name}")[0] for name in ("top", "last", "base")) > 2 * MIB
        assert torch.equal(harness.service.load("memory://last")["state_dict"]["a"], bulk["a"])
        given.clear()


def two_wait(service: async_ckpt.CheckpointService, or_else: threading.Event) -> None:
    """Return once two saves wait for admission, or *or_else* is set."""
    runtime = service._resources.held()
    assert runtime is not None
    waiting = 0
    while waiting < 2 and not or_else.is_set():
        ops = runtime.call(lambda: list(runtime.dispatcher._queue._ops.values()))
        waiting = sum(1 for op in ops if op.phase is Phase.WAITING)


def test_who_waits_for_the_memory_gets_it_first() -> None:
    """A save that comes to wait for the memory which another is about to share is not kept from it by that one.

    Else it would wait for that one, and that one, behind it, for it.
    """
    bulk, changed = weights(), weights(2.0)

    def step(line: int) -> list[str]:
        gate, hold = gated(calls=[1])
        with Harness(hold, memory=True, queue_depth=5, memory_limit=ROOM) as harness:
            harness.service.save(dumped(bulk, ""), "memory://top")
            reached(gate)
            returned = threading.Event()

            def open_in_time() -> None:
                two_wait(harness.service, returned)
                gate.open()

            other = threading.Thread(
                target=harness.service.save, args=(dumped(changed, ""), "memory://other")
            )
            opener = threading.Thread(target=open_in_time)

            def come() -> None:
                other.start()
                wait_until_one_waits(harness.service)
                opener.start()

            with at_line(line, come, {str(SNAPSHOT / "sharing.py")}) as where:
                handle = harness.service.save(dumped(bulk, "memory://top"), "memory://last")
            returned.set()
            gate.open()
            handle.wait(PATIENCE_SECONDS)
            if where:
                opener.join(PATIENCE_SECONDS)
                other.join(PATIENCE_SECONDS)
                harness.service.wait(PATIENCE_SECONDS)
                assert harness.names("memory://other").count("Durable") == 1
            return where

    assert walk(step) > 30


def test_a_handler_may_save_at_every_line_of_a_save_that_shares() -> None:
    """A handler that interrupts the comparison gets its own save through, though the memory is held beneath it (L1)."""
    bulk = weights()

    def step(line: int) -> list[str]:
        gate, hold = gated(calls=[1])
        with Harness(hold, memory=True, queue_depth=4, memory_limit=ROOM) as harness:
            harness.service.save(dumped(bulk, ""), "memory://top")
            reached(gate)

            def handler() -> None:
                gate.open()
                harness.service.save(dumped(weights(3.0), ""), "memory://handler").wait(PATIENCE_SECONDS)

            with (
                handling(signal.SIGUSR1, handler),
                at_line(line, lambda: signal.raise_signal(signal.SIGUSR1), WALKED) as where,
            ):
                handle = harness.service.save(dumped(bulk, "memory://top"), "memory://last")
            gate.open()
            handle.wait(PATIENCE_SECONDS)
            return where

    assert walk(step) > 60


def test_an_interrupted_sharer_holds_nothing() -> None:
    """Whichever line of a save that shares Ctrl-C interrupts, the memory is free once the first is durable (B1)."""
    bulk, changed = weights(), weights(2.0)

    def interrupt() -> None:
        raise KeyboardInterrupt

    def step(line: int) -> list[str]:
        gate, hold = gated(calls=[1])
        with Harness(hold, memory=True, queue_depth=4, memory_limit=ROOM) as harness:
            first = harness.service.save(dumped(bulk, ""), "memory://top")
            reached(gate)
            where: list[str] = []
            try:
                with at_line(line, interrupt, WALKED) as where:
                    harness.service.save(dumped(bulk, "memory://top"), "memory://last")
            except KeyboardInterrupt:
                pass
            gate.open()
            first.wait(PATIENCE_SECONDS)
            harness.service.wait(PATIENCE_SECONDS)
            with ThreadPoolExecutor(1) as another_thread:
                another_thread.submit(harness.service.save, dumped(changed, ""), "memory://next").result()
            return where

    assert walk(step) > 60
