"""What the companion callback tells, and when: loggers, hooks, figures, the progress bar, the timeline."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any
from weakref import proxy

import pytest
import torch
from packaging.version import Version

from async_ckpt import AsyncCheckpointCallback, AsyncCheckpointIO
from async_ckpt.events import Durable, Event
from async_ckpt.lightning.registration import found_callbacks
from tests.support import PATIENCE_SECONDS

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


class Notes:
    """What happened, in order, with the step of the training at that time.

    Attributes:
        entries: what was noted.
        step: set by the training.
        durable: released once for each durable save.
    """

    def __init__(self) -> None:
        self.entries: list[tuple[Any, ...]] = []
        self.step = 0
        self.durable = threading.Semaphore(0)

    def __call__(self, event: Event) -> None:
        """Take in an event of the plugin."""
        if isinstance(event, Durable):
            self.durable.release()

    def note(self, *entry: Any) -> None:
        """Note something."""
        assert threading.current_thread() is threading.main_thread()
        self.entries.append((*entry, self.step))

    def of(self, what: str) -> list[tuple[Any, ...]]:
        """Return the rest of all notes that begin so."""
        return [entry[1:] for entry in self.entries if entry[0] == what]


@pytest.fixture
def notes() -> Notes:
    """Nothing noted yet."""
    return Notes()


def _logger(tree: Any, notes: Notes) -> Any:
    """Return a logger that reads each checkpoint that it is told of."""

    class Reads(tree.module("loggers.logger").Logger):  # type: ignore[misc]
        name = version = "reads"
        save_dir = None

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
            pass

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            notes.note("metrics", metrics, step)

        def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
            path = Path(checkpoint_callback._last_checkpoint_saved)
            notes.note("told", path.name, torch.load(path)["global_step"])

        def finalize(self, status: str) -> None:
            notes.note("finalized", status)

    return Reads()


def _at(tree: Any, notes: Notes, steps: dict[int, Callable[[], object]]) -> Any:
    """Return a callback that keeps the step and calls something before the batch after each step of *steps*."""

    class Steps(tree.pl.Callback):  # type: ignore[misc]
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            steps.get(trainer.global_step, lambda: None)()
            notes.step = trainer.global_step + 1

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            notes.note("train end")

    return Steps()


def _durable(notes: Notes, number: int) -> None:
    for _ in range(number):
        assert notes.durable.acquire(timeout=PATIENCE_SECONDS)


def test_loggers_are_told_when_the_file_is_durable(
    tree: Any, tmp_path: Path, faults: Any, notes: Notes
) -> None:
    """At the next batch end after a save is durable, each logger is told once, and can read the file."""
    gate = faults.hold(1, 2)
    plugin = AsyncCheckpointIO(store_factory=faults.make, queue_depth=8, observer=notes)

    def open_gate() -> None:
        assert notes.of("told") == []
        gate.open()
        _durable(notes, 2)

    trainer = tree.trainer(
        tmp_path,
        plugins=[plugin],
        limit_val_batches=0,
        logger=[_logger(tree, notes), _logger(tree, notes)],
        callbacks=[
            _at(tree, notes, {2: open_gate, 3: lambda: _durable(notes, 1)}),
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
        _durable(notes, 3)

    trainer = tree.trainer(
        tmp_path,
        plugins=[plugin],
        logger=_logger(tree, notes),
        callbacks=[
            _at(tree, notes, {3: open_gate}),
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
        logger=_logger(tree, notes),
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
        logger=_logger(tree, notes),
        callbacks=[AsyncCheckpointCallback(), _at(tree, notes, {2: fail}), Own()],
    )
    with pytest.raises(RuntimeError, match="of the training"):
        trainer.fit(tree.model())
    assert [entry for entry in notes.entries if entry[0] != "metrics"] == [
        ("told", "rescued.ckpt", 2, 2),
        ("finalized", "failed", 2),
    ]


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
        logger=_logger(tree, notes),
        callbacks=[
            AsyncCheckpointCallback(),
            _at(tree, notes, {2: fail}),
            tree.pl.callbacks.OnExceptionCheckpoint(tmp_path, "rescued"),
        ],
    )
    with pytest.raises(RuntimeError, match="of the training"):
        trainer.fit(tree.model(**hook))
    assert torch.load(tmp_path / "rescued.ckpt")["global_step"] == 2
    assert notes.of("hook") == [("rescued.ckpt", 2)]
    assert [entry[0] for entry in notes.entries if entry[0] != "hook"] == ["finalized"]


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
        _durable(notes, 1)

    hook = {"on_checkpoint_write_end": lambda self, trainer, path: notes.note("module", Path(path).name)}
    trainer = tree.trainer(
        tmp_path,
        plugins=[plugin],
        limit_val_batches=0,
        callbacks=[
            _at(tree, notes, {2: open_gate}),
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
            _durable(notes, 1)
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


@pytest.mark.parametrize("wanted", [True, False, None])
def test_figures_of_each_save_are_logged(
    tree: Any, tmp_path: Path, faults: Any, notes: Notes, wanted: bool | None
) -> None:
    """Loggers get six figures a durable save, at the step of the batch; none if unwanted, or with a found callback."""
    gate = faults.hold(1)
    plugin = AsyncCheckpointIO(store_factory=faults.make, queue_depth=8, observer=notes)

    def open_gate() -> None:
        gate.open()
        _durable(notes, 1)

    trainer = tree.trainer(
        tmp_path,
        plugins=[plugin],
        logger=_logger(tree, notes),
        log_every_n_steps=100,
        callbacks=[
            _at(tree, notes, {3: open_gate}),
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
        _durable(notes, 1)
        shown.append(trainer.progress_bar_callback.get_metrics(trainer, trainer.lightning_module))

    trainer = tree.trainer(
        tmp_path,
        plugins=[plugin],
        enable_progress_bar=True,
        callbacks=[
            _at(tree, notes, {2: open_gate}),
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
