"""The companion callback's hook, its part of the progress bar, and its timeline."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

from async_ckpt import AsyncCheckpointCallback, AsyncCheckpointIO
from tests.integration.lightning.notes import Notes, at_steps, reading_logger

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def test_hooks_are_called_on_the_training_thread(
    tree: Any, tmp_path: Path, faults: Any, notes: Notes
) -> None:
    """``on_checkpoint_write_end`` of callbacks and module: at the next batch end, the rest when training ends."""
    gate = faults.hold(1)
    plugin = AsyncCheckpointIO(store_factory=faults.make, queue_depth=8, observer=notes)

    class Listens(tree.pl.Callback):  # type: ignore[misc]
        def on_checkpoint_write_end(self, trainer: Any, path: str) -> None:
            assert Path(path).exists()
            notes.note("callback", Path(path).name)

    def open_gate() -> None:
        assert notes.of("callback") == []
        gate.open()
        notes.wait_durable(1)

    hook = {"on_checkpoint_write_end": lambda self, trainer, path: notes.note("module", Path(path).name)}
    trainer = tree.trainer(
        tmp_path,
        plugins=[plugin],
        limit_val_batches=0,
        callbacks=[
            at_steps(tree, notes, {2: open_gate}),
            AsyncCheckpointCallback(),
            Listens(),
            tree.checkpoints(tmp_path / "ckpt", every_n_train_steps=2, save_top_k=-1),
        ],
    )
    trainer.fit(tree.model(**hook))
    assert notes.entries == [
        ("callback", "epoch=0-step=2.ckpt", 3),
        ("module", "epoch=0-step=2.ckpt", 3),
        ("train end", 4),
        ("callback", "epoch=0-step=4.ckpt", 4),
        ("module", "epoch=0-step=4.ckpt", 4),
    ]


def test_hooks_are_called_during_a_long_validation(
    tree: Any, tmp_path: Path, faults: Any, notes: Notes
) -> None:
    """A save that becomes durable during validation is told of at the next batch end of the validation."""
    plugin = AsyncCheckpointIO(store_factory=faults.make, observer=notes)

    def validation_step(self: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            notes.wait_durable(1)
        notes.note("validation", batch_idx)

    hook = {"on_checkpoint_write_end": lambda self, trainer, path: notes.note("hook", Path(path).name)}
    trainer = tree.trainer(
        tmp_path,
        plugins=[plugin],
        callbacks=[
            AsyncCheckpointCallback(),
            tree.checkpoints(tmp_path / "ckpt", every_n_train_steps=4),
        ],
    )
    gate = faults.hold()
    opener = {"on_validation_start": lambda self: gate.open()}
    trainer.fit(tree.model(validation_step=validation_step, **hook, **opener))
    kinds = [entry[:2] for entry in notes.entries]
    assert kinds.index(("hook", "epoch=0-step=4.ckpt")) < kinds.index(("validation", 2))


@pytest.mark.filterwarnings("ignore:.*ckpt_path=")  # of Lightning, which looks for the file of a run before
def test_hooks_are_called_of_what_is_saved_because_of_an_error(
    tree: Any, tmp_path: Path, notes: Notes
) -> None:
    """``OnExceptionCheckpoint``'s file is told of to hooks; not to loggers, which are finalized by then."""

    def fail() -> None:
        raise RuntimeError("of the training")

    hook = {"on_checkpoint_write_end": lambda self, trainer, path: notes.note("hook", Path(path).name)}
    trainer = tree.trainer(
        tmp_path,
        plugins=[AsyncCheckpointIO()],
        logger=reading_logger(tree, notes),
        callbacks=[
            AsyncCheckpointCallback(),
            at_steps(tree, notes, {2: fail}),
            tree.pl.callbacks.OnExceptionCheckpoint(tmp_path, "rescued"),
        ],
    )
    with pytest.raises(RuntimeError, match="of the training"):
        trainer.fit(tree.model(**hook))
    assert torch.load(tmp_path / "rescued.ckpt")["global_step"] == 2
    assert notes.of("hook") == [("rescued.ckpt", 2)]
    assert [entry[0] for entry in notes.entries if entry[0] != "hook"] == ["finalized"]


@pytest.mark.parametrize("bar", ["TQDMProgressBar", "RichProgressBar"])
@pytest.mark.parametrize("wanted", [True, False])
def test_pending_saves_are_in_the_progress_bar(
    tree: Any, tmp_path: Path, faults: Any, notes: Notes, bar: str, wanted: bool
) -> None:
    """``ckpt: 1`` while a save is pending, and no longer; not at all with ``progress_bar=False``."""
    if bar == "RichProgressBar" and Version(tree.pl.__version__) < Version("2.6"):
        pytest.skip("Lightning's own bar fails with the newer Rich that is installed beside it")
    gate = faults.hold(operation="begin")
    plugin = AsyncCheckpointIO(store_factory=faults.make, observer=notes)
    shown: list[Any] = []

    def open_gate() -> None:
        shown.append(trainer.progress_bar_callback.get_metrics(trainer, trainer.lightning_module))
        gate.open()
        notes.wait_durable(1)
        shown.append(trainer.progress_bar_callback.get_metrics(trainer, trainer.lightning_module))

    trainer = tree.trainer(
        tmp_path,
        plugins=[plugin],
        enable_progress_bar=True,
        callbacks=[
            at_steps(tree, notes, {2: open_gate}),
            AsyncCheckpointCallback(progress_bar=wanted),
            tree.checkpoints(tmp_path / "ckpt", every_n_train_steps=2),
            getattr(tree.pl.callbacks, bar)(),
        ],
    )
    with redirect_stderr(io.StringIO()):
        trainer.fit(tree.model())
    assert [metrics.get("ckpt") for metrics in shown] == ["1" if wanted else None, None]


def test_timeline_shows_saves_and_steps(tree: Any, tmp_path: Path) -> None:
    """``timeline=`` writes a trace with the saves, the training's batches and the flush at its end."""
    path = tmp_path / "trace.json"
    trainer = tree.trainer(
        tmp_path,
        plugins=[AsyncCheckpointIO()],
        callbacks=[AsyncCheckpointCallback(timeline=path), tree.checkpoints(tmp_path / "ckpt")],
    )
    trainer.fit(tree.model())
    names = [event["name"] for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]
    assert [name for name in names if name.startswith("batch")] == [f"batch {n}" for n in range(4)]
    assert names.count("flush") == 1
    assert any("epoch=0-step=4.ckpt" in name for name in names)


def test_timeline_shows_its_own_fit(tree: Any, tmp_path: Path) -> None:
    """Of two Trainers' fits with one plugin, each with a timeline, each file shows one."""
    plugin = AsyncCheckpointIO()
    callbacks = [
        AsyncCheckpointCallback(timeline=tmp_path / f"{which}.json") for which in ("first", "second")
    ]
    for which, callback in zip(("first", "second"), callbacks, strict=True):
        checkpoint = tree.checkpoints(tmp_path / which)
        tree.trainer(tmp_path, plugins=[plugin], callbacks=[callback, checkpoint]).fit(tree.model())
    assert callbacks[0]._timeline is not None
    callbacks[0]._timeline.slice("after", "all", 0.0, 1.0)  # so that it is written anew
    callbacks[0]._timeline.write()
    for which, other in (("first", "second"), ("second", "first")):
        trace = (tmp_path / f"{which}.json").read_text()
        assert str(tmp_path / which) in trace
        assert str(tmp_path / other / "epoch") not in trace
