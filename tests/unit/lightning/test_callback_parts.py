"""The parts of the companion callback, each by itself: overrides, foresight, links, figures, the bar's text, advice."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from async_ckpt import AsyncCheckpointIO
from async_ckpt.events import Accepted, Durable, Event, Failed
from async_ckpt.lightning.compat import keep_protocol, resumable
from async_ckpt.lightning.metrics import figures
from async_ckpt.lightning.model_checkpoint import PendingFileSystem, show_pending_files
from async_ckpt.lightning.notifications import Notifications
from async_ckpt.lightning.overrides import Overrides
from async_ckpt.lightning.progress_bars import pending_text
from async_ckpt.lightning.removals import Removals
from async_ckpt.lightning.strategies import bypass
from async_ckpt.stores import open_store
from async_ckpt.telemetry.meter import Meter, SaveProgress
from async_ckpt.testing.faults import Fault, FaultyStore, Gate


def _save(**fields: Any) -> SaveProgress:
    return SaveProgress(**{"request_id": 1, "url": "a", "nbytes": 100, "accepted_seconds": 0.0, **fields})


def _foresight(file_system: Any, plugin: AsyncCheckpointIO | None = None) -> Any:
    plugin = plugin or AsyncCheckpointIO()
    return PendingFileSystem(
        file_system, plugin, Removals(plugin, Overrides(), is_awaited=lambda path: False)
    )


class _Part:
    def speak(self) -> str:
        return "as ever"


def test_shadows_are_lifted_newest_first() -> None:
    """What was there, the class's own or the object's, is there again; other objects never saw a change."""
    part, other = _Part(), _Part()
    other.speak = lambda: "its own"  # type: ignore[method-assign]
    overrides = Overrides()
    for owner in (part, part, other):
        overrides.replace(owner, "speak", lambda: "shadowed")
    assert [part.speak(), other.speak(), _Part().speak()] == ["shadowed", "shadowed", "as ever"]
    overrides.restore()
    assert [part.speak(), other.speak()] == ["as ever", "its own"]
    assert vars(part) == {}


def test_what_somebody_else_has_put_there_since_stays() -> None:
    """A shadow that is no longer there is not put back over what came after it."""
    part = _Part()
    overrides = Overrides()
    overrides.replace(part, "speak", lambda: "shadowed")
    part.speak = lambda: "newer"  # type: ignore[method-assign]
    overrides.restore()
    assert part.speak() == "newer"


def test_foresight_knows_what_will_be_there(tmp_path: Path) -> None:
    """A pending save exists, a file whose removal is pending does not; all else is asked of the file system."""
    gate = Gate()
    plugin = AsyncCheckpointIO(
        store_factory=lambda location, workers: FaultyStore(
            open_store(location, workers=workers), [Fault(operation="begin", gate=gate)]
        )
    )
    old = tmp_path / "old.ckpt"
    old.write_bytes(b"")
    sight = _foresight(LocalFileSystem(), plugin)
    try:
        plugin.save_checkpoint({}, tmp_path / "new.ckpt")
        plugin.remove_checkpoint(old)
        assert not (tmp_path / "new.ckpt").exists()
        assert old.exists()
        assert [sight.exists(str(path)) for path in (tmp_path / "new.ckpt", old, tmp_path)] == [
            True,
            False,
            True,
        ]
        assert not sight.exists(str(tmp_path / "other"))
    finally:
        gate.open()
        plugin.teardown()
    assert [sight.exists(str(path)) for path in (tmp_path / "new.ckpt", old)] == [True, False]


def test_foresight_passes_for_the_file_system(tmp_path: Path) -> None:
    """Lightning asks for its class, its methods and copies; a copy is the file system alone."""
    file_system = LocalFileSystem()
    sight = _foresight(file_system)
    assert isinstance(sight, LocalFileSystem)
    assert sight.ls(str(tmp_path)) == []
    assert sight.protocol == file_system.protocol
    assert copy.deepcopy(sight) == pickle.loads(pickle.dumps(sight)) == file_system


@pytest.mark.parametrize("value", [16000, None, "fs"])
def test_what_is_no_file_system_is_left_alone(value: Any) -> None:
    """A callback's attribute ``_fs`` that is, say, a sampling rate stays what it is; a file system is wrapped."""
    plugin, overrides = AsyncCheckpointIO(), Overrides()
    removals = Removals(plugin, Overrides(), is_awaited=lambda path: False)
    other, checkpoint = SimpleNamespace(_fs=value), SimpleNamespace(_fs=LocalFileSystem())
    for callback in (other, checkpoint):
        show_pending_files(callback, plugin, removals, overrides, is_deferred=True)
    assert other._fs is value
    assert type(checkpoint._fs) is PendingFileSystem


def test_a_removal_that_fails_holds_up_no_other(caplog: pytest.LogCaptureFixture) -> None:
    """Of four removals, two fail: all are asked for, once; the first error is raised, the other one logged (E1)."""
    asked: list[str] = []

    class Base:
        def remove_checkpoint(self, path: str) -> None:
            asked.append(path)
            if path in "bc":
                raise OSError(path)

        save_checkpoint = save_sharded = key_of = staticmethod(str)

        def will_exist(self, path: str, **options: Any) -> None:
            return None

    plugin: Any = Base()
    removals = Removals(plugin, Overrides(), is_awaited=lambda path: False)
    removals.wait_for_links = True
    for path in "abcd":
        plugin.remove_checkpoint(path)
    with pytest.raises(OSError, match=r"^b$"):
        removals.release(everything=True)
    removals.release(everything=True)
    assert asked == list("abcd")
    assert [record.getMessage() for record in caplog.records] == ["the removal of 'c' could not be requested"]


class _Overtaken(Meter):
    """A meter whose save fails between two looks at it."""

    def _fail(self) -> None:
        event: Event = Failed(request_id=1, url="a", error=OSError("no space"))
        self(event)

    def take_ended(self) -> list[SaveProgress]:
        ended = super().take_ended()
        self._fail()
        return ended

    @property
    def pending(self) -> list[SaveProgress]:
        saves = super().pending
        self._fail()
        return saves


@pytest.mark.parametrize("path", ["a", ""])
def test_a_save_that_fails_while_it_is_looked_for_is_not_told_of(path: str) -> None:
    """A save that ends at the very moment when a logger's call is held back is known, and its failure, too."""
    meter = _Overtaken()
    meter(Accepted(request_id=1, url="a", nbytes=1))
    told: list[Any] = []
    notifications = Notifications(meter, log_metrics=False)
    trainer = SimpleNamespace(callbacks=[], lightning_module=None)
    notifications.hold_back(trainer, told.append, SimpleNamespace(_last_checkpoint_saved=path))
    notifications.notify(trainer)
    assert told == []
    assert not notifications.is_awaited("a")


def test_hooks_are_told_the_path_as_it_was_written() -> None:
    """Events leave the password out; who is to do something with the checkpoint needs it."""
    written, shown = "sftp://ann:hunter2@host/x", "sftp://ann:***@host/x"
    meter, told = Meter(), list[str]()
    notifications = Notifications(meter, log_metrics=False, address_of={shown: written}.__getitem__)
    meter(Accepted(request_id=1, url=shown, nbytes=1))
    callback = SimpleNamespace(on_checkpoint_write_end=lambda _, path: told.append(path))
    trainer = SimpleNamespace(callbacks=[callback], lightning_module=None)
    notifications.hold_back(trainer, lambda _: None, SimpleNamespace(_last_checkpoint_saved=written))
    assert notifications.is_awaited(written)
    meter(Durable(request_id=1, url=shown, nbytes=1, seconds=1.0))
    notifications.notify(trainer)
    assert told == [written]
    assert not notifications.is_awaited(written)


@pytest.mark.parametrize("path", ["unknown-protocol://a/b", "memory://", ""])
def test_foresight_leaves_what_can_be_no_checkpoint(path: str) -> None:
    """The file system alone is asked for a path that no checkpoint can have."""
    asked: list[str] = []
    file_system = SimpleNamespace(exists=lambda path: asked.append(path) or False)  # type: ignore[func-returns-value]
    assert not _foresight(file_system).exists(path)
    assert asked == [path]


@pytest.mark.parametrize(
    ("saves", "text"),
    [
        ([], ""),
        ([_save()], "1"),
        ([_save(), _save(written_bytes=50)], "2 (25%)"),
        ([_save(written_bytes=101)], "1 (99%)"),
        ([_save(nbytes=0)], "1"),
    ],
)
def test_text_of_pending_saves(saves: list[SaveProgress], text: str) -> None:
    """The bar shows their number, and how far they are once something is written."""
    assert pending_text(saves) == text


def test_figures_of_a_save() -> None:
    """Durations in seconds, bytes, bytes a second from the call until it was durable, and what else is pending."""
    save = _save(nbytes=100, stall_seconds=0.5, staged_seconds=0.25, durable_seconds=2.0)
    assert figures(save, 3) == {
        "checkpoint/stall_seconds": 0.5,
        "checkpoint/staged_seconds": 0.25,
        "checkpoint/durable_seconds": 2.0,
        "checkpoint/pending": 3.0,
        "checkpoint/bytes": 100.0,
        "checkpoint/throughput": 50.0,
    }


@pytest.mark.parametrize(
    ("protocol", "listed", "kept"),
    [
        ("memory", "/run/last.ckpt", "memory:///run/last.ckpt"),
        ("memory", "memory:/run/last.ckpt", "memory://run/last.ckpt"),
        ("memory", "memory:///run/last.ckpt", "memory:///run/last.ckpt"),
        ("file", "/run/last.ckpt", "/run/last.ckpt"),
    ],
)
def test_protocol_is_kept(protocol: str, listed: str, kept: str) -> None:
    """What a remote file system lists becomes a URL, once; a local path stays as it is."""
    assert keep_protocol(listed, fsspec.filesystem(protocol)) == kept


@pytest.mark.parametrize(
    ("names", "is_seen"),
    [
        ([".metadata", "__0_0.distcp", "meta.pt"], True),
        (["__0_0.distcp"], False),
        ([], False),
        (["checkpoint", "zero_to_fp32.py"], True),  # DeepSpeed's
    ],
)
def test_what_can_be_resumed_of_a_directory(tmp_path: Path, names: list[str], is_seen: bool) -> None:
    """A sharded checkpoint that has no marker is passed over; in object storage its marker stands for one that has."""
    (tmp_path / "last.ckpt").mkdir()
    memory = fsspec.filesystem("memory")
    memory.mkdirs(f"{tmp_path}/last.ckpt")
    for name in names:
        (tmp_path / "last.ckpt" / name).touch()
        memory.touch(f"{tmp_path}/last.ckpt/{name}")
    path = str(tmp_path / "last.ckpt")
    assert resumable(path, fsspec.filesystem("file")) == (path if is_seen else None)
    marker = "/.metadata" if ".metadata" in names else ""
    assert resumable(path, memory) == (f"memory://{path}{marker}" if is_seen else None)
    memory.rm(str(tmp_path), recursive=True)


class FSDPStrategy:
    """Sharded, by its name."""

    _state_dict_type = "sharded"


class Full(FSDPStrategy):
    """Not sharded."""

    _state_dict_type = "full"


class ModelParallelStrategy:
    """Sharded, by its name."""

    _save_distributed_checkpoint = True


class DeepSpeedStrategy:
    """Known by its name alone."""


@pytest.mark.parametrize(
    ("strategy", "instead"),
    [
        (FSDPStrategy(), 'the save_checkpoint of Lightning\'s FSDPStrategy, and overflow="block"'),
        (
            ModelParallelStrategy(),
            'the save_checkpoint of Lightning\'s ModelParallelStrategy, and overflow="block"',
        ),
        (DeepSpeedStrategy(), 'FSDPStrategy(state_dict_type="sharded") or DDPStrategy()'),
    ],
)
def test_strategies_that_write_past_any_plugin(strategy: Any, instead: str) -> None:
    """The advice names the strategy and what to use instead."""
    advice = bypass(strategy)
    assert advice is not None
    assert advice.startswith(type(strategy).__name__)
    assert advice.endswith(f"Use {instead}.")


def test_strategies_that_write_through_the_plugin() -> None:
    """There is no advice where full checkpoints go through the plugin."""
    assert bypass(Full()) is None
    assert bypass(object()) is None
