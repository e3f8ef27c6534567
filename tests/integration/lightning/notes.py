"""What the companion callback tells, noted with the step of the training at which it did."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from async_ckpt.events import Durable, Event
from tests.support import PATIENCE_SECONDS


class Notes:
    """What happened, in order, with the step of the training at that time.

    Attributes:
        entries: what was noted.
        step: set by the training.
    """

    def __init__(self) -> None:
        self.entries: list[tuple[Any, ...]] = []
        self.step = 0
        self._durable = threading.Semaphore(0)

    def __call__(self, event: Event) -> None:
        """Take in an event of the plugin."""
        if isinstance(event, Durable):
            self._durable.release()

    def note(self, *entry: Any) -> None:
        """Note something."""
        assert threading.current_thread() is threading.main_thread()
        self.entries.append((*entry, self.step))

    def wait_durable(self, number: int) -> None:
        """Wait for so many more durable saves."""
        for _ in range(number):
            assert self._durable.acquire(timeout=PATIENCE_SECONDS)

    def of(self, what: str) -> list[tuple[Any, ...]]:
        """Return the rest of all notes that begin so."""
        return [entry[1:] for entry in self.entries if entry[0] == what]


def reading_logger(tree: Any, notes: Notes) -> Any:
    """Return a logger that reads each checkpoint that it is told of."""

    class Reads(tree.module("loggers.logger").Logger):  # type: ignore[misc]
        name = version = "reads"
        save_dir = None

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
            pass

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            notes.note("metrics", metrics, step)

        def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
            path = Path(checkpoint_callback._last_checkpoint_saved)
            notes.note("told", path.name, torch.load(path)["global_step"])

        def finalize(self, status: str) -> None:
            notes.note("finalized", status)

    return Reads()


def at_steps(tree: Any, notes: Notes, steps: dict[int, Callable[[], object]]) -> Any:
    """Return a callback that keeps the step and calls something before the batch after each step of *steps*."""

    class Steps(tree.pl.Callback):  # type: ignore[misc]
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            steps.get(trainer.global_step, lambda: None)()
            notes.step = trainer.global_step + 1

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            notes.note("train end")

    return Steps()
