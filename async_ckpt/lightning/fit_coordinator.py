"""Coordinates one fit with the plugin's asynchronous saves, from its start to its teardown.

Guarantees: overrides of callbacks, loggers and the progress bar are undone when the fit is torn down, also after an
error; an error in flight is never replaced (E2); after one wait at the end has timed out, there is no other. If fits
are nested, each one sees only its own saves. Every rank returns from the fit when all checkpoints are durable, or
raises the first rank's failure. No collective operation is called.

What does not belong here: Lightning's hooks (callback).
"""

from __future__ import annotations

import logging
import sys
import threading
from collections import deque
from functools import partial
from time import time
from typing import Any
from weakref import WeakKeyDictionary

from async_ckpt.errors import FlushTimeoutError
from async_ckpt.events import Accepted, Event, Failed
from async_ckpt.lightning.deferral import defer, is_direct
from async_ckpt.lightning.exit_barrier import exit_barrier_of
from async_ckpt.lightning.loggers import uses_checkpoints
from async_ckpt.lightning.model_checkpoint import show_pending_files
from async_ckpt.lightning.notifications import Notifications, hooks_of
from async_ckpt.lightning.overrides import Overrides
from async_ckpt.lightning.plugin import AsyncCheckpointIO
from async_ckpt.lightning.progress_bars import show_pending
from async_ckpt.lightning.removals import Removals
from async_ckpt.telemetry.meter import Meter
from async_ckpt.timeline import Timeline

__all__ = ["FitCoordinator"]

logger = logging.getLogger(__name__)

_meters: WeakKeyDictionary[AsyncCheckpointIO, list[Meter]] = WeakKeyDictionary()
"""The meters of a plugin's nested fits; a new save belongs to the last one."""

_NAMED_FAILURES = 8


class FitCoordinator:
    """Coordinates one fit of *trainer*, whose checkpoints *plugin* writes."""

    def __init__(
        self,
        trainer: Any,
        plugin: AsyncCheckpointIO,
        *,
        log_metrics: bool,
        progress_bar: bool,
        timeline: Timeline | None,
    ) -> None:
        self._trainer = trainer
        self._plugin = plugin
        self._meter = Meter()
        self._notifications = Notifications(
            self._meter,
            log_metrics=log_metrics,
            has_hooks=bool(hooks_of(trainer)),
            address_of=plugin.address_of,
        )
        self._timeline = timeline
        self._failing = False
        self._thread = threading.get_ident()
        self._out_of_time = False
        self._failures: deque[str] = deque(maxlen=_NAMED_FAILURES)
        self._exit_barrier = exit_barrier_of(trainer, plugin.service.options.limit(None))
        self._overrides = Overrides()
        # False if this fit runs within another Trainer's fit that uses the same plugin.
        self._was_synchronous, self._was_direct = plugin.synchronous, plugin.is_direct
        plugin.synchronous = False
        try:
            self._removals = Removals(
                plugin,
                self._overrides,
                is_awaited=self._notifications.is_awaited,
                before_replacing=self._before_replacing,
            )
            self._begin(progress_bar)
        except BaseException:
            self._leave()
            raise

    def _begin(self, progress_bar: bool) -> None:
        trainer = self._trainer
        _meters.setdefault(self._plugin, []).append(self._meter)
        self._plugin.observe(self._relay)
        if self._timeline is not None:
            self._plugin.observe(self._timeline)
        deferred = trainer.callbacks
        if self._plugin.direct_saves == "durable":
            # First: the overrides below would be mistaken for methods of the user's.
            deferred = defer(trainer, self._overrides)
            self._plugin.is_direct = is_direct
        for callback in trainer.callbacks:
            is_deferred = any(callback is each for each in deferred)
            show_pending_files(
                callback, self._plugin, self._removals, self._overrides, is_deferred=is_deferred
            )
        for each in filter(uses_checkpoints, trainer.loggers):
            hold_back = partial(self._hold_back, each.after_save_checkpoint)
            self._overrides.replace(each, "after_save_checkpoint", hold_back)
        bar = trainer.progress_bar_callback
        if progress_bar and hasattr(bar, "get_metrics"):
            show_pending(bar, self._plugin.meter, self._overrides)

    def report(self) -> None:
        """Report what has become durable; called after each batch, so it must be cheap."""
        self._notifications.notify(self._trainer)
        self._removals.release()

    def flush(self) -> None:
        """Wait for all saves, raise failures, and report what became durable.

        Saves from now on are synchronous, as no later wait would cover them.
        """
        began_seconds = time()
        if self._exit_barrier is not None:
            self._exit_barrier.training_ended()
        try:
            if self._plugin.is_used:
                self._plugin.wait()
            self._plugin.synchronous = self._was_synchronous
            if self._exit_barrier is not None:
                self._exit_barrier.wait_for_first_rank()
        except FlushTimeoutError as error:
            self._out_of_time = True
            self._failures.append(_named(error))
            raise
        finally:
            self._record("training thread", "flush", began_seconds)
        self.report()

    def settle(self) -> None:
        """Like ``flush``, for callers that are already handling an error; later saves are synchronous."""
        self._failing = True
        began_seconds = time()
        self._settle()
        self._record("training thread", "flush", began_seconds)

    def strategy_ends(self) -> None:
        """Request all removals that were held back, before the plugin is torn down."""
        self._removals.release(everything=True)

    def strategy_ended(self, error: BaseException | None) -> None:
        """Leave the fit together with the other ranks; *error* was raised as the strategy was torn down.

        Saves from now on are synchronous, as no later wait would cover them.
        """
        self._plugin.synchronous = self._was_synchronous
        try:
            self._leave_with_others(error or sys.exc_info()[1])
        finally:
            if self._failing:  # no hook follows
                self.end()

    def end(self) -> None:
        """Report what became durable, and undo the overrides."""
        try:
            if self._failing:
                self._notifications.leave_loggers()
                self._notifications.report_or_log(self._trainer)
            else:
                self.report()
        finally:
            self._leave()
            self._write_timeline()

    def step_ended(self, name: str, began_seconds: float) -> None:
        """Record a step of the training in the timeline."""
        self._record("steps", name, began_seconds)

    def _leave(self) -> None:
        self._plugin.synchronous, self._plugin.is_direct = self._was_synchronous, self._was_direct
        self._overrides.restore()
        self._plugin.disregard(self._relay)
        if self._timeline is not None:
            self._plugin.disregard(self._timeline)
        meters = _meters.get(self._plugin, [])
        if self._meter in meters:
            meters.remove(self._meter)

    def _leave_with_others(self, error: BaseException | None) -> None:
        if self._exit_barrier is None:
            return
        tells = error is not None and self._plugin.service.options.on_error == "raise"
        failure = "; ".join(self._failures) if tells else ""
        # After Ctrl-C, nobody wants to wait.
        waits = error is None or isinstance(error, Exception)
        self._exit_barrier.leave(failure=failure or None, waits=waits)

    def _relay(self, event: Event) -> None:
        """Pass an event on to the meter, unless a nested fit made the save."""
        if isinstance(event, Failed):
            self._failures.append(_named(event.error))
        if not isinstance(event, Accepted) or _meters[self._plugin][-1:] == [self._meter]:
            self._meter(event)

    def _hold_back(self, notify: Any, checkpoint_callback: Any) -> None:
        self._notifications.hold_back(self._trainer, notify, checkpoint_callback)
        if self._failing:  # loggers are finalized before there is another occasion
            self._settle()

    def _before_replacing(self, path: str) -> None:
        """Notify loggers of the file at *path* before this step replaces it; only on the training thread."""
        unnotified = self._notifications.unnotified_of(path, self._trainer.global_step)
        if not unnotified or threading.get_ident() != self._thread:
            return
        self._plugin.see_ended(unnotified)
        self._notifications.notify_loggers()

    def _settle(self) -> None:
        if not self._out_of_time:
            self._plugin.settle()
            self._out_of_time = self._plugin.is_used and bool(self._plugin.service.pending)
        self._notifications.report_or_log(self._trainer)
        self._removals.release()

    def _record(self, track: str, name: str, began_seconds: float) -> None:
        if self._timeline is not None:
            self._timeline.slice(track, name, began_seconds, time())

    def _write_timeline(self) -> None:
        if self._timeline is not None:
            try:
                self._timeline.write()
            except OSError:
                logger.exception("the timeline was not written")


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
