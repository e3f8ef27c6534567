"""Whose file may be used in the next line, inside ``fit``: everybody's but that of Lightning's own callbacks.

Storage is slow, or held, throughout, so a file that is there has been waited for.
"""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from async_ckpt import AsyncCheckpointCallback, AsyncCheckpointIO
from async_ckpt.errors import OptionError

pytestmark = pytest.mark.integration

SLOW_SECONDS = 0.05

#: The two distributions have the same code here; where that decides nothing, one is enough.
ONE_TREE = pytest.mark.parametrize("tree", ["pytorch_lightning"], indirect=True)


def _global_step(path: Any) -> int:
    return int(torch.load(path)["global_step"])


def _fit(tree: Any, folder: Path, plugin: AsyncCheckpointIO, *callbacks: Any, **options: Any) -> Any:
    trainer = tree.trainer(
        folder, plugins=[plugin], callbacks=[*callbacks, AsyncCheckpointCallback()], **options
    )
    trainer.fit(tree.model())
    return trainer


# -- a save of somebody's own


@pytest.mark.parametrize("base", [False, True], ids=["own writer", "base"])
@pytest.mark.parametrize("way", ["trainer", "weights only", "strategy", "plugin"])
def test_a_direct_save_is_there_in_the_next_line(
    tree: Any, tmp_path: Path, faults: Any, way: str, base: bool
) -> None:
    """Whoever saves by hand in ``fit``, on whichever way, may rename the file at once."""
    faults.slow(SLOW_SECONDS)
    used: list[int] = []

    class Renames(tree.pl.Callback):  # type: ignore[misc]  # a base that is found at run time
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            beside = tmp_path / f"{trainer.global_step}.tmp"
            if way in ("trainer", "weights only"):
                trainer.save_checkpoint(beside, weights_only=way == "weights only")
            else:
                checkpoint = trainer._checkpoint_connector.dump_checkpoint(False)
                saver = trainer.strategy if way == "strategy" else plugin
                saver.save_checkpoint(checkpoint, str(beside))
            os.replace(beside, tmp_path / "newest.ckpt")
            used.append(_global_step(tmp_path / "newest.ckpt"))

    class Slow(tree.fabric.plugins.TorchCheckpointIO):  # type: ignore[misc]  # the same
        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            slow.wait(SLOW_SECONDS)
            super().save_checkpoint(checkpoint, path)

    slow = Event()
    plugin = AsyncCheckpointIO(Slow()) if base else AsyncCheckpointIO(store_factory=faults.make)
    _fit(tree, tmp_path, plugin, Renames())
    assert used == [1, 2, 3, 4]


@pytest.mark.parametrize("option", ["durable", "async"])
def test_the_option_says_whether_a_direct_save_waits(
    tree: Any, tmp_path: Path, faults: Any, option: Any
) -> None:
    """With ``direct_saves="async"`` the file is not there yet, and everything is when ``fit`` returns."""
    gate = faults.hold(1)
    if option == "durable":
        gate.open()
    seen: list[bool] = []

    class Saves(tree.pl.Callback):  # type: ignore[misc]  # the same
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "a.ckpt")
                seen.append((tmp_path / "a.ckpt").exists())
                gate.open()

    plugin = AsyncCheckpointIO(store_factory=faults.make, direct_saves=option)
    for each in (plugin, pickle.loads(pickle.dumps(AsyncCheckpointIO(direct_saves=option)))):
        assert each.direct_saves == option
    _fit(tree, tmp_path, plugin, Saves())
    assert seen == [option == "durable"]
    assert _global_step(tmp_path / "a.ckpt") == 2


def test_the_option_is_checked() -> None:
    """Another value than the two is refused, with both of them in the message."""
    with pytest.raises(OptionError, match=r"direct_saves='sync': must be one of 'durable', 'async'"):
        AsyncCheckpointIO(direct_saves="sync")  # type: ignore[arg-type]


def test_its_failure_is_raised_at_the_call_and_once(tree: Any, tmp_path: Path, faults: Any) -> None:
    """The caller meets the error of the very save; who goes on after that hears of it no more, nor does ``fit``."""
    faults.fail(1, error=lambda: OSError("no space"))
    raised: list[str] = []

    class Saves(tree.pl.Callback):  # type: ignore[misc]  # the same
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            try:
                trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")
            except OSError as error:
                raised.append(f"{error} at {trainer.global_step}")

    _fit(tree, tmp_path, AsyncCheckpointIO(store_factory=faults.make), Saves())
    assert raised == ["no space at 1"]
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["2.ckpt", "3.ckpt", "4.ckpt"]


def test_it_leaves_the_saves_of_model_checkpoint_asynchronous(tree: Any, tmp_path: Path, faults: Any) -> None:
    """A ``ModelCheckpoint`` beside a callback that saves by hand goes on without waiting, saves and links."""
    gate = faults.hold(2)  # the first of ModelCheckpoint's
    seen: list[list[str]] = []

    class Saves(tree.pl.Callback):  # type: ignore[misc]  # the same
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 0:
                trainer.save_checkpoint(tmp_path / "begun.ckpt")
            seen.append(sorted(path.name for path in tmp_path.rglob("*.ckpt")))

        def on_train_end(self, *args: Any) -> None:
            gate.open()

    checkpoint = tree.checkpoints(tmp_path, every_n_train_steps=1, save_top_k=-1, save_last="link")
    plugin = AsyncCheckpointIO(store_factory=faults.make, queue_depth=8)
    _fit(tree, tmp_path, plugin, Saves(), checkpoint)
    assert seen == [["begun.ckpt"]] * 4
    assert _global_step(tmp_path / "last.ckpt") == 4


# -- what is made from Lightning's own


def _subclass(tree: Any, name: str, use: Callable[[Any, str], None]) -> Any:
    """Return a subclass of ``ModelCheckpoint`` that goes on with the file after the method *name* of Lightning's."""
    base = tree.pl.callbacks.ModelCheckpoint

    def method(self: Any, *args: Any, **kwargs: Any) -> None:
        before = self._last_checkpoint_saved
        getattr(base, name)(self, *args, **kwargs)
        if self._last_checkpoint_saved != before:
            use(self, self._last_checkpoint_saved)

    return type("Registers", (base,), {name: method})


METHODS = [
    "_save_checkpoint",
    "_save_topk_checkpoint",
    "_save_none_monitor_checkpoint",
    "on_train_batch_end",
    "on_train_epoch_end",
]


@pytest.mark.parametrize("method", METHODS)
def test_a_subclass_may_use_the_file_where_it_goes_on(
    tree: Any, tmp_path: Path, faults: Any, method: str
) -> None:
    """A subclass that uploads after ``super()``, in whichever method, finds the file whole."""
    faults.slow(SLOW_SECONDS)
    uploaded: list[int] = []
    kind = _subclass(tree, method, lambda _, path: uploaded.append(_global_step(path)))
    options = {} if method == "on_train_epoch_end" else {"every_n_train_steps": 1}
    _fit(tree, tmp_path, AsyncCheckpointIO(store_factory=faults.make), kind(tmp_path / "ckpt", **options))
    assert uploaded == ([4] if method == "on_train_epoch_end" else [1, 2, 3, 4])


@ONE_TREE
def test_a_subclass_may_keep_the_file_that_it_is_to_remove(tree: Any, tmp_path: Path, faults: Any) -> None:
    """One that moves old checkpoints to an archive, where Lightning removes them, moves whole ones."""
    faults.slow(SLOW_SECONDS)
    archive = tmp_path / "archive"
    archive.mkdir()

    class Keeps(tree.pl.callbacks.ModelCheckpoint):  # type: ignore[misc]  # the same
        def _remove_checkpoint(self, trainer: Any, filepath: str) -> None:
            shutil.move(filepath, archive)

    checkpoint = Keeps(tmp_path / "ckpt", every_n_train_steps=1)
    _fit(tree, tmp_path, AsyncCheckpointIO(store_factory=faults.make), checkpoint)
    assert sorted(_global_step(path) for path in archive.iterdir()) == [1, 2, 3]


@ONE_TREE
@pytest.mark.parametrize("own_link", [False, True], ids=["their link", "own link"])
def test_a_subclass_finds_its_link(tree: Any, tmp_path: Path, faults: Any, own_link: bool) -> None:
    """``last.ckpt`` of ``save_last="link"`` leads to the new file when a subclass goes on, or is its own copy."""
    faults.slow(SLOW_SECONDS)
    led_to: list[int] = []

    class Copies(tree.pl.callbacks.ModelCheckpoint):  # type: ignore[misc]  # the same
        @staticmethod
        def _link_checkpoint(trainer: Any, filepath: str, linkpath: str) -> None:
            shutil.copy(filepath, linkpath)

        def on_train_batch_end(self, *args: Any) -> None:
            super().on_train_batch_end(*args)
            led_to.append(_global_step(self.last_model_path))

    if not own_link:
        del Copies._link_checkpoint
    checkpoint = Copies(tmp_path / "ckpt", save_last="link", every_n_train_steps=1)
    _fit(tree, tmp_path, AsyncCheckpointIO(store_factory=faults.make), checkpoint)
    assert led_to == [1, 2, 3, 4]
    assert (tmp_path / "ckpt" / "last.ckpt").is_symlink() is not own_link


@pytest.mark.parametrize("where", ["object", "class", "trainer", "trainer class", "strategy"])
def test_what_comes_around_lightnings_own_may_use_the_file(
    tree: Any, tmp_path: Path, faults: Any, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """A library that replaces Lightning's functions by its own, to upload what was saved, finds the file whole."""
    faults.slow(SLOW_SECONDS)
    uploaded: list[int] = []
    checkpoint = tree.checkpoints(tmp_path / "ckpt", every_n_train_steps=1)
    strategy = tree.module("strategies").SingleDeviceStrategy("cpu")
    owner, name = {
        "object": (checkpoint, "_save_checkpoint"),
        "class": (type(checkpoint), "_save_checkpoint"),
        "trainer": (None, "save_checkpoint"),
        "trainer class": (tree.pl.Trainer, "save_checkpoint"),
        "strategy": (strategy, "save_checkpoint"),
    }[where]

    def uploads(owner: Any, name: str) -> None:
        theirs = getattr(owner, name)

        @wraps(theirs)
        def save_and_upload(*args: Any, **kwargs: Any) -> None:
            theirs(*args, **kwargs)
            path = next(each for each in args if isinstance(each, (str, Path)))
            uploaded.append(_global_step(path))

        monkeypatch.setattr(owner, name, save_and_upload)

    class Uploads(tree.pl.Callback):  # type: ignore[misc]  # the same
        def setup(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
            uploads(trainer if owner is None else owner, name)

    plugin = AsyncCheckpointIO(store_factory=faults.make)
    _fit(tree, tmp_path, plugin, Uploads(), checkpoint, strategy=strategy)
    assert uploaded == [1, 2, 3, 4]


@ONE_TREE
def test_a_subclass_that_only_names_its_files_goes_on(tree: Any, tmp_path: Path, faults: Any) -> None:
    """Other names, another choice of moments, another state: that is no use of a file, and nobody waits."""
    gate = faults.hold()
    seen: list[bool] = []

    class Names(tree.pl.callbacks.ModelCheckpoint):  # type: ignore[misc]  # the same
        CHECKPOINT_NAME_LAST = "newest"

        def format_checkpoint_name(self, *args: Any, **kwargs: Any) -> str:
            return str(super().format_checkpoint_name(*args, **kwargs)).replace("epoch", "Epoch")

        def _should_skip_saving_checkpoint(self, trainer: Any) -> bool:
            return bool(super()._should_skip_saving_checkpoint(trainer))

        def on_train_end(self, *args: Any) -> None:
            pass

        def state_dict(self) -> dict[str, Any]:
            return {**super().state_dict(), "more": 1}

    class Looks(tree.pl.Callback):  # type: ignore[misc]  # the same
        def on_train_end(self, *args: Any) -> None:
            seen.append(any((tmp_path / "ckpt").glob("*.ckpt")))
            gate.open()

    plugin = AsyncCheckpointIO(store_factory=faults.make)
    _fit(tree, tmp_path, plugin, Looks(), Names(tmp_path / "ckpt"))
    assert seen == [False]
    assert [path.name for path in (tmp_path / "ckpt").iterdir()] == ["Epoch=0-step=4.ckpt"]


# -- what comes in between


@contextmanager
def _handling(handler: Callable[..., object]) -> Iterator[None]:
    before = signal.signal(signal.SIGUSR2, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_signal_handler_inside_of_a_deferred_save_has_its_file(
    tree: Any, tmp_path: Path, faults: Any
) -> None:
    """A preemption handler that interrupts ``ModelCheckpoint`` at its save, saves beside and renames, does what it
    does with synchronous checkpoints; the save that it interrupted is still deferred.
    """
    gate = faults.hold(2)  # ModelCheckpoint's
    ours: list[int] = []

    def on_save_checkpoint(self: Any, checkpoint: Any) -> None:
        if not ours:
            ours.append(-1)
            signal.raise_signal(signal.SIGUSR2)

    def handler(*args: Any) -> None:
        trainer.save_checkpoint(tmp_path / "preempted.tmp")
        os.replace(tmp_path / "preempted.tmp", tmp_path / "preempted.ckpt")
        ours.append(_global_step(tmp_path / "preempted.ckpt"))

    class Opens(tree.pl.Callback):  # type: ignore[misc]  # the same
        def on_train_end(self, *args: Any) -> None:
            assert not list((tmp_path / "ckpt").glob("*.ckpt"))
            gate.open()

    trainer = tree.trainer(
        tmp_path,
        plugins=[AsyncCheckpointIO(store_factory=faults.make)],
        callbacks=[Opens(), AsyncCheckpointCallback(), tree.checkpoints(tmp_path / "ckpt")],
    )
    with _handling(handler):
        trainer.fit(tree.model(on_save_checkpoint=on_save_checkpoint))
    assert ours == [-1, 4]
    assert [path.name for path in (tmp_path / "ckpt").iterdir()] == ["epoch=0-step=4.ckpt"]


@ONE_TREE
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_copy_of_a_callback_is_a_plain_one(tree: Any, tmp_path: Path, copied: Callable[[Any], Any]) -> None:
    """A ``ModelCheckpoint`` that is copied, or pickled, in the middle of a fit is one of Lightning's, with nothing of
    ours in it.
    """
    copies: list[Any] = []

    class Copies(tree.pl.Callback):  # type: ignore[misc]  # the same
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            copies.append(copied(checkpoint))

    checkpoint = tree.checkpoints(tmp_path / "ckpt")
    trainer = tree.trainer(
        tmp_path,
        plugins=[AsyncCheckpointIO()],
        callbacks=[Copies(), AsyncCheckpointCallback(), checkpoint],
        limit_train_batches=2,
        limit_val_batches=0,
    )
    trainer.fit(tree.module("demos.boring_classes").BoringModel())
    saves = copies[0]._save_checkpoint
    assert saves.__func__ is type(checkpoint)._save_checkpoint
    assert saves.__self__ is copies[0]


# -- errors


@pytest.mark.filterwarnings("ignore:.?.fit.ckpt_path=")  # where it finds nothing to resume from
@pytest.mark.parametrize("fails", [False, True])
def test_what_lightning_saves_because_of_an_error_replaces_none(
    tree: Any, tmp_path: Path, faults: Any, fails: bool
) -> None:
    """``OnExceptionCheckpoint`` saves; where storage fails then, training's own error is still the one raised (E2)."""
    faults.slow(SLOW_SECONDS)
    if fails:
        faults.fail(error=lambda: OSError("no space"))

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        raise RuntimeError("of the training")

    class Rescues(tree.pl.callbacks.OnExceptionCheckpoint):  # type: ignore[misc]  # the same
        def teardown(self, *args: Any) -> None:
            pass  # Lightning's own removes it when all went well

    trainer = tree.trainer(
        tmp_path,
        plugins=[AsyncCheckpointIO(store_factory=faults.make)],
        callbacks=[AsyncCheckpointCallback(), Rescues(tmp_path)],
    )
    with pytest.raises(RuntimeError, match="of the training"):
        trainer.fit(tree.model(training_step=training_step))
    assert (tmp_path / "on_exception.ckpt").exists() is not fails
