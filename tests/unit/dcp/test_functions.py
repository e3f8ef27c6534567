"""``save`` and ``async_save`` in one process, without ``torch.distributed`` being initialized."""

from __future__ import annotations

import asyncio
import concurrent.futures
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
import torch.distributed.checkpoint as torch_dcp

import async_ckpt.dcp as dcp
from async_ckpt import CheckpointService, OptionError, ShardedSaveError
from async_ckpt.events import Event
from async_ckpt.stores.base import Location
from async_ckpt.stores.local.store import LocalStore
from async_ckpt.stores.local.upload import LocalUpload
from tests.integration.sharded.torch_names import ALONE

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # as torch's own load says


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """Leave no service and no option behind."""
    yield
    dcp.configure()


def loaded(path: Path, like: dict[str, Any]) -> dict[str, Any]:
    """Return what torch finds at *path*."""
    torch_dcp.load(like, checkpoint_id=path, **ALONE)
    return like


def unwritable(tmp_path: Path) -> Path:
    """Return a place where no directory can be made."""
    (tmp_path / "file").write_text("no directory")
    return tmp_path / "file" / "it"


@pytest.mark.parametrize("no_dist", [True, False])
def test_one_process(tmp_path: Path, no_dist: bool) -> None:
    """Without a process group this process saves by itself, and gets the metadata."""
    state = {"weight": torch.arange(6.0).view(2, 3), "step": 7}
    metadata = dcp.save(state, checkpoint_id=tmp_path / "it", no_dist=no_dist)
    assert metadata is not None
    assert set(metadata.state_dict_metadata) == {"weight", "step"}
    found = loaded(tmp_path / "it", {"weight": torch.zeros(2, 3), "step": 0})
    assert torch.equal(found["weight"], state["weight"])  # type: ignore[arg-type]
    assert found["step"] == 7


def test_async_save_returns_a_future(tmp_path: Path) -> None:
    """The future is one of ``concurrent.futures``; the weights may change as soon as there is one (S1)."""
    weight = torch.ones(1000)
    future = dcp.async_save({"weight": weight}, checkpoint_id=str(tmp_path / "it"))
    weight.zero_()
    assert isinstance(future, concurrent.futures.Future)
    assert not future.cancel()
    assert next(concurrent.futures.as_completed([future], timeout=60)) is future
    metadata = future.result(timeout=0)
    assert metadata is not None
    assert set(metadata.state_dict_metadata) == {"weight"}
    assert future.done()
    assert future.exception() is None
    assert torch.equal(loaded(tmp_path / "it", {"weight": weight})["weight"], torch.ones(1000))


def test_a_future_is_awaited(tmp_path: Path) -> None:
    """``asyncio.wrap_future`` takes it."""

    async def save() -> Any:
        return await asyncio.wrap_future(dcp.async_save({"step": 1}, checkpoint_id=tmp_path / "it"))

    assert set(asyncio.run(save()).state_dict_metadata) == {"step"}


def test_waiting_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ``timeout`` that passes raises the ``TimeoutError`` of ``concurrent.futures``; the save goes on."""
    may_go_on = threading.Event()
    begin = LocalStore.begin

    async def begin_late(store: LocalStore, location: Location, nbytes: int) -> LocalUpload:
        while not may_go_on.is_set():  # noqa: ASYNC110  # what sets it is another thread
            await anyio.sleep(0.01)
        return await begin(store, location, nbytes)

    monkeypatch.setattr(LocalStore, "begin", begin_late)
    future = dcp.async_save({"step": 1}, checkpoint_id=tmp_path / "it")
    for ask in (future.result, future.exception):
        with pytest.raises(concurrent.futures.TimeoutError):
            ask(timeout=0.01)
    assert not future.done()
    may_go_on.set()
    assert future.result(timeout=60) is not None


@pytest.mark.parametrize("how", ["result", "exception", "callback"])
def test_an_error_that_was_looked_at(tmp_path: Path, how: str) -> None:
    """Who asks the future has been told: no later call raises it (E1)."""
    future = dcp.async_save({"step": 1}, checkpoint_id=unwritable(tmp_path))
    if how == "callback":
        asked: concurrent.futures.Future[Any] = concurrent.futures.Future()
        future.add_done_callback(lambda ended: asked.set_result(ended.exception()))
        assert isinstance(asked.result(60), ShardedSaveError)
    elif how == "exception":
        assert isinstance(future.exception(60), ShardedSaveError)
    else:
        with pytest.raises(ShardedSaveError):
            future.result(60)
    dcp.save({"step": 1}, checkpoint_id=tmp_path / "it")


def test_an_error_that_nobody_looks_at(tmp_path: Path) -> None:
    """The next call raises it, having done what it was asked for; then it is told."""
    future = dcp.async_save({"step": 1}, checkpoint_id=unwritable(tmp_path))
    concurrent.futures.wait([future], timeout=60)
    with pytest.raises(ShardedSaveError):
        dcp.save({"step": 2}, checkpoint_id=tmp_path / "it")
    assert loaded(tmp_path / "it", {"step": 0}) == {"step": 2}
    dcp.async_save({"step": 3}, checkpoint_id=tmp_path / "it").result(60)


def test_close_raises_what_nobody_has_looked_at(tmp_path: Path) -> None:
    """``close`` asks whether all is well; afterwards saving goes on."""
    dcp.async_save({"step": 1}, checkpoint_id=unwritable(tmp_path))
    with pytest.raises(ShardedSaveError):
        dcp.close()
    dcp.save({"step": 1}, checkpoint_id=tmp_path / "it")
    dcp.close()
    dcp.close()


def test_callbacks_come_in_order_on_one_thread(tmp_path: Path) -> None:
    """Not on the loop's, which they could hold up; and one that raises keeps no other from being called."""
    called: list[tuple[str, str]] = []
    over = threading.Event()

    def first(future: object) -> None:
        called.append(("first", threading.current_thread().name))
        raise ValueError

    future = dcp.async_save({"weight": torch.zeros(1 << 20)}, checkpoint_id=tmp_path / "it")
    future.add_done_callback(first)
    future.add_done_callback(lambda ended: called.append(("second", threading.current_thread().name)))
    future.add_done_callback(lambda ended: over.set())
    future.result(60)
    assert over.wait(60)
    assert [name for name, _ in called] == ["first", "second"]
    assert all("loop" not in thread for _, thread in called)
    future.add_done_callback(lambda ended: called.append(("late", threading.current_thread().name)))
    assert called[-1] == ("late", threading.current_thread().name)


def test_configure_applies_to_later_saves(tmp_path: Path) -> None:
    """Options hold from the call on; those that are not given are the defaults again."""
    events: list[Event] = []
    dcp.configure(observer=events.append)
    dcp.save({"step": 1}, checkpoint_id=tmp_path / "it")
    assert events
    dcp.configure()
    seen = len(events)
    dcp.save({"step": 1}, checkpoint_id=tmp_path / "it")
    assert len(events) == seen


def test_load_fills_in_place(tmp_path: Path) -> None:
    """What torch has saved, and what we have, is read into the state's own memory; after the pending save (O2)."""
    torch_dcp.save({"weight": torch.arange(9.0), "step": 4}, checkpoint_id=tmp_path / "theirs")
    dcp.async_save({"weight": torch.arange(9.0), "step": 4}, checkpoint_id=tmp_path / "ours")
    for name in ("theirs", "ours"):
        weight = torch.zeros(9)
        state = {"weight": weight, "step": 0}
        dcp.load(state, checkpoint_id=tmp_path / name)
        assert state["weight"] is weight
        assert torch.equal(weight, torch.arange(9.0))
        assert state["step"] == 4


def test_load_takes_any_planner(tmp_path: Path) -> None:
    """Such as one that leaves what is not there as it is."""
    dcp.save({"weight": torch.arange(9.0)}, checkpoint_id=tmp_path / "it")
    state = {"weight": torch.zeros(9), "new": torch.ones(2)}
    with pytest.raises(KeyError, match="new"):
        dcp.load(state, checkpoint_id=tmp_path / "it")
    dcp.load(state, checkpoint_id=tmp_path / "it", planner=dcp.DefaultLoadPlanner(allow_partial_load=True))
    assert torch.equal(state["weight"], torch.arange(9.0))
    assert torch.equal(state["new"], torch.ones(2))


class Custom:
    """A class of the program's own."""


def test_load_runs_nothing_unless_told(tmp_path: Path) -> None:
    """A value of the program's own classes needs ``weights_only=False``, given to ``load`` or to the reader."""
    dcp.save({"custom": Custom()}, checkpoint_id=tmp_path / "it")
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        dcp.load({"custom": None}, checkpoint_id=tmp_path / "it")
    state: dict[str, Any] = {"custom": None}
    dcp.load(state, checkpoint_id=tmp_path / "it", weights_only=False)
    assert isinstance(state["custom"], Custom)
    state = {"custom": None}
    dcp.load(state, storage_reader=dcp.StorageReader(tmp_path / "it", weights_only=False))
    assert isinstance(state["custom"], Custom)


def test_our_own_storage_says_where(tmp_path: Path) -> None:
    """A ``StorageWriter``, ``StorageReader`` or ``Stager`` of ours is honoured by our functions, as is its service."""
    events: list[Event] = []
    with CheckpointService(observer=events.append) as service:
        writer = dcp.StorageWriter(tmp_path / "it", service=service)
        dcp.async_save({"step": 1}, storage_writer=writer, async_stager=dcp.Stager()).result(60)
        assert events
        state = {"step": 0}
        dcp.load(state, storage_reader=dcp.StorageReader(tmp_path / "it", service=service))
        with pytest.raises(OptionError, match="of its own"):
            dcp.save({"step": 1}, storage_writer=writer, no_dist=True)
    assert state == {"step": 1}
    dcp.save({"step": 2}, storage_writer=dcp.StorageWriter(tmp_path / "it"), checkpoint_id=tmp_path / "other")
    assert loaded(tmp_path / "other", {"step": 0}) == {"step": 2}
