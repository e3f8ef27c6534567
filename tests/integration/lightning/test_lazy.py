"""``AsyncCheckpointIO(snapshot="lazy")`` in trainings whose callbacks change weights."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt import AsyncCheckpointCallback, AsyncCheckpointIO
from async_ckpt.lightning.callback import FoundCallback
from tests.lazy_training import copies_held, left_to_copy

pytestmark = pytest.mark.integration


def _records(file: Any) -> dict[str, bytes]:
    with zipfile.ZipFile(file) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize("averaging", ["none", "weights", "swa"])
def test_each_file_shows_the_moment_of_its_save(tree: Any, tmp_path: Path, averaging: str) -> None:
    """Saves after each batch, validation right after them, copies as late as they may be: each file is right (S1).

    Averaging callbacks put other weights in for a validation, and Lightning's closure goes forward within the step.
    """
    pl = tree.pl
    plugin = AsyncCheckpointIO(snapshot="lazy", queue_depth=20, direct_saves="async")
    expected: dict[Path, dict[str, bytes]] = {}
    left: list[int] = []

    class Saves(pl.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            path = tmp_path / f"{trainer.global_step}.ckpt"
            state = trainer._checkpoint_connector.dump_checkpoint(False)
            torch.save(state, file := io.BytesIO())
            expected[path] = _records(file)
            plugin.save_checkpoint(state, path)
            newest = plugin.service._own.resources.account.newest
            left.append(0 if newest is None else left_to_copy(newest[1]))

    saves = Saves()

    class LetsGo(pl.Callback):  # type: ignore[misc]
        def on_train_end(self, *args: Any) -> None:
            go_on.set()

    callbacks: list[Any] = [LetsGo(), AsyncCheckpointCallback(), saves]
    if averaging == "weights":
        kind = getattr(tree.module("callbacks"), "WeightAveraging", None)
        if kind is None:
            pytest.skip("this Lightning has no WeightAveraging")
        callbacks.append(kind())
    elif averaging == "swa":
        callbacks.append(tree.module("callbacks").StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1))

    def train(self: Any, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch[0]).pow(2).mean() + self.large.pow(2).mean()

    model = tree.model(training_step=train)
    model.large = torch.nn.Parameter(torch.randn(1 << 16))
    trainer = tree.trainer(tmp_path, plugins=[plugin], callbacks=callbacks, max_epochs=3)
    with copies_held(plugin.service) as go_on:
        trainer.fit(model)
    for path, records in expected.items():
        assert _records(path) == records, path.name
    assert sum(map(bool, left)) > len(left) // 2  # and most were lazy


def test_averaged_weights_at_the_end_come_after_the_copy(tree: Any, tmp_path: Path) -> None:
    """A callback that puts them in by ``.data.copy_``, and that the user put before ours, changes no file (S1)."""
    pl = tree.pl
    plugin = AsyncCheckpointIO(snapshot="lazy", direct_saves="async")
    expected: dict[Path, dict[str, bytes]] = {}

    class Averages(pl.Callback):  # type: ignore[misc]
        def on_train_end(self, trainer: Any, module: Any) -> None:
            module.large.data.copy_(torch.zeros(1 << 16))
            go_on.set()

    class Saves(pl.Callback):  # type: ignore[misc]
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            path = tmp_path / f"{trainer.global_step}.ckpt"
            state = trainer._checkpoint_connector.dump_checkpoint(False)
            torch.save(state, file := io.BytesIO())
            expected[path] = _records(file)
            plugin.save_checkpoint(state, path)

    def train(self: Any, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch[0]).pow(2).mean() + self.large.pow(2).mean()

    model = tree.model(training_step=train)
    model.large = torch.nn.Parameter(torch.randn(1 << 16))
    callbacks = [Averages(), Saves(), AsyncCheckpointCallback()]
    trainer = tree.trainer(tmp_path, plugins=[plugin], callbacks=callbacks, max_epochs=1)
    trainer.callbacks.append(FoundCallback())  # as where the package is installed
    with copies_held(plugin.service) as go_on:
        trainer.fit(model)
    ((path, records),) = expected.items()
    written = _records(path)
    assert [name for name in written if written[name] != records[name]] == []
    assert not model.large.detach().any()
