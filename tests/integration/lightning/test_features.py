"""What Lightning offers around checkpoints, with our plugin on slow storage and with synchronous checkpoints.

Both runs begin alike and write to the same folder, one after the other, so that their files can be compared as a
whole: names, links, and each record's bytes, the paths that callbacks remember in them included.
"""

from __future__ import annotations

import collections
import inspect
import os
import pickle
import zipfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt import AsyncCheckpointCallback, AsyncCheckpointIO

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
    pytest.mark.filterwarnings("ignore:.?.fit.ckpt_path="),
    pytest.mark.filterwarnings("ignore:Swapping scheduler"),
    pytest.mark.filterwarnings("ignore:You.re resuming from a checkpoint that ended before the epoch"),
]

SLOW_SECONDS = 0.05
LOSSES = (0.3, 0.1, 0.2, 0.4)

Callbacks = Callable[[Any, Path], "list[Any]"]


class Breaks(Exception):
    """The training's own error."""


class Odd:
    """An object of a class that nobody knows, equal by its content."""

    def __init__(self, *content: Any) -> None:
        self.content = list(content)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Odd) and self.content == other.content

    __hash__ = None  # type: ignore[assignment]  # it changes


def validation_step(self: Any, batch: Any, batch_idx: int) -> None:
    """Log the loss of this epoch."""
    self.log("val_loss", torch.tensor(LOSSES[self.current_epoch % 4]))
    self.log("val/loss", torch.tensor(LOSSES[self.current_epoch % 4]))


def breaking_step(self: Any, batch: Any, batch_idx: int) -> Any:
    """Break at step 6."""
    if self.global_step == 6:
        raise Breaks
    return self.layer(batch[0]).pow(2).mean()


def contents(folder: Path) -> dict[str, Any]:
    """Return what a folder holds: each file's records, each link's target."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.suffix == ".ckpt":
            with zipfile.ZipFile(path) as archive:
                found[name] = {
                    record.partition("/")[2]: archive.read(record) for record in archive.namelist()
                }
    return found


class Both:
    """Runs a training twice in the same folder: with synchronous checkpoints, and with ours on slow storage."""

    def __init__(self, tree: Any, root: Path, faults: Any, companion: bool) -> None:
        self.folder = root / "run"
        self._tree = tree
        self._kept = root / "synchronous"
        self._companion = companion
        self._faults = faults
        faults.slow(SLOW_SECONDS)

    def run(self, train: Callable[[dict[str, Any]], Any]) -> tuple[Any, Any]:
        """Call *train* twice, with what its Trainers need; compare the files; return what it returned."""
        expected = train({"plugins": [], "callbacks": []})
        self.folder.rename(self._kept)
        plugin = AsyncCheckpointIO(store_factory=self._faults.make, queue_depth=4)
        actual = train(
            {"plugins": [plugin], "callbacks": [AsyncCheckpointCallback()] if self._companion else []}
        )
        assert contents(self.folder) == contents(self._kept)
        return expected, actual

    def fit(self, callbacks: Callbacks, *, resume: str | None = None, **model: Any) -> dict[str, Any]:
        """Train for four epochs with these callbacks, both ways; return the files."""

        def train(options: dict[str, Any]) -> Any:
            module = self._tree.model(**{"validation_step": validation_step, **model})
            for epochs, path in ((2, None), (4, resume)) if resume else ((4, None),):
                trainer = self._tree.trainer(
                    self.folder,
                    max_epochs=epochs,
                    plugins=options["plugins"],
                    callbacks=[*callbacks(self._tree, self.folder), *options["callbacks"]],
                )
                try:
                    trainer.fit(module, ckpt_path=path)
                except Breaks:
                    pass
            return module.state_dict()

        expected, actual = self.run(train)
        for name, weight in expected.items():
            assert torch.equal(actual[name], weight)
        return contents(self.folder)


@pytest.fixture(params=[False, True], ids=["plugin alone", "with callback"])
def companion(request: pytest.FixtureRequest) -> bool:
    """Whether the companion callback is there; where it must not matter."""
    return bool(request.param)


@pytest.fixture
def both(tree: Any, tmp_path: Path, faults: Any, companion: bool) -> Both:
    """A training to be run both ways."""
    return Both(tree, tmp_path, faults, companion)


WITH_CALLBACK = pytest.mark.parametrize("companion", [True], indirect=True, ids=["with callback"])
#: The two distributions have the same code here; where that decides nothing, one is enough.
ONE_TREE = pytest.mark.parametrize("tree", ["pytorch_lightning"], indirect=True)


def saving(*options: dict[str, Any]) -> Callbacks:
    """Return ModelCheckpoints with these options."""

    def callbacks(tree: Any, folder: Path) -> list[Any]:
        known = inspect.signature(tree.pl.callbacks.ModelCheckpoint).parameters
        for name in {name for each in options for name in each} - known.keys():
            pytest.skip(f"this Lightning's ModelCheckpoint has no {name}")
        return [tree.checkpoints(folder / "ckpt", **each) for each in options]

    return callbacks


MATRIX: dict[str, list[dict[str, Any]]] = {
    "highest three": [{"monitor": "val_loss", "mode": "max", "save_top_k": 3, "save_last": True}],
    "link to the newest": [{"save_last": "link"}],
    "every second epoch": [{"every_n_epochs": 2, "save_top_k": -1}],
    "at the end of training epochs": [{"save_on_train_epoch_end": True, "save_top_k": -1}],
    "after validation": [{"save_on_train_epoch_end": False, "save_top_k": 2, "monitor": "val_loss"}],
    "every 3 steps, newest two": [
        {"every_n_train_steps": 3, "save_top_k": 2, "monitor": "step", "mode": "max"}
    ],
    "by time": [{"train_time_interval": timedelta(microseconds=1), "save_top_k": -1, "save_last": True}],
    "weights only": [{"save_weights_only": True, "save_top_k": 2, "monitor": "val_loss", "save_last": True}],
    "folders in the name": [
        {"filename": "of-{epoch}/{val/loss:.2f}", "auto_insert_metric_name": False, "save_top_k": -1}
    ],
    "one name": [{"filename": "same", "enable_version_counter": False, "save_last": True}],
    "two at once": [
        {"monitor": "val_loss", "filename": "best-{epoch}", "save_last": True},
        {"every_n_train_steps": 5, "filename": "every-{step}", "save_top_k": -1},
    ],
}


@ONE_TREE
@pytest.mark.parametrize("options", MATRIX.values(), ids=MATRIX)
def test_model_checkpoint(both: Both, options: list[dict[str, Any]]) -> None:
    """``ModelCheckpoint`` leaves the same files, links and contents as with synchronous checkpoints."""
    assert both.fit(saving(*options))


@WITH_CALLBACK
@pytest.mark.parametrize("last", [True, "link"])
def test_versions(both: Both, last: Any) -> None:
    """Checkpoints of the same name are counted up as with synchronous ones, though earlier ones are pending."""
    options = {"filename": "same", "monitor": "val_loss", "save_top_k": 3, "save_last": last}
    files = both.fit(saving(options))
    assert files.keys() == {f"ckpt/{name}.ckpt" for name in ("same", "same-v1", "same-v2", "last")}


@ONE_TREE
def test_save_on_exception(both: Both) -> None:
    """What ``ModelCheckpoint(save_on_exception=True)`` saves because training broke is there as with synchronous IO."""
    files = both.fit(
        saving({"save_on_exception": True, "save_top_k": -1, "save_last": True}), training_step=breaking_step
    )
    assert len(files) > 2


@ONE_TREE
def test_resume_goes_on_deleting(both: Both) -> None:
    """A resumed run replaces what the run before it has left, as with synchronous checkpoints."""
    both.fit(saving({"monitor": "val_loss", "save_top_k": 2, "save_last": True}), resume="last")


@ONE_TREE
def test_name_of_last(both: Both) -> None:
    """A ``last`` checkpoint whose name changes with the epoch is one file, as with synchronous checkpoints."""

    def callbacks(tree: Any, folder: Path) -> list[Any]:
        checkpoint = tree.checkpoints(folder / "ckpt", save_last=True)
        checkpoint.CHECKPOINT_NAME_LAST = "last-{epoch}"
        return [checkpoint]

    files = both.fit(callbacks)
    assert [name for name in files if "last" in name] == ["ckpt/last-epoch=3.ckpt"]


def test_custom_checkpoint_callback(both: Both) -> None:
    """A ``Checkpoint`` of the user's own, which saves, overwrites and removes as it likes, leaves the same files."""

    def callbacks(tree: Any, folder: Path) -> list[Any]:
        class Custom(tree.pl.callbacks.Checkpoint):  # type: ignore[misc]  # a base that is found at run time
            def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
                step = trainer.global_step
                trainer.save_checkpoint(folder / f"{step}.ckpt", weights_only=step % 2 == 0)
                trainer.save_checkpoint(folder / "newest.ckpt")
                if step > 3:
                    trainer.strategy.remove_checkpoint(folder / f"{step - 3}.ckpt")

        return [Custom()]

    assert both.fit(callbacks).keys() == {"14.ckpt", "15.ckpt", "16.ckpt", "newest.ckpt"}


@ONE_TREE
def test_subclass_of_model_checkpoint(both: Both) -> None:
    """A subclass that saves a second file beside each, by the methods it inherits, leaves the same files."""

    def callbacks(tree: Any, folder: Path) -> list[Any]:
        class Twice(tree.pl.callbacks.ModelCheckpoint):  # type: ignore[misc]  # the same
            def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
                super()._save_checkpoint(trainer, filepath)
                trainer.save_checkpoint(f"{filepath}.copy.ckpt")

            def _remove_checkpoint(self, trainer: Any, filepath: str) -> None:
                super()._remove_checkpoint(trainer, filepath)
                trainer.strategy.remove_checkpoint(f"{filepath}.copy.ckpt")

        return [Twice(folder / "ckpt", monitor="val_loss", save_top_k=2)]

    assert len(both.fit(callbacks)) == 4


# -- hooks


def odd_objects() -> dict[str, Any]:
    """Return objects of many kinds, each of which the test changes after each save."""
    return {
        "object": Odd(1, {"two": 2}),
        "list": [[1], (2,)],
        "set": {1},
        "deque": collections.deque([1], maxlen=3),
        "array": pytest.importorskip("numpy").zeros(3),
        "tensor": torch.zeros(3),
        "module": torch.nn.Linear(2, 2, bias=False),
        "bytes": bytearray(b"ab"),
    }


def change(objects: dict[str, Any], step: int) -> None:
    """Change every object in place."""
    objects["object"].content.append(step)
    objects["list"][0].append(step)
    objects["set"].add(step)
    objects["deque"].append(step)
    objects["array"] += 1
    objects["tensor"].add_(1)
    with torch.no_grad():
        objects["module"].weight.fill_(step)
    objects["bytes"].append(step)


@ONE_TREE
def test_hooks(both: Both, tree: Any) -> None:
    """Objects of any kind that module, data module and callback add are written as they were; and all come back."""
    loaded: list[dict[str, Any]] = []

    def hooks(key: str) -> dict[str, Any]:
        def on_save_checkpoint(self: Any, *args: Any) -> None:
            args[-1][key] = self.objects

        def on_load_checkpoint(self: Any, *args: Any) -> None:
            loaded.append(args[-1][key])

        return {"on_save_checkpoint": on_save_checkpoint, "on_load_checkpoint": on_load_checkpoint}

    def state_dict(self: Any) -> dict[str, Any]:
        return dict(self.objects)

    def load_state_dict(self: Any, state: dict[str, Any]) -> None:
        loaded.append(state)

    methods = {"state_dict": state_dict, "load_state_dict": load_state_dict}  # what a data module has instead

    def train(options: dict[str, Any]) -> list[dict[str, Any]]:
        loaded.clear()
        torch.manual_seed(1)
        holders = [
            tree.model(objects=odd_objects(), **hooks("from the module")),
            type("Data", (tree.pl.LightningDataModule,), methods)(),
            type("Own", (tree.pl.Callback,), hooks("from the callback"))(),
        ]
        holders[1].objects, holders[2].objects = odd_objects(), odd_objects()
        module, data, own = holders
        data.train_dataloader = data.val_dataloader = module.train_dataloader

        def on_train_batch_end(trainer: Any, *args: Any) -> None:
            trainer.save_checkpoint(both.folder / f"{trainer.global_step}.ckpt")
            for holder in holders:
                change(holder.objects, trainer.global_step)

        own.on_train_batch_end = on_train_batch_end
        for path in (None, both.folder / "2.ckpt"):
            trainer = tree.trainer(
                both.folder, plugins=options["plugins"], callbacks=[own, *options["callbacks"]]
            )
            known = "weights_only" in inspect.signature(trainer.fit).parameters
            trainer.fit(module, datamodule=data, ckpt_path=path, **({"weights_only": False} if known else {}))
            trainer.fit_loop.max_epochs = 1
        return [dict(objects) for objects in loaded]

    expected, actual = both.run(train)
    assert len(actual) == len(expected) == 3
    assert actual[0]["object"] == Odd(1, {"two": 2}, 1)
    for one, other in zip(actual, expected, strict=True):
        assert pickle.dumps({**one, "module": None, "tensor": None}) == pickle.dumps(
            {**other, "module": None, "tensor": None}
        )


# -- loading


@pytest.mark.parametrize("weights_only", [True, False, None])
@pytest.mark.parametrize("method", ["fit", "validate", "test", "predict"])
@ONE_TREE
@pytest.mark.parametrize("companion", [False], indirect=True, ids=["plugin alone"])
def test_weights_only(both: Both, tree: Any, method: str, weights_only: bool | None) -> None:
    """``weights_only`` decides with ours as with synchronous checkpoints whether an unknown class is an error."""
    if "weights_only" not in inspect.signature(tree.pl.Trainer.fit).parameters:
        pytest.skip("this Lightning's Trainer has no weights_only")

    def on_save_checkpoint(self: Any, checkpoint: Any) -> None:
        checkpoint["odd"] = Odd(1)

    def train(options: dict[str, Any]) -> type[BaseException] | None:
        module = tree.model(on_save_checkpoint=on_save_checkpoint)
        trainer = tree.trainer(both.folder, **options)
        trainer.fit(module)
        trainer.save_checkpoint(both.folder / "a.ckpt")
        trainer.fit_loop.max_epochs = 2
        data = module.train_dataloader()
        try:
            getattr(trainer, method)(
                tree.model(predict_step=lambda *_: 0),
                data,
                ckpt_path=both.folder / "a.ckpt",
                weights_only=weights_only,
            )
        except pickle.UnpicklingError as error:
            return type(error)
        finally:
            for plugin in options["plugins"]:
                plugin.teardown()
        return None

    expected, actual = both.run(train)
    assert actual is expected
    assert (actual is None) == (weights_only is False)


@ONE_TREE
@pytest.mark.parametrize("method", ["validate", "test", "predict"])
def test_best_right_after_fit(both: Both, tree: Any, method: str) -> None:
    """``ckpt_path="best"`` loads the best checkpoint for each of the other entry points, as synchronous IO does."""

    def train(options: dict[str, Any]) -> Any:
        checkpoint = tree.checkpoints(both.folder / "ckpt", monitor="val_loss", save_top_k=1)
        module = tree.model(validation_step=validation_step, predict_step=lambda *_: 0)
        trainer = tree.trainer(
            both.folder,
            max_epochs=3,
            plugins=options["plugins"],
            callbacks=[checkpoint, *options["callbacks"]],
        )
        trainer.fit(module)
        getattr(trainer, method)(dataloaders=module.train_dataloader(), ckpt_path="best")
        return trainer.ckpt_path, module.state_dict()

    expected, actual = both.run(train)
    assert actual[0] == expected[0] == str(both.folder / "ckpt" / "epoch=1-step=8.ckpt")
    for name, weight in expected[1].items():
        assert torch.equal(actual[1][name], weight)


# -- tuner and averaging


@ONE_TREE
def test_learning_rate_finder(both: Both, tree: Any) -> None:
    """The callback ``LearningRateFinder`` finds the same rate and leaves the same files."""

    def train(options: dict[str, Any]) -> Any:
        module = tree.model()
        finder = tree.pl.callbacks.LearningRateFinder(num_training_steps=20, min_lr=1e-4, max_lr=1e-2)
        trainer = tree.trainer(
            both.folder,
            max_epochs=2,
            plugins=options["plugins"],
            callbacks=[finder, tree.checkpoints(both.folder / "ckpt"), *options["callbacks"]],
        )
        trainer.fit(module)
        return module.lr, finder.optimal_lr.results

    expected, actual = both.run(train)
    assert actual == expected


@ONE_TREE
@pytest.mark.parametrize(
    ("mode", "callback"),
    [("power", False), ("binsearch", True)],
    ids=["Tuner.scale_batch_size", "BatchSizeFinder"],
)
def test_batch_size_finder(both: Both, tree: Any, mode: str, callback: bool) -> None:
    """The search for a batch size ends with the same one, the same weights and no file of its own."""

    def train_dataloader(self: Any) -> Any:
        data = torch.utils.data.TensorDataset(torch.linspace(-1, 1, 32 * 8).reshape(-1, 8))
        return torch.utils.data.DataLoader(data, batch_size=self.batch_size)

    def train(options: dict[str, Any]) -> Any:
        both.folder.mkdir()
        module = tree.model(train_dataloader=train_dataloader, batch_size=2)
        search = {"mode": mode, "steps_per_trial": 1, "max_trials": 3, "init_val": 2}
        finders = [tree.pl.callbacks.BatchSizeFinder(**search)] if callback else []
        trainer = tree.trainer(
            both.folder, plugins=options["plugins"], callbacks=[*finders, *options["callbacks"]]
        )
        if callback:
            trainer.fit(module)
        else:
            tree.module("tuner").Tuner(trainer).scale_batch_size(module, **search)
        assert list(both.folder.glob(".*")) == []
        return module.batch_size, module.state_dict()

    expected, actual = both.run(train)
    assert actual[0] == expected[0] > 2
    for name, weight in expected[1].items():
        assert torch.equal(actual[1][name], weight)


@ONE_TREE
def test_on_exception_checkpoint(both: Both) -> None:
    """``OnExceptionCheckpoint`` writes what it writes with synchronous checkpoints."""

    def callbacks(tree: Any, folder: Path) -> list[Any]:
        return [tree.module("callbacks").OnExceptionCheckpoint(folder)]

    assert both.fit(callbacks, training_step=breaking_step).keys() == {"on_exception.ckpt"}


@ONE_TREE
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("StochasticWeightAveraging", {"swa_lrs": 0.01, "swa_epoch_start": 1}),
        ("WeightAveraging", {}),
        ("EMAWeightAveraging", {"decay": 0.5}),
    ],
)
def test_averaging(both: Both, tree: Any, name: str, options: dict[str, Any]) -> None:
    """Averages of weights are saved, and taken up on resuming, as with synchronous checkpoints."""
    if not hasattr(tree.pl.callbacks, name):
        pytest.skip(f"this Lightning has no {name}")

    def callbacks(tree: Any, folder: Path) -> list[Any]:
        return [
            getattr(tree.pl.callbacks, name)(**options),
            tree.checkpoints(folder / "ckpt", save_top_k=-1, save_last=True),
        ]

    assert len(both.fit(callbacks, resume="last")) == 5
