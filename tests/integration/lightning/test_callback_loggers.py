"""Loggers hear of a checkpoint through the companion callback: when it is durable, once, and not if it failed."""

from __future__ import annotations

from pathlib import Path
from time import monotonic
from typing import Any
from weakref import proxy

import pytest
import torch

from async_ckpt import AsyncCheckpointCallback, AsyncCheckpointIO
from async_ckpt.lightning.entry_points import found_callbacks
from tests.integration.lightning.notes import Notes, at_steps, reading_logger

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def test_loggers_are_told_when_the_file_is_durable(
    tree: Any, tmp_path: Path, faults: Any, notes: Notes
) -> None:
    """At the next batch end after a save is durable, each logger is told once, and can read the file."""
    gate = faults.hold(1, 2)
    plugin = AsyncCheckpointIO(store_factory=faults.make, queue_depth=8, observer=notes)

    def open_gate() -> None:
        assert notes.of("told") == []
        gate.open()
        notes.wait_durable(2)

    trainer = tree.trainer(
        tmp_path,
        plugins=[plugin],
        limit_val_batches=0,
        logger=[reading_logger(tree, notes), reading_logger(tree, notes)],
        callbacks=[
            at_steps(tree, notes, {2: open_gate, 3: lambda: notes.wait_durable(1)}),
            AsyncCheckpointCallback(),
            tree.checkpoints(tmp_path / "ckpt", every_n_train_steps=1, save_top_k=-1),
        ],
    )
    trainer.fit(tree.model())
    told = [(f"epoch=0-step={step}.ckpt", step, when) for step, when in ((1, 3), (2, 3), (3, 4), (4, 4))]
    assert notes.of("told") == [each for each in told for _ in range(2)]
    order = [entry[0] for entry in notes.entries if entry[0] in ("told", "train end", "finalized")]
    assert order == [*["told"] * 6, "train end", *["told"] * 2, *["finalized"] * 2]


def test_a_file_is_not_removed_before_its_logger_was_told(
    tree: Any, tmp_path: Path, faults: Any, notes: Notes
) -> None:
    """With ``save_top_k=1``, where each save replaces one that is pending, loggers still read every one of them."""
    gate = faults.hold()
    plugin = AsyncCheckpointIO(store_factory=faults.make, queue_depth=8, observer=notes)

    def open_gate() -> None:
        gate.open()
        notes.wait_durable(3)

    trainer = tree.trainer(
        tmp_path,
        plugins=[plugin],
        logger=reading_logger(tree, notes),
        callbacks=[
            at_steps(tree, notes, {3: open_gate}),
            AsyncCheckpointCallback(),
            tree.checkpoints(tmp_path / "ckpt", every_n_train_steps=1),
        ],
    )
    trainer.fit(tree.model())
    assert [step for _, step, _ in notes.of("told")] == [1, 2, 3, 4]
    assert [entry.name for entry in (tmp_path / "ckpt").iterdir()] == ["epoch=0-step=4.ckpt"]


@pytest.mark.filterwarnings("ignore:async_ckpt. failed:RuntimeWarning")
def test_nobody_is_told_of_a_save_that_failed(tree: Any, tmp_path: Path, faults: Any, notes: Notes) -> None:
    """Of four saves the second fails: loggers, hooks and figures know of the other three."""
    faults.fail(2, error=lambda: OSError("no space"))
    plugin = AsyncCheckpointIO(store_factory=faults.make, queue_depth=8, on_error="warn")
    hook = {"on_checkpoint_write_end": lambda self, trainer, path: notes.note("hook", Path(path).name)}
    trainer = tree.trainer(
        tmp_path,
        plugins=[plugin],
        logger=reading_logger(tree, notes),
        callbacks=[
            AsyncCheckpointCallback(),
            tree.checkpoints(tmp_path / "ckpt", every_n_train_steps=1, save_top_k=-1),
        ],
    )
    trainer.fit(tree.model(**hook))
    assert [step for _, step, _ in notes.of("told")] == [1, 3, 4]
    assert [name for name, _ in notes.of("hook")] == [f"epoch=0-step={step}.ckpt" for step in (1, 3, 4)]
    assert len([1 for metrics, *_ in notes.of("metrics") if "checkpoint/bytes" in metrics]) == 3


@pytest.mark.parametrize("weak", [True, False])
def test_what_is_saved_because_of_an_error(
    tree: Any, tmp_path: Path, faults: Any, notes: Notes, weak: bool
) -> None:
    """A Checkpoint of the user's that saves in ``on_exception`` has its logger told, before it is finalized."""
    faults.slow(0.05)

    class Own(tree.pl.callbacks.Checkpoint):  # type: ignore[misc]
        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            self._last_checkpoint_saved = str(tmp_path / "rescued.ckpt")
            trainer.save_checkpoint(self._last_checkpoint_saved)
            trainer.loggers[0].after_save_checkpoint(proxy(self) if weak else self)

    def fail() -> None:
        raise RuntimeError("of the training")

    trainer = tree.trainer(
        tmp_path,
        plugins=[AsyncCheckpointIO(store_factory=faults.make)],
        logger=reading_logger(tree, notes),
        callbacks=[AsyncCheckpointCallback(), at_steps(tree, notes, {2: fail}), Own()],
    )
    with pytest.raises(RuntimeError, match="of the training"):
        trainer.fit(tree.model())
    assert [entry for entry in notes.entries if entry[0] != "metrics"] == [
        ("told", "rescued.ckpt", 2, 2),
        ("finalized", "failed", 2),
    ]


@pytest.mark.parametrize("save_last", [True, "link"])
@pytest.mark.parametrize("fixed_name", [False, True])
def test_a_file_is_not_replaced_before_its_logger_has_looked(
    tree: Any, tmp_path: Path, faults: Any, fixed_name: bool, save_last: Any
) -> None:
    """A logger that looks at all files of a ``ModelCheckpoint``, as W&B's does, uploads each under its own score, also
    where storage is much slower than training and the next epoch saves to the same name.

    A link leads to the checkpoint before when a logger looks, with synchronous checkpoints as well.
    """
    faults.slow(0.05)
    uploads: dict[str, list[tuple[str, float, int]]] = {"ours": [], "theirs": []}
    scan: Any = tree.module("loggers.utilities")._scan_checkpoints

    class Scans(tree.module("loggers.logger").Logger):  # type: ignore[misc]
        name = version = "scans"
        save_dir = None

        def __init__(self, uploaded: list[tuple[str, float, int]]) -> None:
            super().__init__()
            self.uploaded, self.times = uploaded, dict[str, float]()

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
            pass

        log_metrics = log_hyperparams

        def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
            for time, path, score, _ in scan(checkpoint_callback, self.times):
                self.uploaded.append((Path(path).name, float(score), torch.load(path)["global_step"]))
                self.times[path] = time

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        self.log("score", float(self.global_step + 1))
        return self.layer(batch[0]).pow(2).mean()

    name = {"filename": "best", "enable_version_counter": False} if fixed_name else {}
    for who, plugins in (
        ("theirs", []),
        ("ours", [AsyncCheckpointIO(store_factory=faults.make, queue_depth=100)]),
    ):
        checkpoint = tree.checkpoints(
            tmp_path / who, monitor="score", mode="max", save_last=save_last, **name
        )
        trainer = tree.trainer(
            tmp_path,
            max_epochs=4,
            limit_train_batches=1,
            limit_val_batches=0,
            plugins=plugins,
            logger=Scans(uploads[who]),
            callbacks=[AsyncCheckpointCallback(), checkpoint],
            log_every_n_steps=1,
        )
        trainer.fit(tree.model(training_step=training_step))
    assert all(
        score == step for name, score, step in uploads["ours"] if name != "last.ckpt" or save_last is True
    )
    assert {each for each in uploads["ours"] if each[0] != "last.ckpt"} == {
        each for each in uploads["theirs"] if each[0] != "last.ckpt"
    }
    if save_last is True:
        assert sorted(uploads["ours"]) == sorted(uploads["theirs"])


def test_what_is_saved_by_hand_is_told_of_at_once(tree: Any, tmp_path: Path, notes: Notes) -> None:
    """A subclass that goes on with its file finds its logger told, too, when ``super()`` returns."""
    told: list[int] = []

    class Goes(tree.pl.callbacks.ModelCheckpoint):  # type: ignore[misc]
        def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
            super()._save_checkpoint(trainer, filepath)
            told.append(len(notes.of("told")))

    trainer = tree.trainer(
        tmp_path,
        plugins=[AsyncCheckpointIO()],
        logger=reading_logger(tree, notes),
        callbacks=[AsyncCheckpointCallback(), Goes(tmp_path / "ckpt", every_n_train_steps=1)],
    )
    trainer.fit(tree.model())
    assert told == [1, 2, 3, 4]


def test_a_file_is_not_removed_before_its_hook_was_called(tree: Any, tmp_path: Path, faults: Any) -> None:
    """``on_checkpoint_write_end`` finds each file, also with ``save_top_k=1`` and storage much slower than training."""
    faults.slow(0.05)
    found: list[int] = []
    hook = {
        "on_checkpoint_write_end": lambda self, trainer, path: found.append(torch.load(path)["global_step"])
    }
    trainer = tree.trainer(
        tmp_path,
        plugins=[AsyncCheckpointIO(store_factory=faults.make, queue_depth=100)],
        callbacks=[AsyncCheckpointCallback(), tree.checkpoints(tmp_path / "ckpt", every_n_train_steps=1)],
    )
    trainer.fit(tree.model(**hook))
    assert found == [1, 2, 3, 4]
    assert [entry.name for entry in (tmp_path / "ckpt").iterdir()] == ["epoch=0-step=4.ckpt"]


def test_mlflow_uploads_every_checkpoint(tree: Any, tmp_path: Path, faults: Any) -> None:
    """Lightning's MLflow logger with ``log_model="all"`` uploads whole files, as many as with synchronous saves."""
    uploads: dict[str, list[tuple[str, int]]] = {"ours": [], "theirs": []}
    faults.slow(0.02)

    class Client:
        def __init__(self, uploaded: list[tuple[str, int]]) -> None:
            self.uploaded = uploaded

        def log_artifact(self, run_id: str, path: str, artifact_path: str) -> None:
            self.uploaded.append((artifact_path, torch.load(path)["global_step"]))

        def log_artifacts(self, *args: Any) -> None:
            pass

    class MLFlow(tree.module("loggers").MLFlowLogger):  # type: ignore[misc]
        name = version = save_dir = None

        def __init__(self, uploaded: list[tuple[str, int]]) -> None:  # without the package
            self._client = Client(uploaded)
            self._run_id, self._log_model, self._checkpoint_path_prefix = "run", "all", ""
            self._logged_model_time: dict[str, float] = {}
            self._checkpoint_callback = None
            self._initialized = False

        @property
        def experiment(self) -> Client:
            return self._client

        def log_metrics(self, *args: Any, **kwargs: Any) -> None:
            pass

        log_hyperparams = log_metrics

    for name, plugins in (("ours", [AsyncCheckpointIO(store_factory=faults.make)]), ("theirs", [])):
        checkpoint = tree.checkpoints(tmp_path / name, every_n_train_steps=1)
        trainer = tree.trainer(
            tmp_path,
            plugins=plugins,
            logger=MLFlow(uploads[name]),
            callbacks=[AsyncCheckpointCallback(), checkpoint],
        )
        trainer.fit(tree.model())
    assert uploads["ours"] == uploads["theirs"]
    assert len(uploads["ours"]) == 4


@pytest.mark.parametrize("wanted", [True, False, None])
def test_figures_of_each_save_are_logged(
    tree: Any, tmp_path: Path, faults: Any, notes: Notes, wanted: bool | None
) -> None:
    """Loggers get six figures a durable save, at the step of the batch; none if unwanted, or with a found callback."""
    gate = faults.hold(1)
    plugin = AsyncCheckpointIO(store_factory=faults.make, queue_depth=8, observer=notes)

    def open_gate() -> None:
        gate.open()
        notes.wait_durable(1)

    trainer = tree.trainer(
        tmp_path,
        plugins=[plugin],
        logger=reading_logger(tree, notes),
        log_every_n_steps=100,
        callbacks=[
            at_steps(tree, notes, {3: open_gate}),
            *([] if wanted is None else [AsyncCheckpointCallback(log_metrics=wanted)]),
            tree.checkpoints(tmp_path / "ckpt", every_n_train_steps=2, save_top_k=-1),
        ],
    )
    if wanted is None:
        trainer.callbacks[:0] = found_callbacks()
    trainer.fit(tree.model())
    logged = [(metrics, step) for metrics, step, _ in notes.of("metrics") if "checkpoint/bytes" in metrics]
    assert len(logged) == (2 if wanted else 0)
    assert not [name for name in trainer.logged_metrics | trainer.callback_metrics if "checkpoint" in name]
    if wanted:
        (figures, step), _ = logged
        assert step == 3  # counted from 0, as what the fourth batch itself logs
        assert figures["checkpoint/bytes"] == (tmp_path / "ckpt" / "epoch=0-step=2.ckpt").stat().st_size
        assert 0 < figures["checkpoint/staged_seconds"] <= figures["checkpoint/durable_seconds"]
        assert figures["checkpoint/throughput"] > 0
        assert figures["checkpoint/pending"] == 0
        assert 0 < figures["checkpoint/stall_seconds"] <= figures["checkpoint/durable_seconds"]


@pytest.mark.parametrize("kind", ["csv", "tensorboard", "wandb_off"])
def test_training_does_not_wait_for_loggers_that_look_at_no_file(
    tree: Any, tmp_path: Path, faults: Any, kind: str
) -> None:
    """Loggers that do nothing with checkpoints, as the usual ones, hold up no save to a name that is still pending."""
    gate = faults.hold()
    logger = _without_interest(tree, tmp_path, kind)
    times: list[float] = []

    class Opens(tree.pl.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            times.append(monotonic())
            if trainer.global_step == 4:
                gate.open()

    trainer = tree.trainer(
        tmp_path,
        max_epochs=4,
        limit_train_batches=1,
        limit_val_batches=0,
        plugins=[AsyncCheckpointIO(store_factory=faults.make, queue_depth=100, flush_timeout=60)],
        logger=logger,
        callbacks=[AsyncCheckpointCallback(), tree.checkpoints(tmp_path, save_last=True), Opens()],
        log_every_n_steps=1,
    )
    trainer.fit(tree.model())
    assert (
        times[-1] - times[0] < 60
    )  # a wait for storage, which is held until then, would have lasted so long
    assert torch.load(tmp_path / "last.ckpt")["global_step"] == 4


def _without_interest(tree: Any, folder: Path, kind: str) -> Any:
    """Return a logger that looks at no checkpoint."""
    logger = tree.module("loggers").CSVLogger(folder)
    if kind == "tensorboard":
        like = tree.module("loggers.tensorboard").TensorBoardLogger
        logger.after_save_checkpoint = like.after_save_checkpoint.__get__(logger)
    if kind == "wandb_off":
        like = tree.module("loggers.wandb").WandbLogger
        logger._log_model = False  # it was not told to upload
        logger.after_save_checkpoint = like.after_save_checkpoint.__get__(logger)
    return logger
