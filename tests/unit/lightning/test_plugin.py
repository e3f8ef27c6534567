"""``AsyncCheckpointIO`` itself, with bases of our own in place of Lightning's."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import traceback
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch

from async_ckpt import (
    AsyncCheckpointIO,
    FlushError,
    OptionError,
    QueueFullError,
    StoreError,
    UnpicklableStateError,
)
from async_ckpt.events import Event, Failed

WAIT_SECONDS = 10


class Base:
    """A CheckpointIO that writes nowhere and remembers how it was called."""

    flavour = "vanilla"

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.saved: dict[str, Any] = {}
        self.teardowns = 0

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None, **extra: Any) -> None:
        self.calls.append(("save", (path, storage_options, extra)))
        self.saved[str(path)] = checkpoint

    def load_checkpoint(self, path: Any, map_location: Any = None, **extra: Any) -> Any:
        self.calls.append(("load", (path, map_location, extra)))
        return self.saved[str(path)]

    def remove_checkpoint(self, path: Any) -> None:
        self.calls.append(("remove", path))
        self.saved.pop(str(path), None)

    def teardown(self) -> None:
        self.teardowns += 1


class TorchCheckpointIO(Base):
    """Named like the ordinary base that a strategy offers."""


class Blocked(Base):
    """A base whose saves wait until ``go`` is set; tells how many run at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Event()
        self.go = threading.Event()
        self.running = 0
        self.most_at_a_time = 0

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None, **extra: Any) -> None:
        self.running += 1
        self.most_at_a_time = max(self.most_at_a_time, self.running)
        self.entered.set()
        assert self.go.wait(WAIT_SECONDS)
        super().save_checkpoint(checkpoint, path, storage_options, **extra)
        self.running -= 1


class Broken(Base):
    """A base whose saves to a path with ``bad`` in it fail."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None, **extra: Any) -> None:
        if "bad" in str(path):
            raise KeyError(f"the base broke on {path}")
        super().save_checkpoint(checkpoint, path, storage_options, **extra)


class OddNames(Base):
    """A base with its own names for everything."""

    def save_checkpoint(self, state: Any, target: Any, *, verbose: bool = False) -> None:  # type: ignore[override]
        self.saved[str(target)] = (state, verbose)

    def load_checkpoint(self, target: Any) -> Any:  # type: ignore[override]
        return self.saved[str(target)][0]

    def remove_checkpoint(self, target: Any) -> None:
        del self.saved[str(target)]


# -- what Lightning asks of it


def test_it_is_true_and_not_iterable() -> None:
    """Lightning tests a plugin's truth and takes iterables apart: it is neither false nor iterable."""
    for plugin in (AsyncCheckpointIO(), AsyncCheckpointIO(Base())):
        assert plugin
        assert not isinstance(plugin, Iterable)
        with pytest.raises(TypeError):
            iter(plugin)  # type: ignore[call-overload]
        with pytest.raises(TypeError):
            len(plugin)  # type: ignore[arg-type]


def test_ordinary_base_is_not_taken() -> None:
    """The ``TorchCheckpointIO`` that a strategy offers does not replace our own writer."""
    plugin = AsyncCheckpointIO()
    plugin.checkpoint_io = TorchCheckpointIO()
    assert plugin.checkpoint_io is None


def test_special_base_fills_the_empty_place_once() -> None:
    """A base of another kind that a strategy offers is taken, and kept when another is offered."""
    plugin, first = AsyncCheckpointIO(), Base()
    plugin.checkpoint_io = first
    plugin.checkpoint_io = Base()
    plugin.checkpoint_io = TorchCheckpointIO()
    assert plugin.checkpoint_io is first


def test_given_base_stays() -> None:
    """The base that the user gave is never replaced."""
    base = Base()
    plugin = AsyncCheckpointIO(base)
    plugin.checkpoint_io = Base()
    assert plugin.checkpoint_io is base


def test_unknown_attributes_are_the_bases() -> None:
    """What the plugin does not know it takes from its base; without one it has no such attribute."""
    assert AsyncCheckpointIO(Base()).flavour == "vanilla"
    with pytest.raises(AttributeError, match="flavour"):
        _ = AsyncCheckpointIO().flavour
    with pytest.raises(AttributeError, match="missing"):
        _ = AsyncCheckpointIO(Base()).missing


def test_copies_and_pickles_keep_base_and_options(tmp_path: Path) -> None:
    """A plugin in use can be pickled and deep-copied; the copy has base and options, and a runtime of its own (L1)."""
    plugin = AsyncCheckpointIO(Base(), queue_depth=3)
    plugin.save_checkpoint({"step": 1}, tmp_path / "a.ckpt")
    for other in (copy.deepcopy(plugin), pickle.loads(pickle.dumps(plugin))):
        assert type(other.checkpoint_io) is Base
        assert other.service.options.queue_depth == 3
        assert other.service is not plugin.service
        assert other.service.pending == ()
    plugin.teardown()


@pytest.mark.parametrize("options", [{"queue_depth": 0}, {"queue_length": 2}, {"overflow": "drop"}])
def test_bad_options_are_refused_at_once(options: dict[str, Any]) -> None:
    """A bad option is an error of the constructor, not of the first save."""
    with pytest.raises(OptionError, match=next(iter(options))):
        AsyncCheckpointIO(**options)


# -- calls and their arguments


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


def test_storage_options_without_a_base_are_refused(tmp_path: Path) -> None:
    """Our own writer takes ``storage_options`` as the plugin's option only, and says so at the call."""
    plugin = AsyncCheckpointIO()
    with pytest.raises(TypeError, match="AsyncCheckpointIO"):
        plugin.save_checkpoint({"a": 1}, tmp_path / "a.ckpt", storage_options={"key": 1})
    assert list(tmp_path.iterdir()) == []
    plugin.teardown()


def test_own_writer_saves_loads_and_removes(tmp_path: Path) -> None:
    """Without a base, each call follows the one before on the same path, and the file is ``torch.load``'s."""
    plugin, path = AsyncCheckpointIO(), tmp_path / "new" / "a.ckpt"
    plugin.save_checkpoint(checkpoint={"w": torch.ones(3)}, path=path, storage_options=None)
    assert torch.equal(plugin.load_checkpoint(path)["w"], torch.ones(3))
    assert torch.equal(torch.load(path)["w"], torch.ones(3))
    plugin.remove_checkpoint(path)
    plugin.remove_checkpoint(str(tmp_path / "never-there.ckpt"))
    plugin.wait()
    assert not path.exists()
    with pytest.raises(FileNotFoundError):
        plugin.load_checkpoint(path)
    plugin.teardown()


def test_directory_is_there_once_the_save_returned(tmp_path: Path) -> None:
    """The checkpoint's directory exists as soon as the save has returned, for those who link into it at once."""
    plugin = AsyncCheckpointIO()
    plugin.save_checkpoint({"a": 1}, tmp_path / "run" / "1" / "a.ckpt")
    (tmp_path / "run" / "1" / "last.ckpt").symlink_to("a.ckpt")
    plugin.teardown()
    assert torch.load(tmp_path / "run" / "1" / "last.ckpt") == {"a": 1}


def test_weights_only_is_torchs_own_default(tmp_path: Path) -> None:
    """``weights_only=None`` means what it means for ``torch.load``; ``False`` loads any object.

    Nothing at all means ``None``, but ``False`` where Lightning is older than 2.6, as with its own writer.
    """
    plugin, path = AsyncCheckpointIO(), tmp_path / "a.ckpt"
    plugin.save_checkpoint({"path": Path("x")}, path)
    is_old = version("pytorch-lightning").startswith(("2.4.", "2.5."))
    refused: list[dict[str, Any]] = [{"weights_only": None}, {"weights_only": True}]
    loaded: list[dict[str, Any]] = [{"weights_only": False}]
    (loaded if is_old else refused).append({})
    for options in refused:
        with pytest.raises(pickle.UnpicklingError):
            plugin.load_checkpoint(path, **options)
    for options in loaded:
        assert plugin.load_checkpoint(path, **options) == {"path": Path("x")}
    plugin.teardown()


# -- the snapshot that a base is given


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


# -- order


def test_base_runs_one_at_a_time(tmp_path: Path) -> None:
    """Saves of different paths are given to a base one after the other, whatever the plugin's options."""
    base = Blocked()
    plugin = AsyncCheckpointIO(base, queue_depth=4, max_concurrent_saves=4)
    for name in "abcd":
        plugin.save_checkpoint({"name": name}, tmp_path / name)
    assert base.entered.wait(WAIT_SECONDS)
    base.go.set()
    plugin.teardown()
    assert base.most_at_a_time == 1
    assert list(base.saved) == [str(tmp_path / name) for name in "abcd"]


def test_load_waits_for_its_own_path_only(tmp_path: Path) -> None:
    """A load returns while the save of another path is under way (O2)."""
    base = Blocked()
    base.go.set()
    plugin = AsyncCheckpointIO(base)
    plugin.save_checkpoint({"a": 1}, tmp_path / "a")
    plugin.wait()
    base.go.clear()
    base.entered.clear()
    plugin.save_checkpoint({"b": 1}, tmp_path / "b")
    assert base.entered.wait(WAIT_SECONDS)
    assert plugin.load_checkpoint(tmp_path / "a") == {"a": 1}
    base.go.set()
    assert plugin.load_checkpoint(tmp_path / "b") == {"b": 1}
    plugin.teardown()


def test_removal_follows_the_saves_before_it(tmp_path: Path) -> None:
    """A base deletes the old checkpoint only after it has written the new one (D3)."""
    base = Blocked()
    plugin = AsyncCheckpointIO(base, queue_depth=4)
    plugin.save_checkpoint({"n": 1}, tmp_path / "old")
    plugin.save_checkpoint({"n": 2}, tmp_path / "new")
    plugin.remove_checkpoint(tmp_path / "old")
    assert base.calls == []
    base.go.set()
    plugin.teardown()
    assert [call for call, _ in base.calls] == ["save", "save", "remove"]
    assert list(base.saved) == [str(tmp_path / "new")]


def test_removal_is_dropped_where_the_new_save_failed(tmp_path: Path) -> None:
    """Where a base fails to write the new checkpoint, it is not asked to delete the old one (D3)."""
    base = Broken()
    plugin = AsyncCheckpointIO(base)
    plugin.save_checkpoint({"n": 1}, tmp_path / "good")
    plugin.save_checkpoint({"n": 2}, tmp_path / "bad")
    with pytest.raises(KeyError):
        plugin.wait()
    plugin.teardown()

    plugin.save_checkpoint({"n": 2}, tmp_path / "bad2")
    with pytest.raises(KeyError):
        _remove_and_end(plugin, tmp_path / "good")
    assert list(base.saved) == [str(tmp_path / "good")]


def _remove_and_end(plugin: AsyncCheckpointIO, path: Path) -> None:
    try:
        plugin.remove_checkpoint(path)
    finally:
        plugin.teardown()


# -- errors


def test_bases_error_is_raised_once_as_it_is(tmp_path: Path) -> None:
    """An error of the base is raised once, of its own type, with the traceback of the worker (E1)."""
    plugin = AsyncCheckpointIO(Broken())
    plugin.save_checkpoint({"a": 1}, tmp_path / "bad")
    with pytest.raises(KeyError, match="the base broke") as caught:
        plugin.wait()
    trace = traceback.format_exception(caught.value)
    assert any("raise KeyError" in line for line in trace)
    plugin.wait()
    plugin.save_checkpoint({"a": 1}, tmp_path / "good")
    plugin.teardown()


def test_several_errors_come_together(tmp_path: Path) -> None:
    """Several failed saves that nobody was told of come as one ``FlushError`` from ``teardown`` (E1)."""
    blocker = Blocked()

    class Both(Broken):
        def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            assert blocker.go.wait(WAIT_SECONDS)
            super().save_checkpoint(*args, **kwargs)

    plugin = AsyncCheckpointIO(Both(), queue_depth=3)
    for name in ("bad1", "bad2", "good"):
        plugin.save_checkpoint({"a": 1}, tmp_path / name)
    blocker.go.set()
    with pytest.raises(FlushError) as caught:
        plugin.teardown()
    assert [type(error) for error in caught.value.exceptions] == [KeyError, KeyError]
    plugin.teardown()


def test_next_save_raises_the_error_and_is_accepted(tmp_path: Path) -> None:
    """A save never raises its own failure, however soon it comes; the next one does, and is accepted (E1, E2)."""
    base, failed = Broken(), threading.Event()

    def observer(event: Event) -> None:
        if isinstance(event, Failed):
            failed.set()

    plugin = AsyncCheckpointIO(base, observer=observer)
    for number in range(20):
        failed.clear()
        plugin.save_checkpoint({"a": 1}, tmp_path / "bad")
        assert failed.wait(WAIT_SECONDS)
        with pytest.raises(KeyError):
            plugin.save_checkpoint({"a": number}, tmp_path / "good")
        plugin.wait()
        assert base.saved[str(tmp_path / "good")] == {"a": number}
    plugin.teardown()


def test_full_queue_may_be_an_error(tmp_path: Path) -> None:
    """With ``overflow="raise"`` a save that finds no place is refused at the call (B1)."""
    base = Blocked()
    plugin = AsyncCheckpointIO(base, queue_depth=1, overflow="raise")
    plugin.save_checkpoint({"a": 1}, tmp_path / "a")
    with pytest.raises(QueueFullError):
        plugin.save_checkpoint({"a": 2}, tmp_path / "b")
    base.go.set()
    plugin.teardown()
    assert list(base.saved) == [str(tmp_path / "a")]


def test_directory_as_path_is_refused_at_once(tmp_path: Path) -> None:
    """Our own writer refuses a path that is a directory, at the call."""
    plugin = AsyncCheckpointIO()
    with pytest.raises(StoreError, match="directory"):
        plugin.save_checkpoint({"a": 1}, tmp_path)
    plugin.teardown()


# -- the end, and after


def test_teardown_ends_all_and_tears_the_base_down(tmp_path: Path) -> None:
    """When ``teardown`` returns, every save has been written, and the base has been torn down after that."""
    order: list[str] = []

    class Ordered(Base):
        def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            super().save_checkpoint(*args, **kwargs)
            order.append("save")

        def teardown(self) -> None:
            order.append("teardown")

    plugin = AsyncCheckpointIO(Ordered())
    plugin.save_checkpoint({"a": 1}, tmp_path / "a")
    plugin.save_checkpoint({"a": 1}, tmp_path / "b")
    plugin.teardown()
    assert order == ["save", "save", "teardown"]


def test_base_is_torn_down_though_a_save_failed(tmp_path: Path) -> None:
    """A failed save does not keep ``teardown`` from tearing the base down."""
    base = Broken()
    plugin = AsyncCheckpointIO(base)
    plugin.save_checkpoint({"a": 1}, tmp_path / "bad")
    with pytest.raises(KeyError):
        plugin.teardown()
    assert base.teardowns == 1
    plugin.teardown()
    assert base.teardowns == 2


def test_it_works_again_after_teardown(tmp_path: Path) -> None:
    """After ``teardown`` the plugin may be used again, as often as one likes (L1)."""
    plugin = AsyncCheckpointIO()
    plugin.teardown()
    for number in range(3):
        plugin.save_checkpoint({"n": number}, tmp_path / f"{number}.ckpt")
        plugin.teardown()
        plugin.teardown()
    assert [torch.load(tmp_path / f"{number}.ckpt")["n"] for number in range(3)] == [0, 1, 2]


def test_flush_is_wait_awaited(tmp_path: Path) -> None:
    """``await plugin.flush()`` returns when everything is durable."""
    plugin = AsyncCheckpointIO()
    plugin.save_checkpoint({"n": 1}, tmp_path / "a.ckpt")
    anyio.run(plugin.flush)
    assert torch.load(tmp_path / "a.ckpt") == {"n": 1}
    plugin.teardown()
