"""Decides which saves of a fit are deferred, so that training goes on; all others, direct saves, return when durable.

Code that calls ``trainer.save_checkpoint(path)`` may use the file in its next line: upload it, rename it, report its
folder. Lightning's ``ModelCheckpoint`` and ``OnExceptionCheckpoint`` do not, so their saves are deferred.

Guarantees: a save is deferred only if no code can use its file right afterwards: all code between the hook and the
CheckpointIO is Lightning's own. The saves of a subclass that overrides more than the names and the schedule of its
files are direct, and so are all saves if the Trainer or its strategy overrides ``save_checkpoint``. A save that comes
in between, as from a signal handler, is direct as well. See decision 0038.

What does not belong here: waiting (session).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from inspect import isfunction
from typing import Any

from async_ckpt.lightning.overrides import Overrides, Replacement

__all__ = ["defer", "is_direct", "is_from_lightning", "replaces"]

logger = logging.getLogger(__name__)

_LIGHTNING_PACKAGES = frozenset(
    {"lightning", "lightning_fabric", "lightning_habana", "lightning_utilities", "pytorch_lightning"}
)

# What a subclass may override freely: it runs before the file is saved, or when everything is durable.
_OVERRIDABLE = frozenset(
    {
        "_find_last_checkpoints", "_format_checkpoint_name", "_get_metric_interpolated_filepath_name",
        "_monitor_candidates", "_should_save_on_exception", "_should_save_on_train_epoch_end",
        "_should_skip_saving_checkpoint", "check_monitor_top_k", "every_n_epochs", "format_checkpoint_name",
        "load_state_dict", "on_fit_end", "on_fit_start", "on_load_checkpoint", "on_sanity_check_end",
        "on_sanity_check_start", "on_train_end", "on_train_start", "setup", "state_dict", "state_key", "teardown",
        "to_yaml",
    }
)  # fmt: skip

_expected: ContextVar[Any] = ContextVar("async_ckpt_expected", default=None)
"""The path that a callback of Lightning's is about to save to."""

_is_deferred: ContextVar[bool] = ContextVar("async_ckpt_is_deferred", default=False)


def is_direct() -> bool:
    """Return whether the current save is direct: its caller may use the file in the next line."""
    return not _is_deferred.get()


def defer(trainer: Any, overrides: Overrides) -> list[Any]:
    """Defer the saves of Lightning's own callbacks, as far as no other code can use their files.

    Returns:
        The callbacks of *trainer* whose saves are deferred.
    """
    for owner in (trainer, trainer.strategy):
        method = getattr(type(owner), "save_checkpoint", None)
        own = vars(owner).get("save_checkpoint")
        if not (own is None or isinstance(own, Replacement)) or not is_from_lightning(method):
            _warn_once(trainer, type(owner), "save_checkpoint", "every save of this fit")
            return []
    deferred = [callback for callback in trainer.callbacks if _is_deferrable(trainer, callback)]
    for callback in deferred:
        _, method, path_of = _kind_of(callback)
        overrides.replace(callback, method, _Deferring(callback, method, path_of))
    save = trainer.save_checkpoint

    def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
        expected = _expected.get()
        path = args[0] if args else kwargs.get("filepath")
        with _set(_expected, None), _set(_is_deferred, expected is not None and path == expected):
            return save(*args, **kwargs)

    overrides.replace(trainer, "save_checkpoint", save_checkpoint)
    return deferred


def replaces(callback: Any, name: str) -> bool:
    """Return whether *callback* overrides Lightning's method *name*."""
    base, _, _ = _kind_of(callback)
    return base is not None and _is_replaced(callback, base, name)


class _Deferring:
    """Replaces a saving method of a callback; a copy of the callback has the original method."""

    def __init__(self, callback: Any, method: str, path_of: Callable[..., Any]) -> None:
        self._callback = callback
        self._name = method
        self._method = getattr(callback, method)
        self._path_of = path_of

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _set(_expected, self._path_of(self._callback, *args, **kwargs)):
            return self._method(*args, **kwargs)

    def __reduce__(self) -> Any:
        return getattr, (self._callback, self._name)


def _path_given(callback: Any, trainer: Any, filepath: Any) -> Any:
    return filepath


def _path_of_its_own(callback: Any, *args: Any, **kwargs: Any) -> Any:
    return callback.ckpt_path


_OWN = {
    "ModelCheckpoint": ("_save_checkpoint", _path_given),
    "OnExceptionCheckpoint": ("on_exception", _path_of_its_own),
}


def _kind_of(callback: Any) -> tuple[Any, str, Any]:
    """Return the saving class of Lightning's that *callback* derives from, if any, and its saving method."""
    for base in type(callback).__mro__:
        if base.__name__ in _OWN and _top(base.__module__) in _LIGHTNING_PACKAGES:
            return base, *_OWN[base.__name__]
    return None, "", None


def _is_deferrable(trainer: Any, callback: Any) -> bool:
    base, _, _ = _kind_of(callback)
    for name in () if base is None else dir(base):
        if name in _OVERRIDABLE or name.startswith("__"):
            continue
        own = getattr(base, name)
        is_patched = name in vars(base) and isfunction(own) and not is_from_lightning(own)
        if is_patched or _is_replaced(callback, base, name):
            _warn_once(trainer, type(callback), name, f"every save of {type(callback).__name__}")
            return False
    return base is not None


_warned: set[tuple[type, str]] = set()


def _warn_once(trainer: Any, kind: type, method: str, what: str) -> None:
    """Warn that saves are synchronous because *kind* overrides *method*; once in a process, on the first rank."""
    if (kind, method) in _warned or not trainer.is_global_zero:
        return
    _warned.add((kind, method))
    logger.warning(
        "training waits for %s until it is durable, because %s overrides %s and may use the file right away. If it "
        'does not, pass AsyncCheckpointIO(direct_saves="async").',
        what,
        kind.__name__,
        method,
    )


def _is_replaced(callback: Any, base: Any, name: str) -> bool:
    own = getattr(base, name)
    if not isfunction(own) and not isinstance(own, property):
        return False
    return getattr(type(callback), name) is not own or name in vars(callback)


def is_from_lightning(function: Any) -> bool:
    """Return whether Lightning's code defines *function*; a wrapper copies the name, but not the globals."""
    return _top(str(getattr(function, "__globals__", {}).get("__name__", ""))) in _LIGHTNING_PACKAGES


def _top(module: str) -> str:
    return module.partition(".")[0]


@contextmanager
def _set(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
