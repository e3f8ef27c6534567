"""Trainings on storage that fails: each error is seen once, and never in place of the training's own."""

from __future__ import annotations

import errno
import signal
import threading
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt import AsyncCheckpointIO, FlushError
from async_ckpt.events import Event, Failed
from tests.support import PATIENCE_SECONDS, reached

pytestmark = pytest.mark.integration


def _disk_full() -> OSError:
    return OSError(errno.ENOSPC, "the disk is full, says the test")


class _Breaks(Exception):
    """The training's own error."""


def _training_step(step: int, error: type[BaseException] = _Breaks) -> Any:
    """Return a training step that breaks at *step*."""

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.global_step == step:
            raise error("training broke")
        return self.layer(batch[0]).pow(2).mean()

    return training_step


def test_failed_replacement_keeps_the_previous_one(
    tree: Any, tmp_path: Path, faults: Any, names: Any
) -> None:
    """``save_top_k=1``: where the newer save fails, the older file is not deleted (D3), and ``fit`` raises."""
    faults.fail(2, error=_disk_full)
    plugin = AsyncCheckpointIO(store_factory=faults.make)
    trainer = tree.trainer(
        tmp_path, max_epochs=2, plugins=[plugin], callbacks=[tree.checkpoints(tmp_path / "ckpt")]
    )
    with pytest.raises(OSError, match="says the test"):
        trainer.fit(tree.model())
    assert names(tmp_path / "ckpt") == ["epoch=0-step=4.ckpt"]
    assert torch.load(tmp_path / "ckpt" / "epoch=0-step=4.ckpt")["epoch"] == 0


def test_training_goes_on_where_errors_are_warnings(
    tree: Any, tmp_path: Path, faults: Any, names: Any
) -> None:
    """``on_error="warn"``: one failed save of three is a warning; the file it should have replaced stays too."""
    faults.fail(2, error=_disk_full)
    plugin = AsyncCheckpointIO(store_factory=faults.make, on_error="warn")
    trainer = tree.trainer(
        tmp_path, max_epochs=3, plugins=[plugin], callbacks=[tree.checkpoints(tmp_path / "ckpt")]
    )
    with pytest.warns(RuntimeWarning, match="says the test"):
        trainer.fit(tree.model())
    assert trainer.global_step == 12
    assert names(tmp_path / "ckpt") == ["epoch=0-step=4.ckpt", "epoch=2-step=12.ckpt"]


def test_next_save_raises_it_once_with_the_workers_traceback(
    tree: Any, tmp_path: Path, faults: Any, names: Any
) -> None:
    """A save that failed is raised at the next one, once, from where it failed; that next save is written (E1, E2)."""
    failed = threading.Event()

    def observer(event: Event) -> None:
        if isinstance(event, Failed):
            failed.set()

    class WaitsForTheFailure(tree.pl.Callback):  # type: ignore[misc]
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                assert failed.wait(PATIENCE_SECONDS)

    faults.fail(1, error=_disk_full)
    plugin = AsyncCheckpointIO(store_factory=faults.make, observer=observer)
    trainer = tree.trainer(
        tmp_path,
        max_epochs=5,
        plugins=[plugin],
        callbacks=[WaitsForTheFailure(), tree.checkpoints(tmp_path / "ckpt")],
    )
    with pytest.raises(OSError, match="says the test") as caught:
        trainer.fit(tree.model())
    trace = "".join(traceback.format_exception(caught.value))
    assert "writers.py" in trace
    assert trainer.current_epoch == 1
    assert names(tmp_path / "ckpt") == ["epoch=1-step=8.ckpt"]
    plugin.wait()
    plugin.teardown()


def test_several_failures_come_as_one(tree: Any, tmp_path: Path, faults: Any) -> None:
    """All saves fail, none is known before the end: teardown raises them together, as a ``FlushError``."""
    gate = faults.hold(operation="begin")
    faults.fail(error=_disk_full)

    class OpensTheGate(tree.pl.Callback):  # type: ignore[misc]
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            gate.open()

    plugin = AsyncCheckpointIO(store_factory=faults.make, queue_depth=4)
    trainer = tree.trainer(
        tmp_path,
        max_epochs=2,
        plugins=[plugin],
        callbacks=[OpensTheGate(), tree.checkpoints(tmp_path / "ckpt", save_top_k=-1)],
    )
    with pytest.raises(FlushError) as caught:
        trainer.fit(tree.model())
    assert [str(error) for error in caught.value.exceptions] == [str(_disk_full())] * 2


def test_next_fit_works(tree: Any, tmp_path: Path, faults: Any, names: Any) -> None:
    """After a fit that ended with a failed save, the same Trainer and plugin fit again (E1, L1)."""
    faults.fail(1, error=_disk_full)
    plugin = AsyncCheckpointIO(store_factory=faults.make)
    trainer = tree.trainer(tmp_path, plugins=[plugin], callbacks=[tree.checkpoints(tmp_path / "ckpt")])
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(OSError, match="says the test"):
        trainer.fit(tree.model())
    assert names(tmp_path / "ckpt") == []
    assert signal.getsignal(signal.SIGTERM) is handler
    trainer.fit_loop.max_epochs = 2
    trainer.fit(tree.model())
    assert names(tmp_path / "ckpt") == ["epoch=1-step=8.ckpt"]


def test_trainings_own_error_stays_first(tree: Any, tmp_path: Path, faults: Any) -> None:
    """Training breaks while a save fails: ``fit`` raises the training's error; ours is a note on it (E2)."""
    faults.fail(error=_disk_full)
    plugin = AsyncCheckpointIO(store_factory=faults.make)
    trainer = tree.trainer(
        tmp_path, max_epochs=3, plugins=[plugin], callbacks=[tree.checkpoints(tmp_path / "ckpt")]
    )
    with pytest.raises(_Breaks, match="training broke") as caught:
        trainer.fit(tree.model(training_step=_training_step(4)))
    assert any("says the test" in note for note in getattr(caught.value, "__notes__", ["says the test"]))
    plugin.wait()
    plugin.teardown()


@pytest.mark.filterwarnings("ignore:.?.fit.ckpt_path=")
def test_save_on_exception(tree: Any, tmp_path: Path, faults: Any, names: Any) -> None:
    """A checkpoint saved because training broke is durable when ``fit`` raises, on slow storage too."""
    faults.slow(0.3)
    plugin = AsyncCheckpointIO(store_factory=faults.make)
    checkpoint = tree.module("callbacks").OnExceptionCheckpoint(tmp_path / "ckpt")
    trainer = tree.trainer(
        tmp_path, max_epochs=3, plugins=[plugin], callbacks=[checkpoint], enable_checkpointing=True
    )
    with pytest.raises(_Breaks):
        trainer.fit(tree.model(training_step=_training_step(6)))
    assert names(tmp_path / "ckpt") == ["on_exception.ckpt"]
    assert torch.load(tmp_path / "ckpt" / "on_exception.ckpt")["global_step"] == 6


def test_lr_find_on_broken_storage(tree: Any, tmp_path: Path, faults: Any, names: Any) -> None:
    """Where the learning rate finder's own save fails, it raises that error, not a missing file."""
    faults.fail(1, error=_disk_full)
    plugin = AsyncCheckpointIO(store_factory=faults.make)
    trainer = tree.trainer(tmp_path, plugins=[plugin])
    with pytest.raises(OSError, match="says the test"):
        tree.module("tuner").Tuner(trainer).lr_find(tree.model(), num_training=5)
    assert names(tmp_path) == []
    tree.trainer(tmp_path, plugins=[plugin]).fit(tree.model())


def test_load_right_after_a_save_that_fails(tree: Any, tmp_path: Path, faults: Any) -> None:
    """A load waits for the save of its path; where that fails, the load raises why, and not an older content."""
    gate = faults.hold(2, operation="begin")
    faults.fail(2, error=_disk_full)
    plugin = AsyncCheckpointIO(store_factory=faults.make)
    strategy = tree.trainer(tmp_path, plugins=[plugin]).strategy
    strategy.save_checkpoint({"step": 1}, tmp_path / "a.ckpt")
    plugin.wait()
    strategy.save_checkpoint({"step": 2}, tmp_path / "a.ckpt")
    reached(gate)
    opener = threading.Timer(0.05, gate.open)
    opener.start()
    with pytest.raises(OSError, match="says the test"):
        strategy.load_checkpoint(tmp_path / "a.ckpt")
    opener.join()
    assert strategy.load_checkpoint(tmp_path / "a.ckpt") == {"step": 1}
    plugin.teardown()


def test_unpicklable_state_fails_at_the_save(tree: Any, tmp_path: Path, names: Any) -> None:
    """What pickle refuses is an error at the call, which says where it is; nothing is left behind."""

    def on_save_checkpoint(self: Any, checkpoint: Any) -> None:
        checkpoint["mine"] = lambda: 0

    plugin = AsyncCheckpointIO()
    trainer = tree.trainer(tmp_path, plugins=[plugin], callbacks=[tree.checkpoints(tmp_path / "ckpt")])
    with pytest.raises(TypeError, match=r"state\['mine'\]"):
        trainer.fit(tree.model(on_save_checkpoint=on_save_checkpoint))
    assert names(tmp_path / "ckpt") == []


def test_interrupt_waits_for_pending_saves(tree: Any, tmp_path: Path, faults: Any, names: Any) -> None:
    """Ctrl-C in ``fit``: the save that was under way is durable when Lightning ends the program."""
    faults.slow(0.3)
    plugin = AsyncCheckpointIO(store_factory=faults.make)
    trainer = tree.trainer(
        tmp_path, max_epochs=3, plugins=[plugin], callbacks=[tree.checkpoints(tmp_path / "ckpt")]
    )
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            trainer.fit(tree.model(training_step=_training_step(4, KeyboardInterrupt)))
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores it from then on
    assert names(tmp_path / "ckpt") == ["epoch=0-step=4.ckpt"]


@pytest.mark.filterwarnings("ignore:.?.fit.ckpt_path=")
def test_trainings_own_error_stays_first_where_its_own_checkpoint_fails(
    tree: Any, tmp_path: Path, faults: Any
) -> None:
    """The only save is the one made because training broke, and it fails: the training's error is raised (E2)."""
    faults.fail(error=_disk_full)
    plugin = AsyncCheckpointIO(store_factory=faults.make)
    trainer = tree.trainer(
        tmp_path,
        plugins=[plugin],
        callbacks=[tree.module("callbacks").OnExceptionCheckpoint(tmp_path / "ckpt")],
        enable_checkpointing=True,
    )
    with pytest.raises(_Breaks, match="training broke") as caught:
        trainer.fit(tree.model(training_step=_training_step(2)))
    assert any("says the test" in note for note in getattr(caught.value, "__notes__", ["says the test"]))
    plugin.teardown()
