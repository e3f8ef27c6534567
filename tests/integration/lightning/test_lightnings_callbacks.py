"""Lightning's own callbacks and tuners that save: the same outcome as with synchronous checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.lightning.both_ways import BOTH_WAYS, ONE_TREE, Both, breaking_step

pytestmark = BOTH_WAYS


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
