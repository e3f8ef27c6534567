"""One fit in the company of the plugin: all that has to happen around it, from its start to its teardown.

Guarantees: whatever is put in the way of callbacks, loggers and the progress bar is gone when the fit has been torn
down, also after an error; an error in flight is never replaced (E2); once a wait at the end has run out of time,
nobody waits again. Of fits one within another, each knows of its own saves. Of several ranks, each returns from the fit
when all is durable, or raises what the first rank has failed with. No collective operation is called.

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
from async_ckpt.lightning.departure import departure_of
from async_ckpt.lightning.loggers import uses_checkpoints
from async_ckpt.lightning.model_checkpoint import make_aware
from async_ckpt.lightning.notifications import Notifications, hooks_of
from async_ckpt.lightning.overrides import Overrides
from async_ckpt.lightning.plugin import AsyncCheckpointIO
from async_ckpt.lightning.progress_bars import show_pending
from async_ckpt.lightning.removals import Removals
from async_ckpt.telemetry.meter import Meter
from async_ckpt.timeline import Timeline

__all__ = ["Companion"]

logger = logging.getLogger(__name__)

_meters: WeakKeyDictionary[AsyncCheckpointIO, list[Meter]] = WeakKeyDictionary()
"""Of the fits that a plugin is in, one within another; what is saved now belongs to the last."""

_NAMED_FAILURES = 8


class Companion:
    """What accompanies one fit of *trainer*, whose checkpoints *plugin* writes."""

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
        self._departure = departure_of(trainer, plugin.service.options.limit(None))
        self._overrides = Overrides()
        # False where another Trainer's fit, around this one, has the plugin, too.
        self._was_synchronous, self._was_direct = plugin.synchronous, plugin.is_direct
        plugin.synchronous = False
        try:
            self._removals = Removals(
                plugin,
                self._overrides,
                is_awaited=self._notifications.awaits,
                before_replacing=self._before_replacing,
            )
            self._begin(progress_bar)
        except BaseException:
            self._leave()
            raise

    def _begin(self, progress_bar: bool) -> None:
        trainer = self._trainer
        _meters.setdefault(self._plugin, []).append(self._meter)
        self._plugin.observe(self._take_in)
        if self._timeline is not None:
            self._plugin.observe(self._timeline)
        deferred = trainer.callbacks
        if self._plugin.direct_saves == "durable":
            # First: what is put in the way below would pass for a method of the user's.
            deferred = defer(trainer, self._overrides)
            self._plugin.is_direct = is_direct
        for callback in trainer.callbacks:
            is_deferred = any(callback is each for each in deferred)
            make_aware(callback, self._plugin, self._removals, self._overrides, is_deferred=is_deferred)
        for each in filter(uses_checkpoints, trainer.loggers):
            hold_back = partial(self._hold_back, each.after_save_checkpoint)
            self._overrides.replace(each, "after_save_checkpoint", hold_back)
        bar = trainer.progress_bar_callback
        if progress_bar and hasattr(bar, "get_metrics"):
            show_pending(bar, self._plugin.meter, self._overrides)

    def keep_up(self) -> None:
        """Tell of what has become durable; called after each batch, so it costs next to nothing."""
        self._notifications.tell(self._trainer)
        self._removals.release()

    def flush(self) -> None:
        """Wait for everything, raise what failed, tell of the rest.

        Nobody waits for what is saved from now on, so each save does.
        """
        began_seconds = time()
        if self._departure is not None:
            self._departure.training_ended()
        try:
            if self._plugin.is_used:
                self._plugin.wait()
            self._plugin.synchronous = self._was_synchronous
            if self._departure is not None:
                self._departure.agree()
        except FlushTimeoutError as error:
            self._out_of_time = True
            self._failures.append(_named(error))
            raise
        finally:
            self._record("training thread", "flush", began_seconds)
        self.keep_up()

    def settle(self) -> None:
        """Like ``flush``, for callers that are already handling an error; later saves are waited for at once."""
        self._failing = True
        began_seconds = time()
        self._settle()
        self._record("training thread", "flush", began_seconds)

    def strategy_ends(self) -> None:
        """Have removed what was to be, before the plugin is torn down."""
        self._removals.release(everything=True)

    def strategy_ended(self, error: BaseException | None) -> None:
        """Leave the fit, with the other ranks; *error* is what came up as the strategy was torn down.

        Nobody waits for what is saved from now on, so each save does.
        """
        self._plugin.synchronous = self._was_synchronous
        try:
            self._depart(error or sys.exc_info()[1])
        finally:
            if self._failing:  # no hook follows
                self.end()

    def end(self) -> None:
        """Tell of the rest and be gone."""
        try:
            if self._failing:
                self._notifications.leave_loggers()
                self._notifications.tell_or_log(self._trainer)
            else:
                self.keep_up()
        finally:
            self._leave()
            self._write_timeline()

    def step_ended(self, name: str, began_seconds: float) -> None:
        """Show a step of the training in the timeline."""
        self._record("steps", name, began_seconds)

    def _leave(self) -> None:
        self._plugin.synchronous, self._plugin.is_direct = self._was_synchronous, self._was_direct
        self._overrides.restore()
        self._plugin.disregard(self._take_in)
        if self._timeline is not None:
            self._plugin.disregard(self._timeline)
        meters = _meters.get(self._plugin, [])
        if self._meter in meters:
            meters.remove(self._meter)

    def _depart(self, error: BaseException | None) -> None:
        if self._departure is None:
            return
        tells = error is not None and self._plugin.service.options.on_error == "raise"
        failure = "; ".join(self._failures) if tells else ""
        # Who presses Ctrl-C does not want to wait.
        waits = error is None or isinstance(error, Exception)
        self._departure.leave(failure=failure or None, waits=waits)

    def _take_in(self, event: Event) -> None:
        """Hand on an event, but not of what a fit within this one saves."""
        if isinstance(event, Failed):
            self._failures.append(_named(event.error))
        if not isinstance(event, Accepted) or _meters[self._plugin][-1:] == [self._meter]:
            self._meter(event)

    def _hold_back(self, tell: Any, checkpoint_callback: Any) -> None:
        self._notifications.hold_back(self._trainer, tell, checkpoint_callback)
        if self._failing:  # loggers are finalized before there is another occasion
            self._settle()

    def _before_replacing(self, path: str) -> None:
        """Have loggers look at *path* as it is, before this step saves there; on training's thread alone."""
        untold = self._notifications.untold_of(path, self._trainer.global_step)
        if not untold or threading.get_ident() != self._thread:
            return
        self._plugin.see_ended(untold)
        self._notifications.tell_loggers()

    def _settle(self) -> None:
        if not self._out_of_time:
            self._plugin.settle()
            self._out_of_time = self._plugin.is_used and bool(self._plugin.service.pending)
        self._notifications.tell_or_log(self._trainer)
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
