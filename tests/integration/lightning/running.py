"""Runs a random set-up of ``ModelCheckpoint``, with synchronous checkpoints or with ours, and tells what came of it.

Guarantees: storage that lags or is late does so by the training's own steps, not by the clock.

What does not belong here: what is run (setups), and whether it is as it should be (test_any_setup).
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import os
import shutil
import signal
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, TensorDataset

from async_ckpt import AsyncCheckpointCallback, AsyncCheckpointIO
from async_ckpt.stores import open_store
from async_ckpt.stores.base import Location, Store, Workers
from async_ckpt.testing.faults import Fault, FaultyStore, Gate
from tests.integration.lightning.both_ways import sparing
from tests.integration.lightning.setups import (
    BATCHES,
    FOLDERS,
    PRETRAINED,
    Fit,
    Link,
    Program,
    Put,
    Save,
    Unlink,
    Validate,
)

__all__ = ["STORAGES", "Ours", "Run", "Storage", "Synchronous", "contents"]

Storage = Literal["fast", "slow", "lagging", "late"]
STORAGES: tuple[Storage, ...] = ("fast", "slow", "lagging", "late")

SLOW_SECONDS = 0.002


class Pace(Gate):
    """Holds storage up while a training runs: lets one through for each batch, or none until the training ends."""

    def __init__(self, storage: Storage) -> None:
        super().__init__()
        self._storage = storage
        self._lock_of_gates = threading.Lock()
        self._gates: list[Gate] = []  # one for each who comes
        self._is_on = False
        self._come = self._let_through = 0

    def begin(self) -> None:
        """A training begins."""
        with self._lock_of_gates:
            self._is_on = self._storage in ("lagging", "late")

    def tick(self) -> None:
        """A batch has been trained with."""
        if self._storage == "lagging":
            with self._lock_of_gates:
                self._gate(self._let_through).open()
                self._let_through += 1

    def open(self) -> None:
        """Let everyone through from now on."""
        with self._lock_of_gates:
            gates, self._gates = self._gates, []
            self._is_on = False
            self._come = self._let_through = 0
        for gate in gates:
            gate.open()

    async def passage(self) -> None:
        """Wait to be let through, in order of arrival."""
        with self._lock_of_gates:
            if not self._is_on:
                return
            gate = self._gate(self._come)
            self._come += 1
        await gate.passage()

    def _gate(self, number: int) -> Gate:
        while len(self._gates) <= number:
            self._gates.append(Gate())
        return self._gates[number]


class Synchronous:
    """Lightning alone."""

    def options(self, tree: Any) -> dict[str, list[Any]]:
        """Return the plugins and callbacks of one more Trainer."""
        return {"plugins": [], "callbacks": []}


class Ours:
    """With the plugin and its companion, on storage of some kind."""

    def __init__(self, storage: Storage, *, base: bool, **options: Any) -> None:
        self._storage: Storage = storage
        self._base = base
        self._options = options
        if storage in ("lagging", "late"):
            options |= {"queue_depth": 1000, "direct_saves": "async"}  # the training never waits

    def options(self, tree: Any) -> dict[str, list[Any]]:
        """Return the plugins and callbacks of one more Trainer."""
        pace = Pace(self._storage)
        if self._base:
            plugin = _Pressing(_paced_base(tree, pace), **self._options)
        else:
            plugin = _Pressing(store_factory=partial(self._store, pace), **self._options)
        plugin.pace = pace
        return {"plugins": [plugin], "callbacks": [_pacing(tree, pace), AsyncCheckpointCallback()]}

    def _store(self, pace: Pace, location: Location, workers: Workers) -> Store:
        delay = SLOW_SECONDS if self._storage == "slow" else 0.0
        faults = [
            Fault(operation="commit", gate=pace, delay_seconds=delay),
            Fault(operation="delete", gate=pace, delay_seconds=delay),
        ]
        return FaultyStore(open_store(location, workers=workers, durability="process"), faults)


class _Pressing(AsyncCheckpointIO):
    """The plugin; storage is not held up while training itself waits for a file that its logger is to see."""

    pace: Pace

    def see_ended(self, urls: Collection[str]) -> None:
        """Let through what has come, and what comes meanwhile."""
        self.pace.open()
        super().see_ended(urls)
        self.pace.begin()


def _paced_base(tree: Any, pace: Pace) -> Any:
    class Paced(tree.fabric.plugins.TorchCheckpointIO):  # type: ignore[misc]  # a base that is found at run time
        def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            asyncio.run(pace.passage())
            super().save_checkpoint(*args, **kwargs)

        def remove_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            asyncio.run(pace.passage())
            super().remove_checkpoint(*args, **kwargs)

    return Paced()


def _pacing(tree: Any, pace: Pace) -> Any:
    class Pacing(tree.pl.callbacks.Callback):  # type: ignore[misc]  # the same
        def on_train_start(self, *args: Any, **kwargs: Any) -> None:
            pace.begin()

        def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
            pace.tick()

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            pace.open()

        on_exception = teardown = on_train_end

    return Pacing()


class Run:
    """One run of a program in a folder that does not exist yet.

    Attributes:
        seen: after each step, what there was to see: values by name, each file's bytes and each link's target included.
    """

    def __init__(self, tree: Any, root: Path, way: Synchronous | Ours, pretrained: bytes) -> None:
        self.seen: list[dict[str, Any]] = []
        self._tree = tree
        self._root = root
        self._way = way
        self._trainer: Any = None
        self._module: Any = None
        self._told: list[Any] = []
        for folder in (*FOLDERS, "shared"):
            (root / folder).mkdir(parents=True)
        (root / "alias").symlink_to("a")
        (root / PRETRAINED).write_bytes(pretrained)

    def play(self, program: Program) -> list[dict[str, Any]]:
        """Run it and return what was seen."""
        for step in program:
            result = {}
            match step:
                case Fit():
                    result = self._fit(step)
                case Validate(resume=resume):
                    result = self._attempt(
                        lambda: self._trainer.validate(self._module, ckpt_path=resume, verbose=False)
                    )
                case Save(name=name, weights_only=weights_only):
                    result = self._attempt(
                        lambda: self._trainer.save_checkpoint(self._root / name, weights_only)
                    )
                case Put(name=name):
                    self._unlink(name)
                    shutil.copy(self._root / PRETRAINED, self._root / name)
                case Link(name=name, target=target):
                    self._unlink(name)
                    path = self._root / name
                    path.symlink_to(os.path.relpath(self._root / target, path.parent))
                case Unlink(name=name):
                    self._unlink(name)
            self.seen.append({**result, **contents(self._root)})
        return self.seen

    def _unlink(self, name: str) -> None:
        if os.path.lexists(self._root / name):
            (self._root / name).unlink()

    def _fit(self, fit: Fit) -> dict[str, Any]:
        if not fit.again:
            self._module = _model(self._tree)
            self._trainer = self._new_trainer(fit)
        self._module.script = fit
        self._trainer.fit_loop.max_epochs = fit.epochs
        with _handlers_kept():
            result = self._attempt(lambda: self._trainer.fit(self._module, ckpt_path=fit.resume))
        result["weights"] = self._module.state_dict()
        result["step"] = self._trainer.global_step
        result["told"] = list(self._told)
        for number, callback in enumerate(self._trainer.checkpoint_callbacks):
            result[f"state of {number}"] = callback.state_dict()
        find = (
            self._trainer._checkpoint_connector._parse_ckpt_path
        )  # what ``ckpt_path=`` means, without loading it
        for path in ("best", "last"):
            found = partial(find, self._trainer.state.fn, path, model_provided=True, model_connected=True)
            result |= self._attempt(found, f"ckpt_path={path!r}")
        return result

    def _attempt(self, call: Any, name: str = "result") -> dict[str, Any]:
        try:
            return {name: call()}
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            return {name: repr(error)}

    def _new_trainer(self, fit: Fit) -> Any:
        ours = self._way.options(self._tree)
        callbacks = [self._checkpoint(options) for options in fit.checkpoints]
        if fit.copies:
            callbacks.insert(0, _copying(self._tree, self._root))
        self._told = []
        return self._tree.trainer(
            self._root,
            plugins=ours["plugins"],
            callbacks=[*ours["callbacks"], *callbacks],
            logger=_logger(self._tree, self._root, self._told) if fit.logger else False,
            **fit.trainer,
        )

    def _checkpoint(self, options: dict[str, Any]) -> Any:
        known = inspect.signature(self._tree.pl.callbacks.ModelCheckpoint).parameters.keys()
        options = {name: options[name] for name in options if name in known | {"CHECKPOINT_NAME_LAST"}}
        name_of_last = options.pop("CHECKPOINT_NAME_LAST", None)
        folder = options.pop("dirpath")
        folder = None if folder is None else f"{self._root}/{folder}"
        checkpoint = self._tree.checkpoints(folder, **options)
        if isinstance(self._way, Synchronous):
            checkpoint = sparing(checkpoint)
        if name_of_last is not None:
            checkpoint.CHECKPOINT_NAME_LAST = name_of_last
        return checkpoint


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Lightning goes on to ignore Ctrl-C once it has met it."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def contents(folder: Path) -> dict[str, Any]:
    """Return what a folder holds: each file's bytes, each link's target."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


def _model(tree: Any) -> Any:
    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.script.breaks_at == self.global_step:
            raise self.script.breaks_by
        self.log("loss", torch.tensor(self.script.scores[self.global_step % len(self.script.scores)]))
        return self.layer(batch[0]).pow(2).mean()

    def validation_step(self: Any, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", torch.tensor(self.script.scores[self.current_epoch % len(self.script.scores)]))

    def batches(self: Any) -> Any:
        data = torch.linspace(-1, 1, BATCHES * 2 * 8).reshape(-1, 8)
        return DataLoader(TensorDataset(data), batch_size=2)

    return tree.model(
        training_step=training_step,
        validation_step=validation_step,
        train_dataloader=batches,
        val_dataloader=batches,
    )


def _copying(tree: Any, root: Path) -> Any:
    class Copying(tree.pl.callbacks.Checkpoint):  # type: ignore[misc]  # a base that is found at run time
        """Saves, replaces and removes as it likes."""

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            step = trainer.global_step
            trainer.save_checkpoint(root / "a" / f"{step}.ckpt", weights_only=step % 2 == 0)
            trainer.save_checkpoint(root / "a" / "last.ckpt")
            if step > 2:
                trainer.strategy.remove_checkpoint(root / "a" / f"{step - 2}.ckpt")

    return Copying()


def _logger(tree: Any, root: Path, told: list[Any]) -> Any:
    class Told(tree.module("loggers.logger").Logger):  # type: ignore[misc]  # the same
        name, version, save_dir = "told", "0", str(root)

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
            pass

        def log_metrics(self, *args: Any, **kwargs: Any) -> None:
            pass

        def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
            told.append(copy.deepcopy(checkpoint_callback.state_dict()))

    return Told()
