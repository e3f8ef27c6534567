"""Tells of saves when they are durable, not before: loggers, and who has ``on_checkpoint_write_end``.

Guarantees: all on the training thread, each once; hooks in the order in which the saves became durable, a logger in
the order in which they were made; nobody is told of a save that failed. A logger sees the checkpoint callback as it
was when that was saved, as after a synchronous save, and is told at once where that has ended.

What does not belong here: when it is time to tell (companion), and that files are there until then (removals).
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
    """A call of a logger's, held back until the saves that it is about have ended."""

    saves: list[SaveProgress]
    tell: Callable[[Any], Any]
    view: Any
    attributes: dict[str, Any] | None
    step: int

    @property
    def files(self) -> set[str]:
        """What a logger may look at when it is told: loggers look at all the files that a callback names."""
        known = self.attributes or {}
        named = (known.get("best_model_path"), known.get("last_model_path"), *known.get("best_k_models", ()))
        return {save.url for save in self.saves} | {redacted_url(os.fspath(path)) for path in named if path}


class Notifications:
    """The saves of one fit, to be told of.

    Args:
        meter: knows of them; nobody else may take those that have ended.
        log_metrics: whether loggers get figures.
        has_hooks: whether there is anybody with ``on_checkpoint_write_end``.
        address_of: tells what was written for a location as events name it.
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

    def hold_back(self, trainer: Any, tell: Callable[[Any], Any], checkpoint_callback: Any) -> None:
        """Have *tell*, a logger's ``after_save_checkpoint``, called when what was just saved is durable."""
        view, attributes = self._as_it_is(trainer, checkpoint_callback)
        saves = self._just_saved(checkpoint_callback)
        call = _Call(
            saves=saves, tell=tell, view=view, attributes=attributes, step=getattr(trainer, "global_step", 0)
        )
        self._held.append(call)
        if not _pending(call):  # as of a save that was waited for, or that it was not the plugin that made
            self._tell_loggers()

    def awaits(self, path: str) -> bool:
        """Return whether a logger, or a hook, has yet to be told of *path*."""
        shown = redacted_url(path)
        if any(save.url == shown for call in self._held for save in call.saves):
            return True
        return self._has_hooks and any(save.url == shown for each in self._untold() for save in each)

    def untold_of(self, path: str, step: int) -> set[str]:
        """Return the saves of which loggers have yet to be told, which makes them look at *path* as it is now.

        Args:
            path: about to be replaced.
            step: of the training. What is saved at one step belongs together: a logger may see either file of it.
        """
        shown = redacted_url(path)
        calls = [call for call in self._held if call.step != step and shown in call.files]
        return {save.url for call in calls for save in call.saves}

    def tell_loggers(self) -> None:
        """Tell loggers, of all that has ended; nobody else."""
        self._tell_loggers()

    def tell(self, trainer: Any) -> None:
        """Tell of all that has become durable since the last time."""
        self._ended.extend(self._meter.take_ended())
        while self._ended:
            save = self._ended.popleft()
            if save.end is Durable:
                if self._log_metrics:
                    log_figures(trainer, figures(save, len(self._meter.pending)))
                self._tell_loggers()
                path = self._address_of(save.url)
                for hook in hooks_of(trainer):
                    hook(trainer, path)
        if self._held:
            self._tell_loggers()

    def tell_or_log(self, trainer: Any) -> None:
        """The same, for callers that are already handling an error, which must not be replaced (E2)."""
        while True:
            try:
                return self.tell(trainer)
            except Exception:
                logger.exception("told of a durable checkpoint, somebody failed")

    def leave_loggers(self) -> None:
        """Tell them no more, but hooks: they have been finalized."""
        self._log_metrics = False
        self._held.clear()

    def _tell_loggers(self) -> None:
        for call in tuple(self._held):
            if _pending(call) or call not in self._held:  # a signal handler may have told it
                continue
            self._held.remove(call)
            if all(save.end is Durable for save in call.saves):
                if call.attributes is not None:
                    vars(call.view).clear()
                    vars(call.view).update(call.attributes)
                call.tell(call.view)

    def _just_saved(self, checkpoint_callback: Any) -> list[SaveProgress]:
        """Return the save that a callback has just made, or all that may be it."""
        path = redacted_url(os.fspath(getattr(checkpoint_callback, "_last_checkpoint_saved", "")))
        ended, pending = self._untold()
        for save in reversed([*ended, *pending]):
            if path and save.url == path:
                return [save]
        return pending

    def _untold(self) -> tuple[list[SaveProgress], list[SaveProgress]]:
        """Return the saves that nobody has been told of, those that have ended and those that are pending."""
        # First: what ends meanwhile is in both then, else it would be in neither.
        pending = self._meter.pending
        self._ended.extend(self._meter.take_ended())
        return [*self._ended], pending

    def _as_it_is(self, trainer: Any, checkpoint_callback: Any) -> tuple[Any, dict[str, Any] | None]:
        """Return what stands for a ``ModelCheckpoint`` before loggers, and its attributes at this moment."""
        for callback in trainer.callbacks:
            # A logger may have been given a weak reference, which equals what it refers to.
            if callback == checkpoint_callback and hasattr(callback, "best_k_models"):
                if id(callback) not in self._views:  # one for all saves: loggers know them by identity
                    self._views[id(callback)] = callback, object.__new__(type(callback))
                attributes = {
                    name: dict(value) if isinstance(value, dict) else value
                    for name, value in vars(callback).items()
                }
                return self._views[id(callback)][1], attributes
        return checkpoint_callback, None


def hooks_of(trainer: Any) -> list[Callable[[Any, str], object]]:
    """Return the hooks that are called when a save is durable."""
    listeners = (*trainer.callbacks, trainer.lightning_module)
    return [hook for each in listeners if callable(hook := getattr(each, HOOK, None))]


def _pending(call: _Call) -> bool:
    return any(save.end is None for save in call.saves)
