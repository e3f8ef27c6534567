"""Train on real digits with asynchronous checkpoints, lose a run to SIGKILL in mid-save, and get it back.

Six short acts, each of which proves something or makes the script exit with 1:

1. train, with ``Trainer(plugins=[AsyncCheckpointIO(queue_depth=2)])``
2. resume from ``last.ckpt``, and train on
3. start a second run in a process of its own, and kill it in the middle of a save
4. resume that one too
5. open what was written with plain ``torch.load``
6. the same training with this plugin, with Lightning's own, and with none: what does a save cost?

``python -m demo.train_digits --help`` lists the options. No GPU, about a minute on two cores. Everything goes to a
local directory, or with ``--store s3`` (or ``gcs``, ``azure``) to a bucket on a real server, started on this machine: a
URL in place of a path is all the difference.
"""

from __future__ import annotations

import argparse
import logging
import signal
import statistics
import subprocess
import sys
import threading
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import fsspec
import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO as LightningAsyncCheckpointIO
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy
from sklearn.datasets import load_digits
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from async_ckpt import AsyncCheckpointIO
from async_ckpt.events import Durable, Event, PartWritten, Swept
from demo.places import STORES, Place, place

HIDDEN_UNITS = 1792  # with Adam's two moments a checkpoint has some 40 MB: enough for its cost to show
MARK = "killed here:"

# ------------------------------------------------------------------------------------- the model and its data


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
    training, held_out = torch.utils.data.random_split(
        data, [1437, 360], generator=torch.Generator().manual_seed(0)
    )
    return DataLoader(training, batch_size=64, shuffle=True), DataLoader(held_out, batch_size=360)


# ------------------------------------------------------------------------------------------------- the training


def train(
    folder: str, epochs: int, *, plugins: Sequence[Any], resume: bool = False, **more: Any
) -> L.Trainer:
    """Train until *epochs* epochs are done, with the two best checkpoints and the last one in *folder*."""
    L.seed_everything(0, verbose=False)
    callbacks = [
        ModelCheckpoint(folder, monitor="val_loss", save_top_k=2, save_last=True),
        *more.pop("callbacks", []),
    ]
    trainer = L.Trainer(
        plugins=list(plugins),
        callbacks=callbacks,
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **more,
    )
    trainer.fit(Digits(), *digits_data(), ckpt_path=f"{folder}/last.ckpt" if resume else None)
    return trainer


class ProgressLine(Callback):
    """Prints one line an epoch, after its saves were asked for: how well it learns, what is being written."""

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
            f"pending: {len(self.plugin.service.pending)}"
        )


class FirstWeights(Callback):
    """Remembers with which weights the training began."""

    weights: dict[str, torch.Tensor]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Copy them."""
        self.weights = {name: weight.clone() for name, weight in pl_module.state_dict().items()}


# ---------------------------------------------------------------------------------------- the run that is killed


class StopsInMidSave:
    """An observer of saves: at the first part of the n-th one it says so, and waits there to be killed."""

    def __init__(self, nth_save: int) -> None:
        self.nth_save = nth_save
        self.seen: set[int] = set()

    def __call__(self, event: Event) -> None:
        """Look at one event, on the thread that writes."""
        if not isinstance(event, PartWritten):
            return
        self.seen.add(event.request_id)
        if len(self.seen) == self.nth_save:
            say(f"{MARK} part {event.index} of {Path(event.url).name} is written, most others are not")
            threading.Event().wait()


def run_that_dies(folder: str, epochs: int) -> None:
    """Train, and never return: each epoch saves twice, and the third epoch's ``last.ckpt`` is never finished."""
    plugin = AsyncCheckpointIO(queue_depth=2, part_size="4MiB", observer=StopsInMidSave(nth_save=6))
    train(folder, epochs, plugins=[plugin], callbacks=[ProgressLine(plugin)])


def kill_in_mid_save(folder: str, epochs: int) -> int:
    """Run ``run_that_dies`` in a process of its own and kill it where it waits; return how it ended."""
    command = [sys.executable, "-m", "demo.train_digits", "--epochs", str(epochs), "--die", folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                if MARK in line:
                    break
        finally:
            process.kill()
    return process.returncode


# -------------------------------------------------------------------------------------------- what a save costs


class Stopwatch:
    """The times of every save of one run, taken at the same two places whatever the plugin."""

    def __init__(self) -> None:
        self.started: list[float] = []
        self.stalls: list[float] = []
        self.ended: list[float] = []
        self.nbytes: list[int] = []

    def end(self, at: float, nbytes: int) -> None:
        """One save has been written. All contestants write in the order in which they were told to."""
        self.ended.append(at)
        self.nbytes.append(nbytes)

    @property
    def durations(self) -> list[float]:
        """Seconds from the call until each save was written."""
        return [end - start for start, end in zip(self.started, self.ended, strict=True)]


class TimedStrategy(SingleDeviceStrategy):
    """Measures how long ``save_checkpoint`` holds the training loop."""

    stopwatch: Stopwatch

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Save, with the watch running."""
        start = perf_counter()
        self.stopwatch.started.append(start)
        super().save_checkpoint(*args, **kwargs)
        self.stopwatch.stalls.append(perf_counter() - start)


class TimedTorchCheckpointIO(TorchCheckpointIO):
    """Lightning's ordinary writer; tells when it has written."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self.stopwatch = stopwatch

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        """Save, and say that it is done."""
        super().save_checkpoint(checkpoint, path, storage_options)
        now = perf_counter()
        file_system, name = fsspec.url_to_fs(path)
        self.stopwatch.end(now, file_system.size(name))


def contestants(watch: Stopwatch) -> dict[str, Any]:
    """Return the three ways to save, by name, each telling *watch* when a file is written."""

    def observer(event: Event) -> None:
        if isinstance(event, Durable):
            watch.end(perf_counter(), event.nbytes)

    return {
        "async_ckpt": AsyncCheckpointIO(queue_depth=2, observer=observer),
        "Lightning's AsyncCheckpointIO": LightningAsyncCheckpointIO(TimedTorchCheckpointIO(watch)),
        "no plugin": TimedTorchCheckpointIO(watch),
    }


@dataclass
class Cost:
    """What one contestant's saves cost, over all rounds."""

    stalls: list[float] = field(default_factory=list)
    durations: list[float] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    fit_seconds: list[float] = field(default_factory=list)


def measure(root: str, epochs: int, rounds: int) -> dict[str, Cost]:
    """Train with each contestant in turn, *rounds* times over, always from the same seed."""
    names = list(contestants(Stopwatch()))
    costs = {name: Cost() for name in names}
    for number in range(rounds):
        for name in names[number:] + names[:number]:  # each goes first once
            watch = Stopwatch()
            strategy = TimedStrategy("cpu")
            strategy.stopwatch = watch
            folder = f"{root}/measured"
            begin = perf_counter()
            train(folder, epochs, plugins=[contestants(watch)[name]], strategy=strategy)
            cost = costs[name]
            cost.fit_seconds.append(perf_counter() - begin)
            remove(folder)
            cost.stalls += watch.stalls
            cost.durations += watch.durations
            cost.nbytes += watch.nbytes
            say(f"round {number + 1}/{rounds}  {name}: {cost.fit_seconds[-1]:.1f} s")
    return costs


def table(costs: dict[str, Cost]) -> list[str]:
    """Return the lines of the table: one a contestant, medians, numbers under their heads."""
    heads = ["", "saves", "MiB each", "stall a save", "worst", "until written", "training"]
    rows = [
        [
            name,
            f"{len(cost.stalls)}",
            f"{statistics.median(cost.nbytes) / 2**20:.1f}",
            f"{statistics.median(cost.stalls) * 1000:.1f} ms",
            f"{max(cost.stalls) * 1000:.0f} ms",
            f"{statistics.median(cost.durations) * 1000:.0f} ms",
            f"{statistics.median(cost.fit_seconds):.1f} s",
        ]
        for name, cost in costs.items()
    ]
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]
    return [
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in cells)
        for cells in (enumerate(zip(row, widths, strict=True)) for row in [heads, *rows])
    ]


# -------------------------------------------------------------------------------------------------- the six acts


class Proofs:
    """What was to be shown, and whether it was."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def show(self, claim: str, holds: bool) -> None:
        """Print *claim* with the outcome, and keep it if it does not hold."""
        say(f"{'proven' if holds else 'FAILED'}: {claim}")
        if not holds:
            self.failed.append(claim)


def play(place: Place, epochs: int, rounds: int) -> list[str]:
    """Run the six acts in *place*; return the claims that did not hold."""
    proofs = Proofs()
    first, second = f"{place.root}/first", f"{place.root}/second"

    title("1. Train")
    plugin = AsyncCheckpointIO(queue_depth=2)
    train(first, epochs, plugins=[plugin], callbacks=[ProgressLine(plugin)])
    proofs.show("the two best checkpoints and last.ckpt are there, nothing else", len(files(first)) == 3)

    title("2. Resume from last.ckpt and train on")
    saved = load(f"{first}/last.ckpt")
    began = FirstWeights()
    plugin = AsyncCheckpointIO(queue_depth=2)
    trainer = train(first, epochs + 2, plugins=[plugin], resume=True, callbacks=[began, ProgressLine(plugin)])
    proofs.show(
        "it began with the weights of the file, bit for bit", same(began.weights, saved["state_dict"])
    )
    proofs.show(
        f"it went on at step {saved['global_step']}, to {trainer.global_step}",
        trainer.global_step == saved["global_step"] // epochs * (epochs + 2),
    )

    title("3. Kill a second run in the middle of a save")
    code = kill_in_mid_save(second, epochs)
    proofs.show("the run was ended by SIGKILL", code == -signal.SIGKILL)
    if proofs.failed:
        return proofs.failed  # there is nothing to look at
    left = place.unfinished(second) if place.unfinished else []
    if place.unfinished:
        proofs.show(f"what it had not finished is still there, out of sight: {len(left)}", bool(left))
    proofs.show("every checkpoint has all its bytes", all(intact(file) for file in files(second)))
    saved = load(f"{second}/last.ckpt")
    proofs.show(f"last.ckpt is the one before, of epoch {saved['epoch'] + 1}", saved["epoch"] == 1)

    title("4. Resume the killed run")
    swept: list[str] = []
    plugin = AsyncCheckpointIO(
        queue_depth=2,
        observer=lambda event: swept.extend(event.names) if isinstance(event, Swept) else None,
    )
    began = FirstWeights()
    trainer = train(second, epochs, plugins=[plugin], resume=True, callbacks=[began, ProgressLine(plugin)])
    proofs.show(
        "it began with the weights of the file, bit for bit", same(began.weights, saved["state_dict"])
    )
    proofs.show("it trained to the end", trainer.current_epoch == epochs)
    if place.unfinished:
        proofs.show(
            "its first save swept away what the killed run had left",
            len(swept) == len(left) and place.unfinished(second) == [],
        )

    title("5. Open the file with plain torch.load")
    checkpoint = load(f"{first}/last.ckpt")
    say(f"torch.load(file, weights_only=True) → {', '.join(checkpoint)}")
    proofs.show("it is an ordinary checkpoint, and its checksums are right", intact(f"{first}/last.ckpt"))

    title("6. What does a save cost?")
    costs = measure(place.root, epochs, rounds)
    print()
    for line in table(costs):
        say(line)
    print()
    say("Times are medians, but for the worst.")
    say("stall: inside save_checkpoint, as the training loop sees it.")
    if "://" not in place.root:
        say("until written: from the call on. With async_ckpt the file is on the disk by then (fsync) and")
        say("  survives a loss of power; with the others the operating system has it, and writes it later.")
    else:
        say("until written: from the call on, until the object is there.")
    say("training: all of fit, to the end of the last save; the writer shares its cores.")
    stalls = {name: statistics.median(cost.stalls) for name, cost in costs.items()}
    proofs.show(
        f"a save stalls training {stalls['no plugin'] / stalls['async_ckpt']:.0f} times less than with no plugin",
        stalls["async_ckpt"] < stalls["no plugin"],
    )
    return proofs.failed


def files(folder: str) -> list[str]:
    """Return what lies in *folder* under a name that anyone would look for."""
    file_system, path = fsspec.url_to_fs(folder)
    file_system.invalidate_cache()  # another process has been there
    names = (name.rpartition("/")[2] for name in file_system.ls(path, detail=False))
    return sorted(f"{folder}/{name}" for name in names if not name.startswith("."))


def load(file: str) -> Any:
    """Load a checkpoint as anyone would who has never heard of this library."""
    with fsspec.open(file) as opened:
        return torch.load(opened, weights_only=True)


def intact(file: str) -> bool:
    """Tell whether *file* is whole, by the checksums inside."""
    with fsspec.open(file) as opened, zipfile.ZipFile(opened) as archive:
        return archive.testzip() is None


def remove(folder: str) -> None:
    """Remove *folder*."""
    file_system, path = fsspec.url_to_fs(folder)
    file_system.rm(path, recursive=True)


def same(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    """Tell whether two sets of weights are equal, bit for bit."""
    return weights.keys() == others.keys() and all(
        torch.equal(weights[name], others[name]) for name in weights
    )


def title(text: str) -> None:
    """Print the heading of an act."""
    print(f"\n{text}\n{'─' * len(text)}", flush=True)


def say(text: str) -> None:
    """Print a line of an act."""
    print(f"  {text}", flush=True)


def main() -> int:
    """Play the six acts; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--epochs", type=int, default=5, help="epochs of each training, 3 or more (default 5)"
    )
    parser.add_argument("--store", choices=STORES, default="local", help="what to save to (default local)")
    parser.add_argument(
        "--rounds", type=int, help="trainings a contestant in act 6 (default 3, on a server 1)"
    )
    parser.add_argument("--directory", type=Path, help="where local ones go (default: a temporary directory)")
    parser.add_argument("--keep", action="store_true", help="leave local ones there")
    parser.add_argument("--die", metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.epochs < 3:
        parser.error("--epochs must be 3 or more: the run that is killed dies in its third")

    torch.set_num_threads(1)  # who writes has the other cores, as if training were on a GPU
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    if arguments.die is not None:
        run_that_dies(arguments.die, arguments.epochs)
        return 1  # not reached
    if arguments.directory is not None:
        arguments.directory.mkdir(parents=True, exist_ok=True)
    rounds = arguments.rounds or (3 if arguments.store == "local" else 1)
    begin = perf_counter()
    with place(arguments.store, arguments.directory, keep=arguments.keep) as where:
        print(f"Checkpoints go to {where.root}")
        failed = play(where, arguments.epochs, rounds)
    seconds = perf_counter() - begin
    print(
        f"\n{'Everything was proven' if not failed else f'{len(failed)} claims FAILED'}, in {seconds:.0f} s."
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
