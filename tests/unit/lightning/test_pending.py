"""What the plugin knows and does about saves that are pending."""

from __future__ import annotations

import pickle
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt import AsyncCheckpointIO, OptionError
from async_ckpt.events import Event
from async_ckpt.stores import open_store
from async_ckpt.stores.base import Location, Store, Workers
from async_ckpt.testing.faults import Fault, FaultyStore, Gate
from tests.support import reached

STATE = {"weights": torch.arange(4.0)}


def held(gate: Gate, *calls: int, **fault: Any) -> dict[str, Any]:
    """Return options of a plugin whose commits wait at *gate*."""
    faults = [Fault(operation="commit", calls=calls or None, gate=gate, **fault)]
    counted: Counter[str] = Counter()

    def make(location: Location, workers: Workers) -> Store:
        store = FaultyStore(open_store(location, workers=workers), faults)
        store.calls = counted  # of all services that the plugin makes
        return store

    return {"store_factory": make, "queue_depth": 8}


def failing(*calls: int) -> dict[str, Any]:
    """Return options of a plugin whose commits of these numbers fail."""
    return held(opened(), *calls, error=lambda: OSError("broken"))


def opened() -> Gate:
    """Return a gate that is open."""
    gate = Gate()
    gate.open()
    return gate


def test_what_will_exist(tmp_path: Path) -> None:
    """A pending save will be there, a pending removal will have gone; of anything else the disk knows."""
    gate = Gate()
    plugin = AsyncCheckpointIO(**held(gate))
    a, b = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    assert plugin.will_exist(a) is None
    plugin.save_checkpoint(STATE, a)
    assert plugin.will_exist(str(a)) is True
    plugin.save_checkpoint(STATE, b)
    plugin.remove_checkpoint(a)
    assert (plugin.will_exist(a), plugin.will_exist(b)) == (False, True)
    gate.open()
    plugin.wait()
    assert (plugin.will_exist(a), plugin.will_exist(b)) == (None, None)
    assert [each.name for each in tmp_path.iterdir()] == ["b.ckpt"]
    plugin.teardown()


def test_what_will_exist_through_links(tmp_path: Path) -> None:
    """A link, pending or there, counts as what it will lead to: nothing, where that is to be removed."""
    gate = Gate()
    plugin = AsyncCheckpointIO(**held(gate))
    old, new, last, mine, loop, aside = (
        tmp_path / f"{name}.ckpt" for name in ("old", "new", "last", "mine", "loop", "aside")
    )
    torch.save(STATE, old)
    torch.save(STATE, aside)
    last.symlink_to(old.name)
    mine.symlink_to(last.name)
    loop.symlink_to(loop.name)
    assert [plugin.will_exist(each) for each in (last, mine)] == [None, None]
    assert plugin.will_exist(mine, leaves={plugin.key_of(old)}.__contains__) is False
    assert plugin.will_exist(loop) is False
    plugin.save_checkpoint(STATE, new)
    plugin.remove_checkpoint(old)
    assert [plugin.will_exist(each) for each in (last, mine)] == [False, False]
    plugin.link(last, new)
    assert [plugin.will_exist(each) for each in (last, mine)] == [True, True]
    plugin.link(last, aside)
    assert [plugin.will_exist(each) for each in (last, mine)] == [True, True]
    assert plugin.will_exist(mine, leaves={plugin.key_of(aside)}.__contains__) is False
    plugin.link(last, tmp_path / "gone.ckpt")
    assert [plugin.will_exist(each) for each in (last, mine)] == [False, False]
    plugin.save_checkpoint(STATE, last)  # in place of the link
    assert [plugin.will_exist(each) for each in (last, mine)] == [True, True]
    gate.open()
    plugin.teardown()
    assert not last.is_symlink()


def test_a_link_is_made_once_its_target_is_durable(tmp_path: Path) -> None:
    """Until the new checkpoint is durable the link leads to the one before, which is removed only after that."""
    gate = Gate()
    plugin = AsyncCheckpointIO(**held(gate, 2))
    link, old, new = (tmp_path / name for name in ("last.ckpt", "old.ckpt", "new.ckpt"))
    plugin.save_checkpoint({"step": 1}, old)
    plugin.link(link, old)
    plugin.wait()
    plugin.save_checkpoint({"step": 2}, new)
    plugin.link(link, new)
    plugin.remove_checkpoint(old)
    reached(gate)
    assert torch.load(link)["step"] == 1
    assert plugin.will_exist(link) is True
    gate.open()
    plugin.wait()
    assert link.is_symlink()
    assert torch.load(link)["step"] == 2
    assert not old.exists()
    plugin.teardown()


def test_a_link_to_a_failed_save_is_not_made(tmp_path: Path) -> None:
    """The link stays where it was, what it leads to is not removed, and the failure is told."""
    gate = Gate()
    plugin = AsyncCheckpointIO(**held(gate, 2, error=lambda: OSError("broken")))
    link, old, new = (tmp_path / name for name in ("last.ckpt", "old.ckpt", "new.ckpt"))
    plugin.save_checkpoint({"step": 1}, old)
    plugin.link(link, old)
    plugin.wait()
    plugin.save_checkpoint({"step": 2}, new)
    plugin.link(link, new)
    plugin.remove_checkpoint(old)
    gate.open()
    with pytest.raises(OSError, match="broken"):
        plugin.teardown()
    assert torch.load(link)["step"] == 1


def test_synchronous_saves_are_durable_when_they_return(tmp_path: Path) -> None:
    """With ``synchronous`` a save raises its own error itself, and one that returned is there."""
    plugin = AsyncCheckpointIO(**failing(2))
    plugin.synchronous = True
    plugin.save_checkpoint(STATE, tmp_path / "a.ckpt")
    assert (tmp_path / "a.ckpt").exists()
    with pytest.raises(OSError, match="broken"):
        plugin.save_checkpoint(STATE, tmp_path / "b.ckpt")
    plugin.save_checkpoint(STATE, tmp_path / "c.ckpt")
    plugin.teardown()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.ckpt", "c.ckpt"]


@pytest.mark.parametrize(
    "name",
    [
        "hpc_ckpt_1.ckpt",
        "hpc_ckpt_12.ckpt",
        ".temp.ckpt",
        ".lr_find_1f-2e.ckpt",
        ".scale_batch_size_1f-2e.ckpt",
        "checkpoint_rank-0-of-2.pth",
    ],
)
def test_what_is_read_without_asking_is_written_at_once(tmp_path: Path, name: str) -> None:
    """A requeued job's checkpoint and a spawned child's are durable when ``save_checkpoint`` returns."""
    plugin = AsyncCheckpointIO()
    plugin.save_checkpoint(STATE, str(tmp_path / name))
    assert torch.load(tmp_path / name)
    plugin.teardown()


def test_a_directory_has_gone_when_its_removal_returns(tmp_path: Path) -> None:
    """Strategies that write directories put something else in their place at once."""
    (tmp_path / "sharded").mkdir()
    (tmp_path / "sharded" / "part").touch()
    plugin = AsyncCheckpointIO()
    plugin.remove_checkpoint(tmp_path / "sharded")
    assert list(tmp_path.iterdir()) == []
    plugin.teardown()


def test_no_thread_stays_between_synchronous_operations(tmp_path: Path) -> None:
    """Outside of a run nobody tears the plugin down: saves, loads and removals end with their threads."""
    before = set(threading.enumerate())
    plugin = AsyncCheckpointIO()
    plugin.save_checkpoint(STATE, tmp_path / ".temp.ckpt")
    assert set(threading.enumerate()) <= before
    assert plugin.load_checkpoint(tmp_path / ".temp.ckpt").keys() == STATE.keys()
    assert set(threading.enumerate()) <= before
    plugin.remove_checkpoint(tmp_path / ".temp.ckpt")
    assert set(threading.enumerate()) <= before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["xhpc_ckpt_1.ckpt", "hpc_ckpt_1.ckpt.bak", "a.temp.ckpt"])
def test_other_names_are_not(tmp_path: Path, name: str) -> None:
    """A name that only resembles those is asynchronous like any other."""
    gate = Gate()
    plugin = AsyncCheckpointIO(**held(gate))
    plugin.save_checkpoint(STATE, str(tmp_path / name))
    assert not (tmp_path / name).exists()
    gate.open()
    plugin.teardown()


def test_a_requeue_does_not_hear_of_earlier_failures(tmp_path: Path) -> None:
    """The save for a requeue returns although an earlier one failed, which teardown tells (E1)."""
    plugin = AsyncCheckpointIO(**failing(1))
    plugin.save_checkpoint(STATE, tmp_path / "a.ckpt")
    plugin.save_checkpoint(STATE, tmp_path / "hpc_ckpt_1.ckpt")
    assert torch.load(tmp_path / "hpc_ckpt_1.ckpt")
    with pytest.raises(OSError, match="broken"):
        plugin.teardown()


def test_used_as_a_context_manager_it_is_torn_down(tmp_path: Path) -> None:
    """At the end of a ``with`` block everything is durable, and the plugin can be used again."""
    plugin = AsyncCheckpointIO()
    for name in ("a.ckpt", "b.ckpt"):
        with plugin as same:
            assert same is plugin
            plugin.save_checkpoint(STATE, tmp_path / name)
        assert (tmp_path / name).exists()


def test_settling_never_replaces_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """While an error is handled, what failed is logged; else it is raised (E2)."""
    plugin = AsyncCheckpointIO(**failing())
    plugin.save_checkpoint(STATE, tmp_path / "a.ckpt")
    try:
        raise KeyError("training's own")
    except KeyError:
        plugin.settle()
    assert "a.ckpt" in caplog.text
    plugin.save_checkpoint(STATE, tmp_path / "b.ckpt")
    with pytest.raises(OSError, match="broken"):
        plugin.settle()
    plugin.teardown()
    plugin.settle()


def test_observers_hear_of_everything_once(tmp_path: Path) -> None:
    """The plugin's meter, added observers and the option's all get each event; copies of the plugin begin anew."""
    heard: list[tuple[str, str]] = []
    plugin = AsyncCheckpointIO(observer=lambda event: heard.append(("option", type(event).__name__)))

    def added(event: Event) -> None:
        heard.append(("added", type(event).__name__))

    plugin.observe(added)
    plugin.observe(added)
    plugin.save_checkpoint(STATE, tmp_path / "a.ckpt")
    plugin.teardown()
    assert heard.count(("option", "Durable")) == heard.count(("added", "Durable")) == 1
    assert [save.url for save in plugin.meter.take_ended()] == [str(tmp_path / "a.ckpt")]
    assert pickle.loads(pickle.dumps(AsyncCheckpointIO(queue_depth=3))).will_exist("a") is None


class Wrapper:
    """Somebody's wrapper around an asynchronous plugin."""

    def __init__(self, checkpoint_io: Any) -> None:
        self.checkpoint_io = checkpoint_io


@pytest.mark.parametrize("base", [AsyncCheckpointIO, lambda: Wrapper(AsyncCheckpointIO())])
def test_an_asynchronous_base_is_refused(base: Any) -> None:
    """A base that returns before it has written would make "durable" a lie (D1)."""
    with pytest.raises(OptionError, match="asynchronous itself"):
        AsyncCheckpointIO(base())


def test_a_load_alone_leaves_no_thread(tmp_path: Path) -> None:
    """A load before any run frees what it has started; what is not there is named as Lightning names it."""
    torch.save(STATE, tmp_path / "a.ckpt")
    before = set(threading.enumerate())
    plugin = AsyncCheckpointIO()
    assert plugin.load_checkpoint(tmp_path / "a.ckpt").keys() == STATE.keys()
    with pytest.raises(FileNotFoundError, match=r"Checkpoint file not found: .*b\.ckpt"):
        plugin.load_checkpoint(tmp_path / "b.ckpt")
    assert set(threading.enumerate()) <= before
