"""``AsyncCheckpointCallback``: the callback that goes with the plugin in a Trainer.

Guarantees: it does nothing in a Trainer that does not save through ``AsyncCheckpointIO``; if a Trainer has several,
exactly one of them is active; it adds nothing to checkpoints. No collective operation is called.

What does not belong here: what is done during a fit (fit_coordinator).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from time import time
from typing import TYPE_CHECKING, Any

from async_ckpt.lightning.fit_coordinator import FitCoordinator
from async_ckpt.lightning.overrides import Overrides
from async_ckpt.lightning.plugin import AsyncCheckpointIO
from async_ckpt.lightning.registration import inherit_callback
from async_ckpt.lightning.sharded import take_over
from async_ckpt.lightning.strategies import bypass, plugin_of
from async_ckpt.snapshot.lazy import pass_all
from async_ckpt.timeline import Timeline

__all__ = ["AsyncCheckpointCallback", "FoundCallback"]

if TYPE_CHECKING:  # the Trainers of both Lightnings take it, whose classes have nothing in common
    from typing import Any as Callback
else:

    class Callback:
        """Stands in for Lightning's ``Callback`` classes until the program has imported them."""


class AsyncCheckpointCallback(Callback):  # type: ignore[misc]  # see above
    """The companion of ``AsyncCheckpointIO`` in a Trainer, which finds it by its entry point.

    During ``fit``, it makes pending files visible to ``ModelCheckpoint``, notifies loggers of a checkpoint once it is
    durable, calls ``on_checkpoint_write_end(trainer, path)`` of callbacks and of the LightningModule, and waits for all
    saves at the end. Outside of ``fit``, a save returns when it is durable.

    Args:
        log_metrics: log figures of each durable save to the trainer's loggers: ``checkpoint/stall_seconds`` and so on.
        progress_bar: show pending saves in the training's progress bar.
        timeline: where to write a trace of the run; see ``Timeline``.

    Raises:
        ImportError: no Lightning with a Trainer is installed.
    """

    def __init__(
        self,
        *,
        log_metrics: bool = True,
        progress_bar: bool = True,
        timeline: str | os.PathLike[str] | None = None,
    ) -> None:
        self._log_metrics = log_metrics
        self._progress_bar = progress_bar
        self._timeline = None if timeline is None else Timeline(timeline)
        self._reset()

    def _reset(self) -> None:
        inherit_callback(AsyncCheckpointCallback)
        self._plugin: AsyncCheckpointIO | None = None
        self._coordinator: FitCoordinator | None = None
        self._step_began_seconds = 0.0
        self._has_warned = False

    # -- Lightning's hooks

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Find the plugin, and make its saves outside of ``fit`` synchronous."""
        if self._coordinator is not None:  # the hook that should have ended it was interrupted
            self._coordinator.end()
        self._coordinator = None
        self._plugin = plugin = self.take_charge(trainer)
        if plugin_of(trainer) is not None:
            self._take_position(trainer)
        if plugin is None:
            return
        self._warn_of_bypass(trainer)
        _hook_into_teardown(trainer, plugin, self)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to coordinate the fit, once every ``setup`` is done."""
        plugin = self._plugin
        if plugin is None:
            return
        self._coordinator = FitCoordinator(
            trainer,
            plugin,
            log_metrics=self._log_metrics,
            progress_bar=self._progress_bar,
            timeline=self._timeline if trainer.is_global_zero else None,
        )

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Note when the step begins."""
        self._step_began_seconds = time()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report what has become durable."""
        if self._coordinator is not None:
            self._coordinator.step_ended(f"batch {batch_idx}", self._step_began_seconds)
            self._coordinator.report()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Have lazy snapshots copied: other callbacks may now put averaged weights in place of the trained ones."""
        pass_all()

    def on_validation_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        """Report what has become durable; a validation may be long."""
        if self._coordinator is not None:
            self._coordinator.report()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Wait for all saves before ``fit`` ends; at least for their copies, if another one of us does that.

        Raises:
            Exception: a save failed.
        """
        pass_all()  # other callbacks may now put averaged weights in for good
        if self._coordinator is not None:
            self._coordinator.flush()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Wait for all saves; add failures to the notes of the error that is in flight."""
        if self._coordinator is not None:
            self._coordinator.settle()
        elif self._plugin is None:  # the call failed before `setup`
            self.take_charge(trainer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Report the saves that have become durable since, before loggers are finalized."""
        companion, self._coordinator = self._coordinator, None
        if companion is not None:
            companion.end()

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        """Make the save synchronous if no ``setup`` was called in this process, as after launching others."""
        if self._plugin is None:
            self.take_charge(trainer)

    # -- ours

    def strategy_ends(self) -> None:
        """Called just before the strategy, and with it the plugin, is torn down."""
        if self._coordinator is not None:
            self._coordinator.strategy_ends()

    def strategy_ended(self, error: BaseException | None) -> None:
        """Called after the strategy, and with it the plugin, was torn down; *error* was raised meanwhile."""
        if self._coordinator is not None:
            self._coordinator.strategy_ended(error)

    def take_charge(self, trainer: Any) -> AsyncCheckpointIO | None:
        """Return the plugin if this callback is active; its saves outside of ``fit`` are synchronous from now on.

        Called, possibly several times, before anything that may be the first save.
        """
        plugin = plugin_of(trainer) if self._acts_in(trainer) else None
        if plugin is not None:
            plugin.accompany()
            take_over(trainer.strategy, plugin)
        return plugin

    def _acts_in(self, trainer: Any) -> bool:
        """Return whether this callback is the active one: the user's own is preferred to one that was found."""
        candidates = [each for each in trainer.callbacks if isinstance(each, AsyncCheckpointCallback)]
        candidates.sort(key=lambda each: isinstance(each, FoundCallback))
        return candidates[:1] == [self]

    def _take_position(self, trainer: Any) -> None:
        """Stay at the position that the user chose."""

    def _warn_of_bypass(self, trainer: Any) -> None:
        advice = bypass(trainer.strategy)
        if advice is not None and not self._has_warned and trainer.is_global_zero:
            self._has_warned = True
            warnings.warn(advice, stacklevel=2)

    def __getstate__(self) -> Mapping[str, Any]:
        return {
            "log_metrics": self._log_metrics,
            "progress_bar": self._progress_bar,
            "timeline": self._timeline,
        }

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self._log_metrics = state["log_metrics"]
        self._progress_bar = state["progress_bar"]
        self._timeline = state["timeline"]
        self._reset()


class FoundCallback(AsyncCheckpointCallback):
    """The callback that a Trainer finds by its entry point; it logs no metrics, as the user did not ask for them."""

    def __init__(self) -> None:
        super().__init__(log_metrics=False)

    def _take_position(self, trainer: Any) -> None:
        """Move before the user's callbacks, so that their ``on_train_end`` and ``on_exception`` find every file.

        Even if the user's own is the active one: what changes weights must not come before the copy of lazy snapshots.
        The list is replaced, as Lightning is iterating over the old one. Tuners, which Lightning puts first, stay
        first.
        """
        others = [each for each in trainer.callbacks if each is not self]
        tuners = [each for each in others if _is_tuner(each)]
        trainer.callbacks = [*tuners, self, *(each for each in others if not _is_tuner(each))]


def _is_tuner(callback: Any) -> bool:
    return any(kind.__name__ in ("BatchSizeFinder", "LearningRateFinder") for kind in type(callback).__mro__)


def _tear_down_plugin(plugin: AsyncCheckpointIO, strategy: Any) -> None:
    if plugin.is_used:
        strategy.checkpoint_io.teardown()


def _hook_into_teardown(trainer: Any, plugin: AsyncCheckpointIO, callback: AsyncCheckpointCallback) -> None:
    """Make the strategy's teardown tear the plugin down; FSDP's and ModelParallel's do not."""
    strategy = trainer.strategy
    overrides = Overrides()
    tear_down = strategy.teardown

    def teardown() -> None:
        overrides.restore()
        with ExitStack() as steps:  # all of them, even if one fails; in reverse order
            steps.push(lambda kind, error, trace: callback.strategy_ended(error))
            steps.callback(_tear_down_plugin, plugin, strategy)
            steps.callback(tear_down)
            callback.strategy_ends()

    overrides.replace(strategy, "teardown", teardown)
