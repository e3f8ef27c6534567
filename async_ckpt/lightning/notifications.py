"""Notifies loggers, and objects with ``on_checkpoint_write_end``, of saves when they are durable.

Guarantees: every notification happens on the training thread, once; hooks are called in the order in which the saves
became durable, a logger in the order in which they were made; a failed save is never notified. A logger sees the
checkpoint callback as it was at the time of the save, as with synchronous checkpoints, and is notified at once if the
save has ended.

What does not belong here: when to notify (fit_coordinator), and keeping files until then (removals).
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from async_ckpt.events import Durable
from async_ckpt.lightning.metrics import figures, log_figures
from async_ckpt.stores.redaction import redacted_url
from async_ckpt.telemetry.meter import Meter, SaveProgress

__all__ = ["Notifications", "hooks_of"]

logger = logging.getLogger(__name__)

HOOK = "on_checkpoint_write_end"


@dataclass(eq=False, slots=True, kw_only=True)
class _Call:
    """A call to a logger that is held back until its saves have ended."""

    saves: list[SaveProgress]
    notify: Callable[[Any], Any]
    view: Any
    attributes: dict[str, Any] | None
    step: int

    @property
    def files(self) -> set[str]:
        """The files that a logger may read when it is notified: all that the callback names."""
        known = self.attributes or {}
        named = (known.get("best_model_path"), known.get("last_model_path"), *known.get("best_k_models", ()))
        return {save.url for save in self.saves} | {redacted_url(os.fspath(path)) for path in named if path}


class Notifications:
    """The pending notifications of one fit.

    Args:
        meter: the meter of the fit; nothing else may take its ended saves.
        log_metrics: whether to log metrics.
        has_hooks: whether any object has ``on_checkpoint_write_end``.
        address_of: returns the full address for a location as events name it.
    """

    def __init__(
        self,
        meter: Meter,
        *,
        log_metrics: bool,
        has_hooks: bool = False,
        address_of: Callable[[str], str] = lambda url: url,
    ) -> None:
        self._meter = meter
        self._has_hooks = has_hooks
        self._log_metrics = log_metrics
        self._address_of = address_of
        self._ended: deque[SaveProgress] = deque()
        self._held: list[_Call] = []
        self._views: dict[int, tuple[Any, Any]] = {}

    def hold_back(self, trainer: Any, notify: Callable[[Any], Any], checkpoint_callback: Any) -> None:
        """Call *notify*, a logger's ``after_save_checkpoint``, when the save that was just made is durable."""
        view, attributes = self._snapshot_of(trainer, checkpoint_callback)
        saves = self._just_saved(checkpoint_callback)
        call = _Call(
            saves=saves,
            notify=notify,
            view=view,
            attributes=attributes,
            step=getattr(trainer, "global_step", 0),
        )
        self._held.append(call)
        if not _pending(call):  # it was waited for, or the plugin has not made it
            self._notify_loggers()

    def is_awaited(self, path: str) -> bool:
        """Return whether a logger or a hook has yet to be notified of *path*."""
        shown = redacted_url(path)
        if any(save.url == shown for call in self._held for save in call.saves):
            return True
        return self._has_hooks and any(save.url == shown for each in self._unnotified() for save in each)

    def unnotified_of(self, path: str, step: int) -> set[str]:
        """Return the saves that loggers are yet to be notified of and for which they will read the file at *path*.

        Args:
            path: a file that is about to be replaced.
            step: the training's step. Saves of one step belong together: a logger may see either file.
        """
        shown = redacted_url(path)
        calls = [call for call in self._held if call.step != step and shown in call.files]
        return {save.url for call in calls for save in call.saves}

    def notify_loggers(self) -> None:
        """Notify loggers, but no hooks, of all saves that have ended."""
        self._notify_loggers()

    def notify(self, trainer: Any) -> None:
        """Notify of all saves that have become durable since the last call."""
        self._ended.extend(self._meter.take_ended())
        while self._ended:
            save = self._ended.popleft()
            if save.end is Durable:
                if self._log_metrics:
                    log_figures(trainer, figures(save, len(self._meter.pending)))
                self._notify_loggers()
                path = self._address_of(save.url)
                for hook in hooks_of(trainer):
                    hook(trainer, path)
        if self._held:
            self._notify_loggers()

    def report_or_log(self, trainer: Any) -> None:
        """Like ``notify``, for callers that are already handling an error, which must not be replaced (E2)."""
        while True:
            try:
                return self.notify(trainer)
            except Exception:
                logger.exception("a logger or a hook failed when it was notified of a durable checkpoint")

    def leave_loggers(self) -> None:
        """Notify only hooks from now on: the loggers have been finalized."""
        self._log_metrics = False
        self._held.clear()

    def _notify_loggers(self) -> None:
        for call in tuple(self._held):
            if _pending(call) or call not in self._held:  # a signal handler may have made the call
                continue
            self._held.remove(call)
            if all(save.end is Durable for save in call.saves):
                if call.attributes is not None:
                    vars(call.view).clear()
                    vars(call.view).update(call.attributes)
                call.notify(call.view)

    def _just_saved(self, checkpoint_callback: Any) -> list[SaveProgress]:
        """Return the save that a callback has just made, or all candidates."""
        path = redacted_url(os.fspath(getattr(checkpoint_callback, "_last_checkpoint_saved", "")))
        ended, pending = self._unnotified()
        for save in reversed([*ended, *pending]):
            if path and save.url == path:
                return [save]
        return pending

    def _unnotified(self) -> tuple[list[SaveProgress], list[SaveProgress]]:
        """Return the saves that are yet to be notified, ended and pending ones."""
        # First, so that a save that ends meanwhile is in both lists rather than in neither.
        pending = self._meter.pending
        self._ended.extend(self._meter.take_ended())
        return [*self._ended], pending

    def _snapshot_of(self, trainer: Any, checkpoint_callback: Any) -> tuple[Any, dict[str, Any] | None]:
        """Return a stand-in for a ``ModelCheckpoint``, which loggers are given, and its attributes at this moment."""
        for callback in trainer.callbacks:
            # A logger may hold a weak reference, which equals its referent.
            if callback == checkpoint_callback and hasattr(callback, "best_k_models"):
                if (
                    id(callback) not in self._views
                ):  # the same one for all saves, because loggers compare identities
                    self._views[id(callback)] = callback, object.__new__(type(callback))
                attributes = {
                    name: dict(value) if isinstance(value, dict) else value
                    for name, value in vars(callback).items()
                }
                return self._views[id(callback)][1], attributes
        return checkpoint_callback, None


def hooks_of(trainer: Any) -> list[Callable[[Any, str], object]]:
    """Return the ``on_checkpoint_write_end`` hooks of *trainer*."""
    listeners = (*trainer.callbacks, trainer.lightning_module)
    return [hook for each in listeners if callable(hook := getattr(each, HOOK, None))]


def _pending(call: _Call) -> bool:
    return any(save.end is None for save in call.saves)
