"""How ranks talk through the store of their process group, and how they leave a fit, also when one of them does not.

Real: torch's TCPStore, with a connection for each rank, as torch makes one; where its host dies or stands still, it
is a process. All ranks are in this process, so that each line of theirs has its place.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed
from torch.testing._internal.distributed import fake_pg  # noqa: F401  # registers a backend without operations

from async_ckpt import AsyncCheckpointIO, FlushTimeoutError, RankError, StoreError
from async_ckpt.lightning.exit_barrier import ExitBarrier
from async_ckpt.lightning.group import GroupStore, UnreachableError, store_of_group
from async_ckpt.lightning.group_pending import GroupPending, pending_of_group
from async_ckpt.stores import open_store
from async_ckpt.stores.base import Location, Workers
from async_ckpt.telemetry.patience import Limit
from async_ckpt.testing import Fault, FaultyStore, Gate
from tests.support import PATIENCE_SECONDS, start_python

LONG = Limit.hard(PATIENCE_SECONDS)
NOW = Limit.hard(0.0)
ANSWER_SECONDS = 0.5
HOST = """
import sys, time, torch.distributed
store = torch.distributed.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=True, wait_for_workers=False)
print("up", flush=True)
sys.stdin.read()
"""


class Counted:
    """A connection that tells when so many calls have been made."""

    def __init__(self, store: Any, calls: int) -> None:
        self._store = store
        self._left = calls
        self.used = threading.Event()

    def __getattr__(self, name: str) -> Any:
        if name == "clone":
            raise AttributeError(name)  # as an older torch
        self._left -= 1
        if self._left == 0:
            self.used.set()
        return getattr(self._store, name)


def connection(port: int) -> Any:
    """Return a connection to a store as a process group has it."""
    store = torch.distributed.TCPStore(
        "127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=2)
    )
    return torch.distributed.PrefixStore("group", store)


def connect(port: int, rank: int, *, answer_seconds: float = PATIENCE_SECONDS) -> GroupPending:
    """Return what one of two ranks knows of what is pending, connected."""
    store = connection(port)
    group = GroupStore(store, rank=rank, world_size=2, answer_seconds=answer_seconds)
    group.ask(lambda store: None)
    return GroupPending(group)


@pytest.fixture
def ranks() -> Iterator[list[GroupPending]]:
    """Two ranks that can reach their store."""
    host = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    both = [connect(host.port, rank) for rank in (0, 1)]
    yield both
    for each in both:
        each.store.finish()


class Host:
    """A process that hosts a store."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.process = start_python(HOST, self.port, stdin=-1)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "up\n"

    def signal(self, number: int) -> None:
        """Send it a signal, and wait for its end where that ends it."""
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.communicate()


@pytest.fixture
def host() -> Iterator[Host]:
    """A host of its own process."""
    one = Host()
    yield one
    one.process.kill()
    one.process.communicate()


@contextmanager
def beside(run: Callable[[], object]) -> Iterator[Any]:
    """Have *run* called on a thread of its own meanwhile."""
    with ThreadPoolExecutor(1) as threads:
        yield threads.submit(run)


def departures(ranks: list[GroupPending], grace_seconds: float = PATIENCE_SECONDS) -> list[ExitBarrier]:
    """Return how each rank will leave its fit."""
    return [ExitBarrier(each, limit=NOW, grace_seconds=grace_seconds) for each in ranks]


# -- what is pending


def test_others_wait_until_a_request_has_ended(ranks: list[GroupPending]) -> None:
    """A rank waits for what another has announced for that location, and for all; not for other locations."""
    one, other = ranks
    announcement = one.announce("place")
    other.wait_for("elsewhere", "elsewhere", limit=NOW)
    with beside(lambda: other.wait_for("place", "place", limit=LONG)) as waiting:
        with pytest.raises(FlushTimeoutError, match="another rank has checkpoints pending still"):
            other.wait_for_all(limit=NOW)
        assert not waiting.done()
        announcement.end()
        waiting.result(PATIENCE_SECONDS)
    other.wait_for_all(limit=NOW)


def test_no_rank_waits_for_its_own(ranks: list[GroupPending]) -> None:
    """What a rank has pending itself, its service knows of."""
    ranks[0].announce("place")
    ranks[0].wait_for("place", "place", limit=NOW)
    ranks[0].wait_for_all(limit=NOW)


def test_failure_is_told_each_other_rank_once(ranks: list[GroupPending]) -> None:
    """A rank that loads what was not written is told why, once, and not where it knows; nor is it later saves'."""
    one, other = ranks
    one.announce("place").end("StoreError: full")
    with pytest.raises(RankError, match=r"the rank that writes 'run/a\.ckpt' failed: StoreError: full"):
        _wait_long(other, "place", "run/a.ckpt")
    _wait_long(other, "place", "run/a.ckpt")
    one.announce("place").end("StoreError: full")
    one.store.finish()
    other.count_as_raised()
    _wait_long(other, "place", "run/a.ckpt")
    one.announce("place").end("StoreError: full")
    one.announce("place").end()
    _wait_long(other, "place", "run/a.ckpt")


def _wait_long(rank: GroupPending, key: str, url: str) -> None:
    rank.wait_for(key, url, limit=LONG)


def test_nobody_gives_up_while_something_moves(ranks: list[GroupPending]) -> None:
    """The limit counts from the last time that a request ended or bytes moved on any rank."""
    one, other = ranks
    idle_seconds = 0.6
    began = time.monotonic()

    def look(store: Any) -> bool | None:
        one.store.ask(lambda store: store.add("async_ckpt/beats", 1))  # as `beat` does, which is seldom
        return time.monotonic() - began > 2 * idle_seconds or None

    assert other.poll(look, "something", limit=Limit(idle_seconds=idle_seconds))


# -- how ranks leave a fit


def test_ranks_leave_together(ranks: list[GroupPending]) -> None:
    """The others wait until the first rank has waited, and that one until they have left; no key stays of the fit."""
    first, second = departures(ranks)
    for each in (first, second):
        each.training_ended()
    with beside(second.wait_for_first_rank) as agreeing:
        assert not agreeing.done()
        first.wait_for_first_rank()
        agreeing.result(PATIENCE_SECONDS)
    with beside(lambda: first.leave(failure=None, waits=True)) as leaving:
        assert not leaving.done()
        second.leave(failure=None, waits=True)
        leaving.result(PATIENCE_SECONDS)
    assert not ranks[0].store.ask(lambda store: store.check(["async_ckpt/fits/1/word"]))


def test_failure_of_the_first_rank_is_raised_when_it_has_torn_down(ranks: list[GroupPending]) -> None:
    """The others hear of a failure when the first rank leaves, not before, and each raises it once."""
    first, second = departures(ranks)
    first.training_ended()
    second.training_ended()
    with beside(lambda: first.leave(failure="StoreError: full", waits=True)) as leaving:
        with pytest.raises(
            RankError, match=r"^rank 0, which writes the checkpoints, failed: StoreError: full$"
        ):
            second.wait_for_first_rank()
        assert not leaving.done()
        second.leave(failure=None, waits=True)
        leaving.result(PATIENCE_SECONDS)


def test_first_rank_waits_for_nobody_in_the_middle_of_training(ranks: list[GroupPending]) -> None:
    """Where training has not ended on it, or Ctrl-C is handled, the first rank leaves at once; others hear of it."""
    first, second = departures(ranks)
    first.leave(failure=None, waits=True)
    second.wait_for_first_rank()
    first, second = departures(ranks)
    first.training_ended()
    first.leave(failure=None, waits=False)
    second.wait_for_first_rank()


def test_rank_that_does_not_come_is_waited_for_a_bounded_time(
    ranks: list[GroupPending], caplog: pytest.LogCaptureFixture
) -> None:
    """The first rank goes on without a rank that does not leave; another rank raises if the first one says nothing."""
    first, second = departures(ranks, grace_seconds=0.05)
    first.training_ended()
    with pytest.raises(FlushTimeoutError, match="another rank has checkpoints to wait for still after"):
        second.wait_for_first_rank()
    first.leave(failure=None, waits=True)
    assert "not every rank has left the fit" in caplog.text


def test_each_fit_has_a_word_of_its_own(ranks: list[GroupPending]) -> None:
    """What the first rank has said of one fit is not taken for what it says of the next."""
    for failure in ("one", None, "two"):
        first, second = departures(ranks)
        first.leave(failure=failure, waits=True)
        if failure is None:
            second.wait_for_first_rank()
        else:
            with pytest.raises(RankError, match=failure):
                second.wait_for_first_rank()


# -- a store that is gone


def test_death_of_the_host_ends_every_wait(host: Host) -> None:
    """Who waits when the store's host dies raises soon: for a location, for all, for the first rank's word."""
    connect(host.port, 0).announce("place")
    counted = [Counted(connection(host.port), calls=20) for _ in range(3)]  # more than one look
    one, two, three = (GroupPending(GroupStore(each, rank=1, world_size=2)) for each in counted)
    waits = [
        lambda: one.wait_for("place", "place", limit=LONG),
        lambda: two.wait_for_all(limit=LONG),
        ExitBarrier(three, limit=LONG).wait_for_first_rank,
    ]
    with ThreadPoolExecutor(len(waits)) as threads:
        outcomes = [threads.submit(wait) for wait in waits]
        assert all(each.used.wait(PATIENCE_SECONDS) for each in counted)
        host.signal(signal.SIGKILL)
        for outcome in outcomes:
            with pytest.raises(RankError, match="does not answer: the process group's store does not answer"):
                outcome.result(PATIENCE_SECONDS)


def test_nobody_waits_for_a_host_that_has_left(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    """Who comes when the store's host has ended goes on, as it ends when its own fit has; saves say so once."""
    one, other = connect(host.port, 0), connect(host.port, 1)
    one.announce("place")
    first, second = departures([one, other])
    host.signal(signal.SIGKILL)
    other.wait_for("place", "place", limit=LONG)
    other.wait_for_all(limit=LONG)
    second.wait_for_first_rank()
    assert "the first rank has ended already" in caplog.text
    second.leave(failure=None, waits=True)
    one.announce("place").end("a failure")
    one.announce("place").end()
    assert caplog.text.count("the other ranks cannot be told") == 1
    first.training_ended()
    first.leave(failure=None, waits=True)


def test_host_that_stands_still_holds_nobody_up(host: Host) -> None:
    """Where the store's host is stopped, every question ends after its time, though the store's call does not."""
    pending = connect(host.port, 0, answer_seconds=ANSWER_SECONDS)
    other = connect(host.port, 1, answer_seconds=ANSWER_SECONDS)
    pending.announce("place").end()
    pending.store.finish()
    host.signal(signal.SIGSTOP)
    with pytest.raises(UnreachableError):
        other.store.ask(lambda store: store.add("async_ckpt/beats", 0))
    announcement = pending.announce("place")
    other.wait_for_all(limit=LONG)
    began = time.monotonic()
    announcement.end()  # nor does telling, which waits for nothing
    pending.announce("place").end()
    pending.store.finish()
    assert time.monotonic() - began < PATIENCE_SECONDS


def test_everything_is_told_in_order_and_by_one_thread(ranks: list[GroupPending]) -> None:
    """What is to be told is told in the order in which it came, however much comes at once."""
    heard: list[int] = []
    for number in range(1000):
        ranks[0].store.tell(lambda store, number=number: heard.append(number))
    ranks[0].store.finish()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(heard) < 1000 and time.monotonic() < deadline:
        ranks[0].store.finish()
    assert heard == list(range(1000))


# -- which process has a group


def test_process_on_its_own_has_none() -> None:
    """Without a process group there is nobody to talk to."""
    assert pending_of_group() is None


@contextmanager
def group_of_two() -> Iterator[GroupPending]:
    """Make this process rank 0 of a group; yield what rank 1 knows. No fixture, as its connection must end first."""
    host = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=host)
    found = store_of_group()
    assert found is not None
    assert found[1:] == (0, 2)
    try:
        yield GroupPending(GroupStore(found[0], rank=1, world_size=2))
    finally:
        torch.distributed.destroy_process_group()


def test_group_of_one_has_nobody_to_talk_to() -> None:
    """A group of one rank costs nothing."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("fake", rank=0, world_size=1, store=store)
    try:
        assert pending_of_group() is None
    finally:
        torch.distributed.destroy_process_group()


def test_forked_child_is_no_rank() -> None:
    """A data loader's worker leaves its parent's connection alone."""
    with group_of_two():
        parents = pending_of_group()
        assert parents is not None
        child = os.fork()
        if child == 0:
            os._exit(0 if pending_of_group() is None else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert pending_of_group() is parents


def test_every_request_of_a_plugin_is_known_to_other_ranks(tmp_path: Path) -> None:
    """Saves, removals and links are announced before they are made, and end when they have ended, failed or not;
    one that is refused leaves nothing to wait for.
    """
    gate = Gate()

    def full() -> StoreError:
        return StoreError("full")

    def make(location: Location, workers: Workers) -> FaultyStore:
        faults = [Fault(operation="commit", gate=gate), Fault(operation="commit", calls=[2], error=full)]
        return FaultyStore(open_store(location, workers=workers), faults)

    plugin = AsyncCheckpointIO(store_factory=make)
    path = tmp_path / "a.ckpt"
    with group_of_two() as other:
        plugin.save_checkpoint({"step": 1}, path)
        plugin.link(tmp_path / "last.ckpt", path)
        with pytest.raises(Exception, match="pickle"):
            plugin.save_checkpoint({"step": lambda: 1}, tmp_path / "b.ckpt")
        with pytest.raises(FlushTimeoutError):
            other.wait_for_all(limit=NOW)
        key = plugin.key_of(path)
        with pytest.raises(FlushTimeoutError):
            other.wait_for(key, str(path), limit=NOW)
        gate.open()
        other.wait_for_all(limit=LONG)
        plugin.save_checkpoint({"step": 2}, path)
        with pytest.raises(RankError, match=r"a\.ckpt' failed: StoreError: full"):
            other.wait_for(key, str(path), limit=LONG)
        with pytest.raises(StoreError, match="full"):
            plugin.wait()
        plugin.save_checkpoint({"step": 3}, path)
        plugin.remove_checkpoint(tmp_path / "last.ckpt")
        other.wait_for_all(limit=LONG)
        assert [each.name for each in tmp_path.iterdir()] == ["a.ckpt"]
        plugin.teardown()
