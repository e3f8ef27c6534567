"""What a base CheckpointIO is believed and what is looked at; options that it would make void; where paths point."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any
from unittest.mock import MagicMock

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from lightning.fabric.plugins import TorchCheckpointIO

from async_ckpt import (
    AsyncCheckpointIO,
    CheckpointExistsError,
    OptionError,
    RemovalDroppedError,
    RetryPolicy,
    StoreError,
)
from async_ckpt.events import Durable, Event, Failed, RemovalDropped, Removed
from tests.support import PATIENCE_SECONDS
from tests.unit.lightning.bases import Base


class Files(Base):
    """A base that writes files, in place, unless told not to."""

    def __init__(self) -> None:
        super().__init__()
        self.swallows = False

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None, **extra: Any) -> None:
        super().save_checkpoint(checkpoint, path, storage_options, **extra)
        if not self.swallows:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(str(checkpoint))

    def remove_checkpoint(self, path: Any) -> None:
        if not self.swallows:
            Path(path).unlink()


class Elsewhere(Base):
    """A base that appends a suffix."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None, **extra: Any) -> None:
        Path(f"{path}.gz").write_text(str(checkpoint))

    def remove_checkpoint(self, path: Any) -> None:
        Path(f"{path}.gz").unlink()


# -- options


@pytest.mark.parametrize(
    "options",
    [
        {"part_size": "1MiB"},
        {"max_concurrent_parts": 7},
        {"priority": "background"},
        {"retry": RetryPolicy(attempts=1)},
        {"storage_options": {"key": "secret-key"}},
        {"store_factory": lambda location, workers: None},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_that_a_base_would_make_void_are_refused(options: dict[str, Any]) -> None:
    """What only our own writer knows is refused together with a base, by name, and what to do is said."""
    name = next(iter(options))
    with pytest.raises(
        OptionError, match=f"{name}: has no effect.*Base writes the files; set it on that base"
    ) as caught:
        AsyncCheckpointIO(Base(), **options)
    assert "secret-key" not in str(caught.value)
    AsyncCheckpointIO(**options)  # is right without one


def test_defaults_that_are_given_are_no_wish() -> None:
    """Who hands all options on, as from a file, with their defaults, is not refused."""
    defaults = {
        "part_size": 128 << 20,
        "max_concurrent_parts": 4,
        "retry": RetryPolicy(),
        "storage_options": None,
    }
    AsyncCheckpointIO(Base(), **defaults, store_factory=None, overwrite=True, durability="fsync")


def test_a_base_that_comes_later_is_asked_the_same() -> None:
    """A strategy that needs a base of its own kind offers it; then, too, no option becomes void without a word."""
    plugin = AsyncCheckpointIO(part_size="1MiB")
    with pytest.raises(OptionError, match="part_size: has no effect, because Files writes"):
        plugin.checkpoint_io = Files()


@pytest.mark.parametrize("kind", ["file", "directory", "dangling link"])
def test_a_base_replaces_nothing_that_may_not_be_replaced(tmp_path: Path, kind: str) -> None:
    """``overwrite=False``: the base is not called where anything is, and what is there stays."""
    path = tmp_path / "x.ckpt"
    if kind == "file":
        path.write_text("old")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("nothing")
    base = Files()
    plugin = AsyncCheckpointIO(base, overwrite=False)
    plugin.save_checkpoint({"a": 1}, path)
    with pytest.raises(CheckpointExistsError, match=r"x\.ckpt"):
        plugin.wait()
    plugin.save_checkpoint({"a": 1}, tmp_path / "new.ckpt")
    plugin.teardown()
    assert [call[1][0] for call in base.calls] == [tmp_path / "new.ckpt"]


def test_nothing_is_replaced_in_the_order_of_the_calls(tmp_path: Path) -> None:
    """``overwrite=False``: what is removed before the save does not stand in its way."""
    plugin = AsyncCheckpointIO(Files(), overwrite=False)
    (tmp_path / "x.ckpt").write_text("old")
    plugin.remove_checkpoint(tmp_path / "x.ckpt")
    plugin.save_checkpoint({"a": 1}, tmp_path / "x.ckpt")
    plugin.teardown()
    assert (tmp_path / "x.ckpt").read_text() == "{'a': 1}"


def test_nothing_is_replaced_on_other_file_systems() -> None:
    """``overwrite=False``: what fsspec finds is not replaced; where only the base could look, it is refused."""
    fsspec.filesystem("memory").pipe("/watched/old.ckpt", b"old")
    base = Base()
    with AsyncCheckpointIO(base, overwrite=False) as plugin:
        plugin.save_checkpoint({"a": 1}, "memory://watched/old.ckpt")
        with pytest.raises(CheckpointExistsError):
            plugin.wait()
        plugin.save_checkpoint({"a": 1}, "memory://watched/new.ckpt")
        with pytest.raises(OptionError, match="only the base can find out"):
            plugin.save_checkpoint({"a": 1}, "vault-of-mine://new")
    assert list(base.saved) == ["memory://watched/new.ckpt"]
    fsspec.filesystem("memory").rm("/watched", recursive=True)


def test_a_base_that_has_every_attribute_is_taken() -> None:
    """A mock in its place, in a user's own tests, is a base like another."""
    base = MagicMock()
    with AsyncCheckpointIO(base) as plugin:
        plugin.save_checkpoint({"a": 1}, "vault://x")
    base.save_checkpoint.assert_called_once()


# -- paths


class Waiting(Base):
    """A base whose saves wait."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None, **extra: Any) -> None:
        assert self.go.wait(PATIENCE_SECONDS)
        super().save_checkpoint(checkpoint, path, storage_options, **extra)


class Fspath:
    """Another kind of path."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return self.path


@pytest.mark.parametrize(
    ("make", "kind"), [(str, str), (Path, Path), (PurePosixPath, PurePosixPath), (Fspath, str)]
)
def test_a_relative_path_points_where_it_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[str], Any], kind: type
) -> None:
    """Whatever the working directory is when it is the base's turn: saves, loads and removals, by name or place."""
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    base = Waiting()
    plugin = AsyncCheckpointIO(base)
    plugin.save_checkpoint({"a": 1}, make("run/a.ckpt"))
    plugin.save_checkpoint({"a": 1}, path=make("run/b.ckpt"))
    plugin.remove_checkpoint(make("run/c.ckpt"))
    monkeypatch.chdir(tmp_path / "other")
    base.go.set()
    plugin.wait()
    monkeypatch.chdir(tmp_path)
    plugin.load_checkpoint(make("run/a.ckpt"))
    plugin.teardown()
    a, b, c = (tmp_path / "run" / name for name in ("a.ckpt", "b.ckpt", "c.ckpt"))
    given = [call[1] if call[0] == "remove" else call[1][0] for call in base.calls]
    assert list(map(os.fspath, given)) == [str(a), str(b), str(c), str(a)]
    assert all(isinstance(path, kind) for path in given)


@pytest.mark.parametrize(
    "path", ["vault://run/7", "/run/7", "~/run/7", "file:///run/7", "s3://bucket/7", 7, b"run"]
)
def test_what_does_not_depend_on_the_working_directory_is_given_as_it_is(path: Any) -> None:
    """A URL, an absolute path, and what is no path reach the base as they are."""
    base = Base()
    with AsyncCheckpointIO(base) as plugin:
        plugin.save_checkpoint({"a": 1}, path)
    assert base.calls[0][1][0] is path


@pytest.mark.parametrize(
    "url",
    ["dbfs:/no-slash/x", "hdfs://nobody-is-installed/x", "simplecache::s3://b/x", "s3://bucket", "box://x"],
)
def test_a_bases_own_urls_are_not_ours_to_refuse(url: str) -> None:
    """A base may have a protocol that fsspec merely knows, or use a URL in a way of its own."""
    base = Base()
    with AsyncCheckpointIO(base) as plugin:
        plugin.save_checkpoint({"a": 1}, url)
        assert plugin.load_checkpoint(url) == {"a": 1}
        plugin.remove_checkpoint(url)
    assert [call[0] for call in base.calls] == ["save", "load", "remove"]


# -- what should be there


class Denying(MemoryFileSystem):  # type: ignore[misc]
    """A file system that denies, as S3 with a wrong key does; and does not tell where it is asked whether there is."""

    protocol = "denying"
    store: dict[str, Any] = {}  # noqa: RUF012 - as its base has it
    pseudo_dirs = [""]  # noqa: RUF012 - as its base has it
    denies: tuple[str, ...] = ()

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return MemoryFileSystem._strip_protocol(str(path).replace("denying://", "memory://"))

    def _open(self, *args: Any, **options: Any) -> Any:
        self._ask("open")
        return super()._open(*args, **options)

    def info(self, *args: Any, **options: Any) -> Any:
        self._ask("info")
        return super().info(*args, **options)

    def _ask(self, what: str) -> None:
        if what in self.denies:
            raise PermissionError(13, "denied")


@pytest.fixture
def denying() -> Any:
    """The file system, which fsspec knows for the time of one test."""
    kind = type("Denying", (Denying,), {"store": {}, "pseudo_dirs": [""]})
    fsspec.register_implementation("denying", kind, clobber=True)
    yield kind
    kind.clear_instance_cache()
    del _registry["denying"]


@pytest.mark.parametrize("earlier", [False, True], ids=["new", "replacing"])
@pytest.mark.parametrize("denies", [("open",), ("open", "info")], ids=" ".join)
def test_a_denial_that_lightnings_own_base_swallows_is_a_failed_save(
    denying: Any, earlier: bool, denies: tuple[str, ...]
) -> None:
    """``TorchCheckpointIO`` swallows PermissionErrors: the save has failed, and frees no deletion (D1, D3)."""
    plugin = AsyncCheckpointIO(TorchCheckpointIO())
    plugin.save_checkpoint({"a": 1}, "denying://run/old.ckpt")
    if earlier:
        plugin.save_checkpoint({"a": 1}, "denying://run/x.ckpt")
    plugin.wait()
    denying.denies = denies
    plugin.save_checkpoint({"a": 2}, "denying://run/x.ckpt")
    with pytest.raises(StoreError, match=r"denying://run/x\.ckpt"):
        _remove_and_wait(plugin, "denying://run/old.ckpt")
    plugin.wait()
    denying.denies = ()
    assert plugin.load_checkpoint("denying://run/old.ckpt") == {"a": 1}
    plugin.teardown()


class Announced(TorchCheckpointIO):
    """A base made from Lightning's."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        super().save_checkpoint(checkpoint, path)


class Registry(TorchCheckpointIO):
    """A base made from Lightning's, for whatever reason, that keeps checkpoints in a way of its own."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        pass


def test_a_base_made_from_lightnings_is_held_to_what_it_has_done(denying: Any) -> None:
    """On remote storage, too: it asks fsspec as Lightning's does, so what it has left there once is looked for."""
    plugin = AsyncCheckpointIO(Announced())
    plugin.save_checkpoint({"a": 1}, "denying://run/a.ckpt")
    plugin.wait()
    denying.denies = ("open",)
    plugin.save_checkpoint({"a": 2}, "denying://run/a.ckpt")
    with pytest.raises(StoreError, match="no new file there"):
        plugin.wait()
    denying.denies = ("open", "info")  # it may have a login that may not look, or not this one
    plugin.save_checkpoint({"a": 2}, "denying://run/b.ckpt")
    plugin.teardown()


def test_a_base_made_from_lightnings_may_write_elsewhere(
    denying: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing of it is there, and nothing fails."""
    with AsyncCheckpointIO(Registry()) as plugin:
        plugin.save_checkpoint({"a": 1}, "denying://run/a.ckpt")
        plugin.remove_checkpoint("denying://run/b.ckpt")
    assert "durability cannot be verified" in caplog.text


def _remove_and_wait(plugin: AsyncCheckpointIO, path: str) -> None:
    """Do both: the first raises an earlier failure that has come already, the second one that comes (E1)."""
    plugin.remove_checkpoint(path)
    plugin.wait()


@pytest.mark.parametrize("replaces", [False, True])
def test_a_base_that_has_written_there_before_is_held_to_it(tmp_path: Path, replaces: bool) -> None:
    """Once a base has left something at a path, a save that leaves nothing new has failed; deletions wait (D1, D3)."""
    base = Files()
    plugin = AsyncCheckpointIO(base)
    plugin.save_checkpoint({"a": 1}, tmp_path / "old.ckpt")
    plugin.wait()
    base.swallows = True
    plugin.save_checkpoint({"a": 1}, tmp_path / ("old.ckpt" if replaces else "new.ckpt"))
    with pytest.raises(StoreError, match="writes_elsewhere = True"):
        plugin.wait()
    plugin.teardown()


def test_the_same_file_written_again_and_again_is_written(tmp_path: Path) -> None:
    """A base that writes the same bytes in place, as fast as it can, is believed: no clock is too coarse for it."""
    with AsyncCheckpointIO(Files(), queue_depth=20) as plugin:
        for _ in range(20):
            plugin.save_checkpoint({"a": 1}, tmp_path / "x.ckpt")
    assert (tmp_path / "x.ckpt").read_text() == "{'a': 1}"


@pytest.mark.parametrize("base", [Base, Elsewhere])
def test_a_base_that_writes_elsewhere_is_let_do_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, base: Callable[[], Any]
) -> None:
    """In memory, or under another name: nothing fails, removals included, and one line says what is not known."""
    with AsyncCheckpointIO(base()) as plugin:
        for number in range(3):
            plugin.save_checkpoint({"a": number}, tmp_path / f"{number}.ckpt")
            if number:
                plugin.remove_checkpoint(tmp_path / f"{number - 1}.ckpt")
    told = [record for record in caplog.records if "durability cannot be verified" in record.getMessage()]
    assert len(told) == 1


def test_a_base_may_say_that_it_writes_elsewhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Then nothing is looked at, and nothing said, although it has written there before."""
    base = Files()
    base.writes_elsewhere = True  # type: ignore[attr-defined]
    with AsyncCheckpointIO(base) as plugin:
        plugin.save_checkpoint({"a": 1}, tmp_path / "x.ckpt")
        plugin.wait()
        base.swallows = True
        plugin.save_checkpoint({"a": 1}, tmp_path / "x.ckpt")
        plugin.save_checkpoint({"a": 1}, tmp_path / "y.ckpt")
    assert not caplog.records


def test_no_old_checkpoint_goes_for_one_that_nobody_has_seen(tmp_path: Path) -> None:
    """A process's saves leave nothing at all: what an earlier one left is not removed, and that is told (D3)."""
    (tmp_path / "old.ckpt").write_text("old")
    base, events = Files(), list[Event]()
    base.swallows = True
    plugin = AsyncCheckpointIO(base, observer=events.append)
    plugin.save_checkpoint({"a": 1}, tmp_path / "new.ckpt")
    plugin.wait()
    base.swallows = False
    plugin.remove_checkpoint(tmp_path / "old.ckpt")
    plugin.teardown()
    assert (tmp_path / "old.ckpt").exists()
    assert isinstance(events[-1], RemovalDropped)


def test_a_removal_that_the_base_swallows_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It has not been carried out: a line in the log, an event and the handle say so; training goes on."""
    base, events = Files(), list[Event]()
    plugin = AsyncCheckpointIO(base, observer=events.append)
    plugin.save_checkpoint({"a": 1}, tmp_path / "x.ckpt")
    plugin.wait()
    base.swallows = True
    plugin.remove_checkpoint(tmp_path / "x.ckpt")
    [handle] = plugin.service.pending or [None]
    if handle is not None:
        with pytest.raises(RemovalDroppedError, match="it still exists"):
            handle.wait()
    plugin.teardown()
    assert "it still exists" in caplog.text
    assert not [event for event in events if isinstance(event, (Removed, Failed))]
    assert [type(event) for event in events if isinstance(event, (Durable, RemovalDropped))] == [
        Durable,
        RemovalDropped,
    ]


def test_lightnings_own_removal_that_is_denied_is_told(
    denying: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """``TorchCheckpointIO`` asks ``exists``, which takes a denial for "nothing there"."""
    plugin = AsyncCheckpointIO(TorchCheckpointIO())
    plugin.save_checkpoint({"a": 1}, "denying://run/x.ckpt")
    plugin.wait()
    denying.denies = ("info",)
    plugin.remove_checkpoint("denying://run/x.ckpt")
    with pytest.raises(StoreError, match="could not be checked"):
        plugin.wait()
    plugin.teardown()
