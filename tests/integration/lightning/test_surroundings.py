"""Trainings in surroundings of their own: a notebook's event loop, another thread, forked workers, a busy queue."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from async_ckpt import AsyncCheckpointCallback, AsyncCheckpointIO
from tests.integration.lightning.both_ways import ONE_TREE

pytestmark = pytest.mark.integration

SLOW_SECONDS = 0.1


def _fit(tree: Any, folder: Path, plugin: AsyncCheckpointIO, **model: Any) -> Any:
    trainer = tree.trainer(
        folder,
        max_epochs=3,
        plugins=[plugin],
        callbacks=[AsyncCheckpointCallback(), tree.checkpoints(folder / "ckpt", save_last=True)],
    )
    trainer.fit(tree.model(**model))
    return trainer


def _epochs(folder: Path) -> dict[str, int]:
    return {file.name: torch.load(file)["epoch"] for file in (folder / "ckpt").iterdir()}


def test_in_a_running_event_loop(tree: Any, tmp_path: Path, faults: Any) -> None:
    """As in a notebook, ``fit`` and ``save_checkpoint`` work where an event loop runs in the same thread."""
    faults.slow(SLOW_SECONDS)
    plugin = AsyncCheckpointIO(store_factory=faults.make)

    async def cell() -> None:
        trainer = _fit(tree, tmp_path, plugin)
        trainer.save_checkpoint(tmp_path / "by-hand.ckpt")
        await plugin.flush()

    asyncio.run(cell())
    assert _epochs(tmp_path) == {"epoch=2-step=12.ckpt": 2, "last.ckpt": 2}
    assert torch.load(tmp_path / "by-hand.ckpt")["global_step"] == 12


def test_in_another_thread(tree: Any, tmp_path: Path, faults: Any) -> None:
    """``fit`` may run in a thread that is not the main one."""
    faults.slow(SLOW_SECONDS)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(_fit, tree, tmp_path, AsyncCheckpointIO(store_factory=faults.make)).result()
    assert _epochs(tmp_path) == {"epoch=2-step=12.ckpt": 2, "last.ckpt": 2}


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")  # on one core
def test_data_loader_workers_that_are_forked_in_mid_save(tree: Any, tmp_path: Path, faults: Any) -> None:
    """Workers that each epoch forks while saves are under way end as ever, and the saves become durable (L1)."""
    faults.slow(SLOW_SECONDS)

    def train_dataloader(self: Any) -> Any:
        return DataLoader(TensorDataset(torch.ones(8, 8)), batch_size=2, num_workers=2)

    plugin = AsyncCheckpointIO(store_factory=faults.make)
    _fit(tree, tmp_path, plugin, train_dataloader=train_dataloader)
    assert _epochs(tmp_path) == {"epoch=2-step=12.ckpt": 2, "last.ckpt": 2}


@ONE_TREE
@pytest.mark.parametrize("last", [True, "link"])
def test_a_save_at_each_of_many_steps(tree: Any, tmp_path: Path, last: Any) -> None:
    """Two hundred steps, each with a save, a removal and a new ``last``, through a queue of one."""
    trainer = tree.trainer(
        tmp_path,
        max_epochs=50,
        limit_val_batches=0,
        plugins=[AsyncCheckpointIO(queue_depth=1)],
        callbacks=[
            AsyncCheckpointCallback(),
            tree.checkpoints(tmp_path / "ckpt", every_n_train_steps=1, save_last=last),
        ],
    )
    trainer.fit(tree.model())
    assert _epochs(tmp_path) == {"epoch=49-step=200.ckpt": 49, "last.ckpt": 49}
