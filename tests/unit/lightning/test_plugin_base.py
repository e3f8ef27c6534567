"""What a base CheckpointIO below the plugin is given: the arguments as they were, the state as it was."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import pytest
import torch

from async_ckpt import (
    AsyncCheckpointIO,
    UnpicklableStateError,
)
from tests.unit.lightning.bases import Base, Blocked, OddNames


@pytest.mark.parametrize("keywords", [False, True], ids=["positional", "keywords"])
def test_base_gets_the_arguments_as_they_were(tmp_path: Path, keywords: bool) -> None:
    """However it is called, the base is called in the same way, extra keywords included."""
    base, path = Base(), tmp_path / "a.ckpt"
    plugin = AsyncCheckpointIO(base)
    if keywords:
        plugin.save_checkpoint(checkpoint={"a": 1}, path=path, storage_options={"x": 1}, colour="red")
        loaded = plugin.load_checkpoint(path=path, map_location="cpu", weights_only=True)
        plugin.remove_checkpoint(path=path)
    else:
        plugin.save_checkpoint({"a": 1}, path, {"x": 1}, colour="red")
        loaded = plugin.load_checkpoint(path, "cpu", weights_only=True)
        plugin.remove_checkpoint(path)
    plugin.teardown()
    assert loaded == {"a": 1}
    assert base.calls == [
        ("save", (path, {"x": 1}, {"colour": "red"})),
        ("load", (path, "cpu", {"weights_only": True})),
        ("remove", path),
    ]


def test_base_may_have_its_own_names(tmp_path: Path) -> None:
    """A base that names its parameters otherwise works with its own names, and with positions."""
    plugin = AsyncCheckpointIO(OddNames())
    plugin.save_checkpoint(state={"a": 1}, target=tmp_path / "a", verbose=True)
    plugin.save_checkpoint({"a": 2}, target=tmp_path / "b")
    plugin.save_checkpoint({"a": 3}, tmp_path / "c")
    assert [plugin.load_checkpoint(target=tmp_path / name) for name in "ab"] == [{"a": 1}, {"a": 2}]
    assert plugin.load_checkpoint(tmp_path / "c") == {"a": 3}
    plugin.remove_checkpoint(target=tmp_path / "c")
    plugin.wait()
    assert plugin.saved.keys() == {str(tmp_path / "a"), str(tmp_path / "b")}
    plugin.teardown()


def test_missing_argument_is_named(tmp_path: Path) -> None:
    """A call without a path fails at once and says what is missing."""
    plugin = AsyncCheckpointIO(Base())
    with pytest.raises(TypeError, match="'path'"):
        plugin.save_checkpoint({"a": 1})
    plugin.teardown()


def test_paths_that_only_the_base_understands() -> None:
    """A base may keep checkpoints under names that are no path or URL of any known file system."""
    plugin = AsyncCheckpointIO(Base())
    plugin.save_checkpoint({"a": 1}, "vault-of-mine://run/7")
    assert plugin.load_checkpoint("vault-of-mine://run/7") == {"a": 1}
    plugin.save_checkpoint({"a": 2}, 7)
    assert plugin.load_checkpoint(7) == {"a": 2}
    plugin.teardown()


def test_base_gets_a_snapshot(tmp_path: Path) -> None:
    """The base is given the state as it was at the call, in objects that share nothing with it (S1)."""
    base = Blocked()
    plugin = AsyncCheckpointIO(base)
    weight, numbers = torch.ones(1000), [1, 2]
    plugin.save_checkpoint({"w": weight, "tied": weight, "numbers": numbers}, tmp_path / "a")
    weight.zero_()
    numbers.append(3)
    base.go.set()
    plugin.teardown()
    saved = base.saved[str(tmp_path / "a")]
    assert torch.equal(saved["w"], torch.ones(1000))
    assert saved["tied"].data_ptr() == saved["w"].data_ptr()
    assert saved["numbers"] == [1, 2]


def test_base_may_keep_what_it_was_given(tmp_path: Path) -> None:
    """A base that keeps the state finds it unchanged after later saves: its memory is not used again beneath it."""
    base = Base()
    plugin = AsyncCheckpointIO(base, queue_depth=1)
    for step in range(6):
        plugin.save_checkpoint({"w": torch.full((50_000,), float(step))}, tmp_path / f"{step}")
    plugin.wait()
    gc.collect()
    for step in range(6):
        assert torch.equal(base.saved[str(tmp_path / f"{step}")]["w"], torch.full((50_000,), float(step)))
    plugin.teardown()


def test_what_pickle_refuses_goes_to_a_base_by_reference(tmp_path: Path) -> None:
    """A base need not pickle: it gets an unpicklable object itself. Our own writer refuses it, saying where it is."""
    base = Base()
    plugin, lock = AsyncCheckpointIO(base), threading.Lock()
    plugin.save_checkpoint({"lock": lock, "w": torch.ones(2)}, tmp_path / "a")
    plugin.teardown()
    assert base.saved[str(tmp_path / "a")]["lock"] is lock
    own = AsyncCheckpointIO()
    with pytest.raises(UnpicklableStateError, match=r"state\['lock'\]"):
        own.save_checkpoint({"lock": lock}, tmp_path / "a")
    own.teardown()
