"""A training of Lightning's on slow storage, for integrations that bring packages of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from async_ckpt.testing import slowed

__all__ = ["Model", "slow_store", "trainer"]

#: Every commit takes this many seconds, so what is there has been waited for.
slow_store = slowed(0.05)


class Model(LightningModule):
    """A small one, of four batches an epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Return a loss."""
        loss = self.layer(batch[0]).pow(2).mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        """Return what changes the weights."""
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def train_dataloader(self) -> Any:
        """Return four batches."""
        return DataLoader(TensorDataset(torch.linspace(-1, 1, 64).reshape(-1, 8)), batch_size=2)


def trainer(folder: Path, plugin: Any, *callbacks: Any, **options: Any) -> Trainer:
    """Return a quiet Trainer; the companion is found, or given where the package is not installed."""
    from async_ckpt import AsyncCheckpointCallback

    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        plugins=[] if plugin is None else [plugin],
        callbacks=[*callbacks, AsyncCheckpointCallback()],
        **{**quiet, **options},
    )
