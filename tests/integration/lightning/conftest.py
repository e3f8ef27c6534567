"""Tiny trainings, for both Lightning distributions, and stores with faults for them to meet."""

from __future__ import annotations

import gc
import importlib
import io
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from async_ckpt import AsyncCheckpointIO
from async_ckpt.stores import open_store
from async_ckpt.stores.base import Location, Store, Workers
from async_ckpt.testing.faults import Fault, FaultyStore, Gate
from tests.integration.lightning.both_ways import Both
from tests.integration.lightning.notes import Notes

TREES = {
    "pytorch_lightning": ("pytorch_lightning", "lightning_fabric"),
    "lightning.pytorch": ("lightning.pytorch", "lightning.fabric"),
}
BATCHES = 4


@dataclass(frozen=True)
class Tree:
    """One of the two distributions: the same code, two sets of classes."""

    pl: ModuleType
    fabric: ModuleType

    def module(self, path: str) -> ModuleType:
        """Import a module below the Trainer's package."""
        return importlib.import_module(f"{self.pl.__name__}.{path}")

    def model(self, **attributes: Any) -> Any:
        """Return a small LightningModule with Adam, equal at each call; *attributes* replace its own."""
        torch.manual_seed(0)
        pl: Any = self.pl

        class Tiny(pl.LightningModule):  # type: ignore[misc]  # a base that is found at run time
            def __init__(self) -> None:
                super().__init__()
                self.layer = torch.nn.Linear(8, 2)
                self.lr = 0.01

            def training_step(self, batch: Any, batch_idx: int) -> Any:
                loss = self.layer(batch[0]).pow(2).mean()
                self.log("loss", loss)
                return loss

            def validation_step(self, batch: Any, batch_idx: int) -> None:
                self.log("val_loss", self.layer(batch[0]).pow(2).mean())

            test_step = validation_step

            def configure_optimizers(self) -> Any:
                return torch.optim.Adam(self.parameters(), lr=self.lr)

            def train_dataloader(self) -> Any:
                return _batches()

            val_dataloader = test_dataloader = train_dataloader

        return type("Tiny", (Tiny,), attributes)()

    def trainer(self, directory: Any, **options: Any) -> Any:
        """Return a quiet Trainer on the CPU; *options* as for the Trainer."""
        pl: Any = self.pl
        defaults: dict[str, Any] = {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": any(
                isinstance(callback, pl.callbacks.Checkpoint) for callback in options.get("callbacks", [])
            ),
            "num_sanity_val_steps": 0,
            "default_root_dir": directory,
        }
        trainer = pl.Trainer(**{**defaults, **options})
        # Found where the package is installed, but not in a checkout: a test adds the companion that it is about.
        trainer.callbacks = [each for each in trainer.callbacks if type(each).__name__ != "FoundCallback"]
        return trainer

    def checkpoints(self, directory: Any, **options: Any) -> Any:
        """Return a ModelCheckpoint that saves to *directory*."""
        pl: Any = self.pl
        return pl.callbacks.ModelCheckpoint(directory, **options)


def _batches() -> Any:
    data = torch.linspace(-1, 1, BATCHES * 2 * 8).reshape(-1, 8)
    return DataLoader(TensorDataset(data), batch_size=2)


@pytest.fixture(scope="package", autouse=True)
def _imports_are_no_garbage() -> Iterator[None]:
    """Both Lightnings are imported, and no collection looks at what that has made: it takes half a second each time."""
    for names in TREES.values():
        for name in names:
            importlib.import_module(name)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="package")
def process_group() -> dict[str, str]:
    """The environment of a process group, with a port that nobody is given by chance.

    Lightning picks one of those that the system hands out, and listens there long after that.
    """
    port = 20_000 + os.getpid() % 10_000
    with socket.socket() as probe:
        while True:
            try:
                probe.bind(("", port))
            except OSError:
                port += 1
            else:
                return {"MASTER_PORT": str(port)}


@pytest.fixture(params=TREES)
def tree(request: pytest.FixtureRequest) -> Tree:
    """Both distributions in turn."""
    trainer, fabric = TREES[request.param]
    return Tree(importlib.import_module(trainer), importlib.import_module(fabric))


class Faults:
    """Faults for the stores that a plugin makes, one after each teardown; their calls are counted together."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.calls: Counter[str] = Counter()

    def make(self, location: Location, workers: Workers) -> Store:
        """Make one; a plugin's ``store_factory``."""
        store = FaultyStore(open_store(location, workers=workers), self.faults)
        store.calls = self.calls
        return store

    def fail(self, *calls: int, operation: Any = "commit", error: Callable[[], BaseException]) -> None:
        """Have the calls of these numbers fail, or every one."""
        self.faults.append(Fault(operation=operation, calls=calls or None, error=error))

    def slow(self, seconds: float) -> None:
        """Have every save take at least *seconds*."""
        self.faults.append(Fault(operation="commit", delay_seconds=seconds))

    def hold(self, *calls: int, operation: Any = "commit") -> Gate:
        """Have these calls, or all, wait for the gate that is returned."""
        gate = Gate()
        self.faults.append(Fault(operation=operation, calls=calls or None, gate=gate))
        return gate


@pytest.fixture
def faults() -> Faults:
    """No faults yet; the plugin under test gets ``store_factory=faults.make``."""
    return Faults()


class Recording(AsyncCheckpointIO):
    """The plugin; remembers what a synchronous ``torch.save`` would have written at each call."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.expected: dict[str, bytes] = {}

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        """Save both ways."""
        super().save_checkpoint(checkpoint, path, storage_options)
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        self.expected[str(path)] = buffer.getvalue()


@pytest.fixture
def recording() -> Callable[..., Recording]:
    """Return the class of a plugin that remembers what synchronous saves would have written."""
    return Recording


@pytest.fixture
def names() -> Callable[[Path], list[str]]:
    """Return a function that lists a directory, hidden files and all; nothing where there is none."""
    return lambda directory: sorted(entry.name for entry in directory.glob("*"))


@pytest.fixture(params=[False, True], ids=["plugin alone", "with callback"])
def companion(request: pytest.FixtureRequest) -> bool:
    """Whether the companion callback is there; where it must not matter."""
    return bool(request.param)


@pytest.fixture
def both(tree: Any, tmp_path: Path, faults: Any, companion: bool) -> Both:
    """A training to be run both ways."""
    return Both(tree, tmp_path, faults, companion)


@pytest.fixture
def notes() -> Notes:
    """Nothing noted yet."""
    return Notes()
