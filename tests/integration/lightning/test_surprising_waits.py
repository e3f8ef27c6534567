"""Whoever has made every save of a fit synchronous without asking for it is told, once, why, and what to do."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from async_ckpt import AsyncCheckpointCallback, AsyncCheckpointIO

pytestmark = pytest.mark.integration


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def _fit_twice(tree: Any, folder: Path, *callbacks: Any, strategy: Any = None, **options: Any) -> None:
    for name in ("one", "two"):
        where = {"plugins": [AsyncCheckpointIO(**options)]}
        if strategy is not None:
            plugin = AsyncCheckpointIO(**options)
            where = {"strategy": strategy("cpu", checkpoint_io=plugin), "accelerator": "auto"}
        made = [each(folder / name) for each in callbacks]
        trainer = tree.trainer(folder / name, callbacks=[*made, AsyncCheckpointCallback()], **where)
        trainer.fit(tree.model())


def _own_strategy(tree: Any) -> Any:
    class Counting(tree.pl.strategies.SingleDeviceStrategy):  # type: ignore[misc]  # a base that is found at run time
        def save_checkpoint(self, checkpoint: Any, filepath: Any, storage_options: Any = None) -> None:
            super().save_checkpoint(checkpoint, filepath, storage_options)

    return Counting


def _own_callback(tree: Any) -> Any:
    class Publishing(tree.pl.callbacks.ModelCheckpoint):  # type: ignore[misc]  # the same
        def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
            super()._save_checkpoint(trainer, filepath)

    return Publishing


def test_a_strategy_of_ones_own(tree: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two fits with a strategy that overrides ``save_checkpoint`` warn once, with the reason and the option."""
    strategy = _own_strategy(tree)
    _fit_twice(tree, tmp_path, strategy=strategy)
    (text,) = _warnings(caplog)
    assert "training waits" in text
    assert "Counting overrides save_checkpoint" in text
    assert 'direct_saves="async"' in text


def test_a_callback_of_ones_own(tree: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """So does a ``ModelCheckpoint`` that overrides how it saves."""
    _fit_twice(tree, tmp_path, _own_callback(tree))
    (text,) = _warnings(caplog)
    assert "training waits" in text
    assert "Publishing overrides _save_checkpoint" in text
    assert 'direct_saves="async"' in text


def test_who_has_chosen(tree: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody is warned whose saves are asynchronous."""
    _fit_twice(tree, tmp_path, strategy=_own_strategy(tree), direct_saves="async")
    assert _warnings(caplog) == []


def test_nothing_unusual(tree: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nor is anybody with Lightning's own callbacks and strategies, or who calls ``trainer.save_checkpoint``."""

    class Saves(tree.pl.Callback):  # type: ignore[misc]  # the same
        def __init__(self, folder: Path) -> None:
            self.folder = folder

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            trainer.save_checkpoint(self.folder / "mine.ckpt")

    _fit_twice(tree, tmp_path, tree.checkpoints, Saves)
    assert _warnings(caplog) == []
