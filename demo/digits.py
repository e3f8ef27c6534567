"""The training: a real model, real data, and an ordinary Trainer. Only the plugin is ours."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from sklearn.datasets import load_digits
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset, random_split

from async_ckpt import AsyncCheckpointIO
from demo.printing import say

__all__ = ["Digits", "FirstWeights", "ProgressLine", "prepare_process", "train"]

HIDDEN_UNITS = 1792  # with Adam's two moments, a checkpoint has about 40 MB, so its cost can be measured


class Digits(L.LightningModule):
    """A plain classifier of 8 × 8 pictures of digits."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(64, HIDDEN_UNITS),
            torch.nn.ReLU(),
            torch.nn.Linear(HIDDEN_UNITS, HIDDEN_UNITS),
            torch.nn.ReLU(),
            torch.nn.Linear(HIDDEN_UNITS, 10),
        )

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> torch.Tensor:
        """Return the loss of one batch."""
        pixels, digits = batch
        return functional.cross_entropy(self.layers(pixels), digits)

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> None:
        """Log loss and accuracy on digits that training has not seen."""
        pixels, digits = batch
        guesses = self.layers(pixels)
        self.log("val_loss", functional.cross_entropy(guesses, digits))
        self.log("val_accuracy", (guesses.argmax(1) == digits).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, whose state is twice the size of the weights."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def digits_data() -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Return the 1797 digits that scikit-learn ships, in two loaders: for training, and held out."""
    pixels, digits = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(digits))
    training, held_out = random_split(data, [1437, 360], generator=torch.Generator().manual_seed(0))
    return DataLoader(training, batch_size=64, shuffle=True), DataLoader(held_out, batch_size=360)


def train(
    folder: str,
    epochs: int,
    *,
    plugins: Sequence[Any],
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
    **options: Any,
) -> L.Trainer:
    """Train until *epochs* epochs are done, with the two best checkpoints and the last one in *folder*.

    Args:
        folder: a path or a URL.
        epochs: of the whole training, those before a resume included.
        plugins: for the Trainer; here goes ``AsyncCheckpointIO``.
        callbacks: beside ``ModelCheckpoint``.
        resume: go on from the folder's ``last.ckpt``.
        **options: for the Trainer.
    """
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        plugins=list(plugins),
        callbacks=[ModelCheckpoint(folder, monitor="val_loss", save_top_k=2, save_last=True), *callbacks],
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(Digits(), *digits_data(), ckpt_path=f"{folder}/last.ckpt" if resume else None)
    return trainer


class ProgressLine(Callback):
    """Prints a line for each epoch, after its saves were requested: loss, accuracy and pending saves."""

    def __init__(self, plugin: AsyncCheckpointIO) -> None:
        self.plugin = plugin

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the line of the epoch before, if there was one in this run."""
        if "val_loss" in trainer.callback_metrics:
            self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the line of the last epoch."""
        metrics = trainer.callback_metrics
        say(
            f"epoch {trainer.current_epoch}/{trainer.max_epochs}  step {trainer.global_step:3}  "
            f"loss {metrics['val_loss']:.3f}  accuracy {metrics['val_accuracy']:6.1%}  "
            f"saves under way: {len(self.plugin.meter.pending)}"
        )


class FirstWeights(Callback):
    """Remembers with which weights the training began."""

    weights: dict[str, torch.Tensor]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Copy them."""
        self.weights = {name: weight.clone() for name, weight in pl_module.state_dict().items()}


def prepare_process() -> None:
    """Leave cores to the writer, as if training ran on a GPU, and keep Lightning from printing."""
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
