"""Places that are one, lie in each other, or lead to each other: the program's order holds for them (O1, D3)."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt import Handle, State, StoreError
from async_ckpt.errors import RemovalDroppedError
from async_ckpt.stores import locate
from async_ckpt.testing import Fault, Gate
from tests.support import Harness, gated, number_at, number_of, reached, state


def held(harness: Harness, gate: Gate, folder: Path) -> Handle:
    """Have a save under way that goes on only at the gate, so that removals which come later are pending."""
    handle = harness.service.save(state(0), folder / "held.ckpt")
    reached(gate)
    return handle


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory apart from the one of the save that holds others up."""
    place = tmp_path / "place"
    place.mkdir()
    return place


def test_a_removed_link_is_saved_to_as_a_file(tmp_path: Path, place: Path) -> None:
    """Removing a link and saving to its name, both pending, leaves alone what it led to."""
    (place / "last.ckpt").symlink_to("best.ckpt")
    gate, fault = gated(calls=[1])
    with Harness(fault, queue_depth=4) as harness:
        held(harness, gate, tmp_path)
        harness.service.save(state(1), place / "best.ckpt")
        harness.service.remove(place / "last.ckpt")
        harness.service.save(state(2), place / "last.ckpt")
        gate.open()
        harness.service.wait()
    assert number_at(place / "best.ckpt") == 1
    assert number_at(place / "last.ckpt") == 2
    assert not (place / "last.ckpt").is_symlink()


def test_a_removed_link_to_a_directory_leads_nowhere_for_what_comes_later(
    tmp_path: Path, place: Path
) -> None:
    """A save and a removal below a linked directory that is to be removed do not reach what it leads to."""
    (place / "real").mkdir()
    for name in ("a.ckpt", "b.ckpt"):
        (place / "real" / name).write_bytes(b"kept")
    (place / "run").symlink_to("real", target_is_directory=True)
    gate, fault = gated(calls=[1])
    with Harness(fault, queue_depth=4) as harness:
        held(harness, gate, tmp_path)
        harness.service.remove(place / "run")
        harness.service.save(state(2), place / "run" / "a.ckpt")
        harness.service.remove(place / "run" / "b.ckpt")
        gate.open()
        harness.service.wait()
    assert [(place / "real" / name).read_bytes() for name in ("a.ckpt", "b.ckpt")] == [b"kept", b"kept"]
    assert number_at(place / "run" / "a.ckpt") == 2
    assert not (place / "run").is_symlink()


def test_a_directory_removed_before_a_save_into_it(tmp_path: Path, place: Path) -> None:
    """The removal of a directory does not delete what was accepted after it."""
    (place / "run").mkdir()
    (place / "run" / "old.ckpt").write_bytes(b"old")
    gate, fault = gated(calls=[1])
    with Harness(fault, queue_depth=4, max_concurrent_saves=3) as harness:
        held(harness, gate, tmp_path)
        harness.service.remove(place / "run")
        new = harness.service.save(state(1), place / "run" / "new.ckpt")
        assert not new.done()
        gate.open()
        assert new.wait().state is State.DURABLE
        harness.service.wait()
    assert [path.name for path in (place / "run").iterdir()] == ["new.ckpt"]
    assert number_at(place / "run" / "new.ckpt") == 1


@pytest.mark.parametrize("below", ["", "deep/new.ckpt"])
def test_a_save_where_something_is_to_be_removed(tmp_path: Path, place: Path, below: str) -> None:
    """A save to a directory, or below a file, is accepted where that is to be removed, and is written after it."""
    if below:
        (place / "run").write_bytes(b"a file")
    else:
        (place / "run").mkdir()
        (place / "run" / "old.ckpt").write_bytes(b"old")
    target = place / "run" / below
    gate, fault = gated(calls=[1])
    with Harness(fault, queue_depth=4) as harness:
        with pytest.raises(StoreError):
            harness.service.save(state(1), target)
        held(harness, gate, tmp_path)
        removal = harness.service.remove(place / "run")
        save = harness.service.save(state(1), target)
        gate.open()
        assert (removal.wait().state, save.wait().state) == (State.REMOVED, State.DURABLE)
    assert number_at(target) == 1


def test_a_save_where_a_removal_was_dropped_fails_at_its_turn(tmp_path: Path, place: Path) -> None:
    """What was expected to be gone and is not shows at the save's turn; the directory stays (D3)."""
    (place / "run").mkdir()
    (place / "run" / "old.ckpt").write_bytes(b"old")
    gate, failing = Gate(), Fault(operation="commit", calls=[1], error=OSError)
    with Harness(Fault(operation="begin", calls=[1], gate=gate), failing, queue_depth=4) as harness:
        first = held(harness, gate, tmp_path)
        removal = harness.service.remove(place / "run")
        save = harness.service.save(state(1), place / "run")
        gate.open()
        with pytest.raises(OSError):
            first.wait()
        with pytest.raises(RemovalDroppedError):
            removal.wait()
        with pytest.raises(StoreError) as caught:
            save.wait()
        assert caught.value.errno == errno.EISDIR
    assert (place / "run" / "old.ckpt").read_bytes() == b"old"


def test_a_load_goes_where_the_link_leads_at_its_turn(tmp_path: Path, place: Path) -> None:
    """A load through a link waits for what was to be done to the link, and to what that leads to then (O2)."""
    (place / "last.ckpt").symlink_to("gone.ckpt")
    gate, fault = gated(calls=[1])
    with Harness(fault, queue_depth=4) as harness:
        held(harness, gate, tmp_path)
        harness.service.save(state(5), place / "new.ckpt")
        names = [locate(place / name, follow=False) for name in ("last.ckpt", "new.ckpt")]
        harness.service.submit_link(*names)
        harness.service.save(state(6), place / "new.ckpt")
        gate.open()
        assert number_of(harness.service.load(place / "last.ckpt")) == 6


@pytest.mark.parametrize("leads_on", [True, False])
def test_a_load_while_another_process_has_the_link_lead_elsewhere(place: Path, leads_on: bool) -> None:
    """What a link leads to is loaded, whoever replaces both meanwhile; where it leads to nothing, there is nothing."""
    for number, name in enumerate(("old.ckpt", "new.ckpt")):
        torch.save(state(number), place / name)
    (place / "last.ckpt").symlink_to("old.ckpt")
    gate = Gate()
    found: list[Any] = []

    def load(harness: Harness) -> None:
        try:
            found.append(number_of(harness.service.load(place / "last.ckpt")))
        except FileNotFoundError as error:
            found.append(error)

    with Harness(Fault(operation="source", calls=[1], gate=gate)) as harness:
        loading = threading.Thread(target=load, args=(harness,))
        loading.start()
        reached(gate)
        if leads_on:
            (place / "made.tmp").symlink_to("new.ckpt")
            (place / "made.tmp").replace(place / "last.ckpt")
        (place / "old.ckpt").unlink()
        gate.open()
        loading.join()
    assert found == [1] if leads_on else isinstance(found[0], FileNotFoundError)


@pytest.mark.parametrize("name", ["last.ckpt", "run/a.ckpt"])
def test_a_save_through_a_link_that_is_yet_to_be_made(tmp_path: Path, place: Path, name: str) -> None:
    """A save to a name that is about to become a link, or to lie in one, goes where that will lead (O1)."""
    (place / "real").mkdir()
    target = place / ("real" if "/" in name else "a.ckpt")
    gate, fault = gated(calls=[1])
    with Harness(fault, queue_depth=4) as harness:
        held(harness, gate, tmp_path)
        if target.suffix:
            harness.service.save(state(1), target)
        link = place / name.split("/")[0]
        harness.service.submit_link(locate(link, follow=False), locate(target, follow=False))
        harness.service.save(state(2), place / name)
        gate.open()
        harness.service.wait()
    assert link.is_symlink()
    assert number_at(target if target.suffix else target / "a.ckpt") == 2
