"""``AsyncCheckpointCallback``: what a Trainer does around asynchronous checkpoints, beside the plugin.

Guarantees: it does nothing in a Trainer whose checkpoints do not go through ``AsyncCheckpointIO``, and of several in a
Trainer exactly one acts; nothing of it is in any checkpoint. No collective operation is called.

What does not belong here: what happens during a fit; that is the companion's.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from time import time
from typing import TYPE_CHECKING, Any

from async_ckpt.lightning.companion import Companion
from async_ckpt.lightning.overrides import Overrides
from async_ckpt.lightning.plugin import AsyncCheckpointIO
from async_ckpt.lightning.registration import inherit_callback
from async_ckpt.lightning.strategies import bypass, plugin_of
from async_ckpt.timeline import Timeline

__all__ = ["AsyncCheckpointCallback", "FoundCallback"]

if TYPE_CHECKING:  # the Trainers of both Lightnings take it, whose classes have nothing in common
    from typing import Any as Callback
else:

    class Callback:
        """What takes the place of Lightning's classes until the program has imported them."""


class AsyncCheckpointCallback(Callback):  # type: ignore[misc]  # see above
    """Goes with ``AsyncCheckpointIO`` in a Trainer, which finds it by itself where entry points are installed.

    During ``fit`` it has ``ModelCheckpoint`` know of pending files, tells loggers of a checkpoint once it is durable,
    calls ``on_checkpoint_write_end(trainer, path)`` of callbacks and of the LightningModule, and waits for all at
    the end. Outside of ``fit``, a save returns when it is durable.

    Args:
        log_metrics: give what each durable save took to the trainer's loggers: ``checkpoint/stall_seconds`` and so on.
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
        self._begin_afresh()

    def _begin_afresh(self) -> None:
        inherit_callback(AsyncCheckpointCallback)
        self._plugin: AsyncCheckpointIO | None = None
        self._companion: Companion | None = None
        self._step_began_seconds = 0.0
        self._has_warned = False

    # -- Lightning's hooks

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Find the plugin, and see to it that its saves outside of ``fit`` are synchronous."""
        if self._companion is not None:  # whatever was to end it was itself interrupted
            self._companion.end()
        self._companion = None
        self._plugin = plugin = self.take_charge(trainer)
        if plugin is None:
            return
        self._warn_of_bypass(trainer)
        self._come_first(trainer)
        _see_to_teardown(trainer, plugin, self)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to accompany the fit, once every ``setup`` is done."""
        plugin = self._plugin
        if plugin is None:
            return
        self._companion = Companion(
            trainer,
            plugin,
            log_metrics=self._log_metrics,
            progress_bar=self._progress_bar,
            timeline=self._timeline if trainer.is_global_zero else None,
        )

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Take the time."""
        self._step_began_seconds = time()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell of what has become durable."""
        if self._companion is not None:
            self._companion.step_ended(f"batch {batch_idx}", self._step_began_seconds)
            self._companion.keep_up()

    def on_validation_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        """Tell of what has become durable; a validation may be long."""
        if self._companion is not None:
            self._companion.keep_up()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Wait for everything, before ``fit`` calls itself done.

        Raises:
            Exception: a save failed.
        """
        if self._companion is not None:
            self._companion.flush()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Wait for everything; what failed is added to the error's notes."""
        if self._companion is not None:
            self._companion.settle()
        elif self._plugin is None:  # what was called has failed before any setup
            self.take_charge(trainer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Tell of what has become durable since, while loggers listen."""
        companion, self._companion = self._companion, None
        if companion is not None:
            companion.end()

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        """See to it that a save is synchronous where no ``setup`` has come, as where others have been launched."""
        if self._plugin is None:
            self.take_charge(trainer)

    # -- ours

    def strategy_ends(self) -> None:
        """The strategy, and the plugin with it, is about to be torn down."""
        if self._companion is not None:
            self._companion.strategy_ends()

    def strategy_ended(self, error: BaseException | None) -> None:
        """The strategy has been torn down, and the plugin with it, and *error* has come up meanwhile."""
        if self._companion is not None:
            self._companion.strategy_ended(error)

    def take_charge(self, trainer: Any) -> AsyncCheckpointIO | None:
        """Return the plugin, if it is ours to accompany; from now on its saves outside of ``fit`` are synchronous.

        Called wherever one may be the first to save, so more than once.
        """
        plugin = plugin_of(trainer) if self._acts_in(trainer) else None
        if plugin is not None:
            plugin.accompany()
        return plugin

    def _acts_in(self, trainer: Any) -> bool:
        """Return whether it is this one that acts: the user's own comes before one that was found."""
        candidates = [each for each in trainer.callbacks if isinstance(each, AsyncCheckpointCallback)]
        candidates.sort(key=lambda each: isinstance(each, FoundCallback))
        return candidates[:1] == [self]

    def _come_first(self, trainer: Any) -> None:
        """Stay where the user has put this one."""

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
        self._begin_afresh()


class FoundCallback(AsyncCheckpointCallback):
    """The one that a Trainer has found by itself; it logs nothing, as nobody has asked for that."""

    def __init__(self) -> None:
        super().__init__(log_metrics=False)

    def _come_first(self, trainer: Any) -> None:
        """Come before the user's own, whose ``on_train_end`` and ``on_exception`` then find every file.

        The list is a new one, as Lightning is going through the old one. Its tuners, which it puts first, stay there.
        """
        others = [each for each in trainer.callbacks if each is not self]
        tuners = [each for each in others if _is_tuner(each)]
        trainer.callbacks = [*tuners, self, *(each for each in others if not _is_tuner(each))]


def _is_tuner(callback: Any) -> bool:
    return any(kind.__name__ in ("BatchSizeFinder", "LearningRateFinder") for kind in type(callback).__mro__)


def _tear_down_plugin(plugin: AsyncCheckpointIO, strategy: Any) -> None:
    if plugin.is_used:
        strategy.checkpoint_io.teardown()


def _see_to_teardown(trainer: Any, plugin: AsyncCheckpointIO, callback: AsyncCheckpointCallback) -> None:
    """Have the plugin torn down with the strategy, also where that does not: FSDP's, ModelParallel's."""
    strategy = trainer.strategy
    overrides = Overrides()
    tear_down = strategy.teardown

    def teardown() -> None:
        overrides.restore()
        with ExitStack() as steps:  # whatever fails in between; last first
            steps.push(lambda kind, error, trace: callback.strategy_ended(error))
            steps.callback(_tear_down_plugin, plugin, strategy)
            steps.callback(tear_down)
            callback.strategy_ends()

    overrides.replace(strategy, "teardown", teardown)
