"""The companion callback in whole trainings: which one acts, where it is inert, when saves wait, who tears down."""

from __future__ import annotations

import copy
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt import AsyncCheckpointCallback, AsyncCheckpointIO
from async_ckpt.lightning.entry_points import found_callbacks
from async_ckpt.testing.faults import Fault
from tests.support import python

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[3]

#: Prints what a Trainer has found before and after a plugin was made, and whether it acts.
DISCOVERY = """
    import importlib, logging, os, sys

    logging.disable(logging.WARNING)
    pl = importlib.import_module(sys.argv[1])
    from async_ckpt import AsyncCheckpointCallback, AsyncCheckpointIO

    def trainer(*callbacks, **options):
        return pl.Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, callbacks=list(callbacks), default_root_dir=sys.argv[2], **options
        )

    def found(trainer):
        return [type(each).__name__ for each in trainer.callbacks if isinstance(each, AsyncCheckpointCallback)]

    class Model(pl.LightningModule):
        def training_step(self, batch, batch_idx):
            self.trainer.save_checkpoint(sys.argv[2] + f"/{batch_idx}.ckpt")

        def configure_optimizers(self):
            pass

        def on_checkpoint_write_end(self, trainer, path):
            print("written", os.path.basename(path))

    print(found(trainer()))
    plugin = AsyncCheckpointIO()
    print(found(trainer(plugins=[plugin])), found(trainer()))
    trainer(plugins=[plugin], max_epochs=1).fit(Model(), [1, 2])
    print(plugin.synchronous)
"""


def _metadata(folder: Path) -> Path:
    """Write the metadata of an installed package with the entry points that ours declares."""
    tables = re.findall(
        r'^\[project\.entry-points\."(.+)"\]\n((?:\w+ = ".+"\n)+)',
        (ROOT / "pyproject.toml").read_text(),
        re.M,
    )
    info = folder / "async_ckpt-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: async-ckpt\nVersion: 1\n")
    groups = (f"[{name}]\n" + entries.replace('"', "") for name, entries in tables)
    (info / "entry_points.txt").write_text("\n".join(groups))
    return folder


def test_is_found_where_the_package_is_installed(tree: Any, tmp_path: Path) -> None:
    """A Trainer finds the companion by its entry point, but only in a program that has made a plugin; it acts."""
    roots = [str(_metadata(tmp_path / "site")), str(ROOT)]
    roots += filter(None, [os.environ.get("PYTHONPATH")])  # another Lightning, in tox
    done = python(DISCOVERY, tree.pl.__name__, tmp_path, env={"PYTHONPATH": os.pathsep.join(roots)})
    assert done.stdout.splitlines() == [
        "[]",
        "['FoundCallback'] ['FoundCallback']",
        "written 0.ckpt",
        "written 1.ckpt",
        "True",
    ], done.stderr


def test_the_users_own_acts_alone(tree: Any, tmp_path: Path) -> None:
    """Of a found one and two of the user's, the user's first acts, and listeners are told once of each save."""
    plugin = AsyncCheckpointIO()
    told: list[str] = []
    own, other = AsyncCheckpointCallback(), AsyncCheckpointCallback()
    trainer = tree.trainer(
        tmp_path, plugins=[plugin], callbacks=[own, other, tree.checkpoints(tmp_path / "ckpt")]
    )
    trainer.callbacks[:0] = found_callbacks()
    assert len([each for each in trainer.callbacks if isinstance(each, AsyncCheckpointCallback)]) == 3
    trainer.fit(tree.model(on_checkpoint_write_end=lambda self, trainer, path: told.append(Path(path).name)))
    assert told == ["epoch=0-step=4.ckpt"]
    assert [each._plugin for each in trainer.callbacks[:3]] == [None, plugin, None]


def test_is_one_of_lightnings_callbacks(tree: Any, tmp_path: Path) -> None:
    """It may be given without a list, as Lightning's own may be, and be replaced by ``configure_callbacks``."""
    callback = AsyncCheckpointCallback()
    assert isinstance(callback, tree.pl.Callback)
    trainer = tree.pl.Trainer(callbacks=callback, accelerator="cpu", logger=False, default_root_dir=tmp_path)
    assert callback in trainer.callbacks


def test_is_inert_without_the_plugin(tree: Any, tmp_path: Path) -> None:
    """In a Trainer with another CheckpointIO it changes nothing and calls nobody."""
    told: list[str] = []
    checkpoint = tree.checkpoints(tmp_path / "ckpt")
    before: list[Any] = []

    class Looks(tree.pl.Callback):  # type: ignore[misc]
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            before.append(type(checkpoint._fs))
            before.append("teardown" in vars(trainer.strategy))

    trainer = tree.trainer(tmp_path, callbacks=[AsyncCheckpointCallback(), Looks(), checkpoint])
    trainer.fit(tree.model(on_checkpoint_write_end=lambda self, trainer, path: told.append(path)))
    assert told == []
    assert before == [type(checkpoint._fs), False]


def test_finds_the_plugin_below_wrappers(tree: Any, tmp_path: Path) -> None:
    """It acts, too, where another wrapper is around the plugin."""
    wrapper: Any = tree.module("plugins.io.wrapper")

    class Around(wrapper._WrappingCheckpointIO):  # type: ignore[misc]
        def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            self.checkpoint_io.save_checkpoint(*args, **kwargs)

        def remove_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            self.checkpoint_io.remove_checkpoint(*args, **kwargs)

        def load_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
            return self.checkpoint_io.load_checkpoint(*args, **kwargs)

    told: list[str] = []
    plugin = AsyncCheckpointIO()
    trainer = tree.trainer(
        tmp_path,
        plugins=[Around(plugin)],
        callbacks=[AsyncCheckpointCallback(), tree.checkpoints(tmp_path / "ckpt")],
    )
    trainer.fit(tree.model(on_checkpoint_write_end=lambda self, trainer, path: told.append(path)))
    plugin.teardown()
    assert len(told) == 1


def test_is_in_no_checkpoint(tree: Any, tmp_path: Path) -> None:
    """A checkpoint has the same keys, and the same callbacks in it, as that of a run without the companion."""
    found = []
    for name, callbacks in (("with", [AsyncCheckpointCallback()]), ("without", [])):
        checkpoint = tree.checkpoints(tmp_path / name)
        trainer = tree.trainer(tmp_path, plugins=[AsyncCheckpointIO()], callbacks=[*callbacks, checkpoint])
        trainer.fit(tree.model())
        saved = torch.load(checkpoint.best_model_path)
        found.append((saved.keys(), saved["callbacks"].keys()))
    assert found[0] == found[1]


def test_can_be_copied_and_pickled(tree: Any, tmp_path: Path) -> None:
    """A copy, as a spawned process gets it, has the options and works, also of one that has been in use."""
    callback = AsyncCheckpointCallback(log_metrics=False, timeline=tmp_path / "trace.json")
    for companion in (callback, pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):
        (tmp_path / "trace.json").unlink(missing_ok=True)
        trainer = tree.trainer(
            tmp_path,
            plugins=[AsyncCheckpointIO()],
            callbacks=[companion, tree.checkpoints(tmp_path / "ckpt")],
        )
        trainer.fit(tree.model())
        assert (tmp_path / "trace.json").exists()
        assert not companion._log_metrics


def test_saves_outside_of_fit_are_durable_when_they_return(tree: Any, tmp_path: Path, faults: Any) -> None:
    """In ``validate`` and ``test``, before and after ``fit``, each save waits, also where in ``fit`` none does."""
    seen: dict[str, bool] = {}

    class Saves(tree.pl.Callback):  # type: ignore[misc]
        def save(self, trainer: Any, when: str) -> None:
            trainer.save_checkpoint(tmp_path / f"{when}.ckpt")
            seen[when] = (tmp_path / f"{when}.ckpt").exists()

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.state.fn == "validate":
                self.save(trainer, "validate")

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            gate = faults.hold()
            self.save(trainer, "fit")
            gate.open()

        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            self.save(trainer, "fit end")

        def on_test_end(self, trainer: Any, pl_module: Any) -> None:
            self.save(trainer, "test")

    saves = Saves()
    plugin = AsyncCheckpointIO(store_factory=faults.make, direct_saves="async")
    trainer = tree.trainer(tmp_path, plugins=[plugin], callbacks=[saves, AsyncCheckpointCallback()])
    model = tree.model()
    trainer.validate(model, verbose=False)
    trainer.fit(model)
    trainer.test(model, verbose=False)
    saves.save(trainer, "after")
    plugin.teardown()
    assert seen == {"validate": True, "fit": False, "fit end": True, "test": True, "after": True}


@pytest.mark.parametrize("base", [False, True], ids=["own writer", "base"])
@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("has_failed", [False, True])
def test_saves_before_any_setup_are_durable_when_they_return(
    tree: Any, tmp_path: Path, faults: Any, has_failed: bool, weights_only: bool, base: bool
) -> None:
    """So they are with a Trainer that was never called, and with one whose call has failed before any setup."""
    faults.slow(0.02)
    theirs = tree.fabric.plugins.TorchCheckpointIO()
    plugin = AsyncCheckpointIO(theirs) if base else AsyncCheckpointIO(store_factory=faults.make)
    trainer = tree.trainer(
        tmp_path, plugins=[plugin], callbacks=[AsyncCheckpointCallback(), tree.checkpoints(tmp_path)]
    )
    if has_failed:
        with pytest.raises(ValueError, match="best"):
            trainer.fit(tree.model(), ckpt_path="best")
    else:
        trainer.strategy.connect(tree.model())
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=weights_only)
    assert (tmp_path / "a.ckpt").exists()
    assert not plugin.is_used


def test_removals_before_any_setup_are_done_when_they_return(tree: Any, tmp_path: Path, faults: Any) -> None:
    """A ``ModelCheckpoint`` whose hooks are called by hand, with a Trainer that runs nothing, removes at once."""
    faults.slow(0.02)
    faults.faults.append(Fault(operation="delete", delay_seconds=0.02))
    plugin = AsyncCheckpointIO(store_factory=faults.make)
    checkpoint = tree.checkpoints(tmp_path / "ckpt", monitor="loss")
    trainer = tree.trainer(tmp_path, plugins=[plugin], callbacks=[AsyncCheckpointCallback(), checkpoint])
    (tmp_path / "ckpt").mkdir()
    for name in ("a.ckpt", "b.ckpt"):
        (tmp_path / "ckpt" / name).touch()
        checkpoint._remove_checkpoint(trainer, str(tmp_path / "ckpt" / name))
        assert not (tmp_path / "ckpt" / name).exists()
    assert not plugin.is_used


@pytest.mark.parametrize("fails", [False, True], ids=["success", "error"])
def test_a_found_one_has_waited_when_the_users_own_are_called(
    tree: Any, tmp_path: Path, faults: Any, fails: bool
) -> None:
    """In ``on_train_end`` and ``on_exception`` of the user's callbacks, every checkpoint is there, best and last."""
    faults.slow(0.1)
    seen: list[bool] = []

    class Uploads(tree.pl.Callback):  # type: ignore[misc]
        def on_train_end(self, trainer: Any, *args: Any) -> None:
            checkpoint = trainer.checkpoint_callback
            seen.extend(
                Path(path).exists() for path in (checkpoint.best_model_path, checkpoint.last_model_path)
            )

        on_exception = on_train_end

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if fails and trainer.global_step == 4:
                raise RuntimeError("of the training")

    given = [Uploads(), tree.checkpoints(tmp_path / "ckpt", every_n_train_steps=1, save_last=True)]
    trainer = tree.trainer(
        tmp_path, plugins=[AsyncCheckpointIO(store_factory=faults.make, queue_depth=4)], callbacks=list(given)
    )
    tuner = tree.pl.callbacks.LearningRateFinder()
    tuner.on_fit_start = lambda *args: None
    found = found_callbacks()
    trainer.callbacks = trainer._callback_connector._reorder_callbacks([*trainer.callbacks, tuner, *found])
    for _ in range(2):  # a second fit finds it where the first has put it
        seen.clear()
        trainer.fit_loop.max_epochs = (trainer.fit_loop.max_epochs or 0) + 1
        try:
            trainer.fit(tree.model())
        except RuntimeError:
            assert fails
        assert seen == [True, True]
        assert trainer.callbacks == [tuner, *found, *given]
        if fails:
            break


def test_a_fit_within_a_fit(tree: Any, tmp_path: Path) -> None:
    """A Trainer that fits inside another's fit, with the same plugin, leaves that one asynchronous."""
    plugin = AsyncCheckpointIO()
    seen: list[bool] = []

    class Inner(tree.pl.Callback):  # type: ignore[misc]
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            inner = tree.trainer(tmp_path, plugins=[plugin], callbacks=[AsyncCheckpointCallback()])
            inner.fit(tree.model())
            seen.append(plugin.synchronous)

    outer = tree.trainer(tmp_path, plugins=[plugin], callbacks=[AsyncCheckpointCallback(), Inner()])
    outer.fit(tree.model())
    assert [*seen, plugin.synchronous] == [False, True]


def test_fits_within_each_other_tell_of_their_own_saves(tree: Any, tmp_path: Path) -> None:
    """Each of two Trainers that fit one within the other is told of its own saves, also of what ended meanwhile."""
    told: dict[str, list[str]] = {"outer": [], "inner": []}

    def model(which: str) -> Any:
        def saves(self: Any) -> None:
            self.trainer.save_checkpoint(tmp_path / f"{which}-1.ckpt")

        def ends(self: Any) -> None:
            self.trainer.save_checkpoint(tmp_path / f"{which}-2.ckpt")

        def hook(self: Any, trainer: Any, path: str) -> None:
            assert self.trainer is trainer
            told[which].append(Path(path).name)

        return tree.model(on_train_start=saves, on_train_epoch_end=ends, on_checkpoint_write_end=hook)

    plugin = AsyncCheckpointIO(queue_depth=8)

    class Inner(tree.pl.Callback):  # type: ignore[misc]
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                inner = tree.trainer(tmp_path, plugins=[plugin], callbacks=[AsyncCheckpointCallback()])
                inner.fit(model("inner"))

    outer = tree.trainer(tmp_path, plugins=[plugin], callbacks=[AsyncCheckpointCallback(), Inner()])
    outer.fit(model("outer"))
    assert told == {which: [f"{which}-1.ckpt", f"{which}-2.ckpt"] for which in ("outer", "inner")}
