"""``AsyncCheckpointIO`` itself: what Lightning asks of it, our own writer behind it, its end and what comes after."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch

from async_ckpt import (
    AsyncCheckpointIO,
    OptionError,
    StoreError,
)
from tests.unit.lightning.bases import Base, Broken, TorchCheckpointIO


def test_it_is_true_and_not_iterable() -> None:
    """Lightning tests a plugin's truth and takes iterables apart: it is neither false nor iterable."""
    for plugin in (AsyncCheckpointIO(), AsyncCheckpointIO(Base())):
        assert bool(plugin)
        assert not isinstance(plugin, Iterable)
        with pytest.raises(TypeError):
            iter(plugin)
        with pytest.raises(TypeError):
            len(plugin)


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


@pytest.mark.parametrize(
    "options", [{"queue_depth": 0}, {"queue_length": 2}, {"overflow": "drop"}, {"observer": 3}]
)
def test_bad_options_are_refused_at_once(options: dict[str, Any]) -> None:
    """A bad option is an error of the constructor, not of the first save."""
    with pytest.raises(OptionError, match=next(iter(options))):
        AsyncCheckpointIO(**options)


@pytest.mark.parametrize("base", [Base, "s3://bucket/run", {"class_path": "Base"}])
def test_a_base_that_is_no_checkpoint_io_is_refused_at_once(base: Any) -> None:
    """A class in place of its instance, a URL, a configuration: each is an error of the constructor, which says so."""
    with pytest.raises(OptionError, match=r"checkpoint_io=.*: must be a CheckpointIO"):
        AsyncCheckpointIO(base)


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
    """``weights_only=None`` means what it means for ``torch.load``, ``False`` before 2.6; ``False`` loads any object.

    Nothing at all means ``None``, but ``False`` where Lightning is older than 2.6, as with its own writer.
    """
    plugin, path = AsyncCheckpointIO(), tmp_path / "a.ckpt"
    plugin.save_checkpoint({"path": Path("x")}, path)
    is_old = version("pytorch-lightning").startswith(("2.4.", "2.5."))
    is_old_torch = version("torch").startswith(("2.4.", "2.5."))
    refused: list[dict[str, Any]] = [{"weights_only": True}]
    loaded: list[dict[str, Any]] = [{"weights_only": False}]
    (loaded if is_old_torch else refused).append({"weights_only": None})
    (loaded if is_old or is_old_torch else refused).append({})
    for options in refused:
        with pytest.raises(pickle.UnpicklingError):
            plugin.load_checkpoint(path, **options)
    for options in loaded:
        assert plugin.load_checkpoint(path, **options) == {"path": Path("x")}
    plugin.teardown()


def test_directory_as_path_is_refused_at_once(tmp_path: Path) -> None:
    """Our own writer refuses a path that is a directory, at the call."""
    plugin = AsyncCheckpointIO()
    with pytest.raises(StoreError, match="directory"):
        plugin.save_checkpoint({"a": 1}, tmp_path)
    plugin.teardown()


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
