"""Which saves of a fit may end while training goes on; all others, the direct ones, return when they are durable.

Whoever calls ``trainer.save_checkpoint(path)`` may use the file in the next line: upload it, rename it, report its
folder. Lightning's ``ModelCheckpoint`` does not, nor does its ``OnExceptionCheckpoint``. So theirs are deferred.

Guarantees: a save is deferred only where nobody can go on with its file. That is known where all code between the hook
and the CheckpointIO is Lightning's own. A subclass that has more of its own than how files are named, and when, waits;
so does everybody's save in a Trainer, or with a strategy, that has a ``save_checkpoint`` of its own. A save that comes
in between, as from a signal handler, is somebody else's. See decision 0038.

What does not belong here: who waits, and how (session).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from inspect import isfunction
from typing import Any

from async_ckpt.lightning.overrides import Overrides

__all__ = ["defer", "is_direct", "replaces"]

logger = logging.getLogger(__name__)

_LIGHTNINGS = frozenset(
    {"lightning", "lightning_fabric", "lightning_habana", "lightning_utilities", "pytorch_lightning"}
)

# What a subclass may do as it likes: it is over before the file is saved, or comes when all is durable.
_HARMLESS = frozenset(
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
"""The path that Lightning's own callback is about to save to."""

_is_deferred: ContextVar[bool] = ContextVar("async_ckpt_is_deferred", default=False)


def is_direct() -> bool:
    """Return whether the save that is asked for now is one whose file may be used in the next line."""
    return not _is_deferred.get()


def defer(trainer: Any, overrides: Overrides) -> list[Any]:
    """Have the saves of Lightning's own callbacks be deferred, as far as nobody else can go on with their files.

    Returns:
        The callbacks of *trainer* whose saves are.
    """
    for owner in (trainer, trainer.strategy):
        method = getattr(type(owner), "save_checkpoint", None)
        if "save_checkpoint" in vars(owner) or not _is_lightnings(method):
            kind = type(owner).__name__
            logger.info("every save is waited for, as %s has a save_checkpoint of its own", kind)
            return []
    deferred = [callback for callback in trainer.callbacks if _is_deferrable(callback)]
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
    """Return whether *callback* has a method *name* of its own, in place of Lightning's."""
    base, _, _ = _kind_of(callback)
    return base is not None and _is_replaced(callback, base, name)


class _Deferring:
    """Takes the place of a method of Lightning's that saves; a copy of its callback has the method itself."""

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
    """Return Lightning's class that *callback* is made from, if it is one that saves, and which of its methods does."""
    for base in type(callback).__mro__:
        if base.__name__ in _OWN and _top(base.__module__) in _LIGHTNINGS:
            return base, *_OWN[base.__name__]
    return None, "", None


def _is_deferrable(callback: Any) -> bool:
    base, _, _ = _kind_of(callback)
    for name in () if base is None else dir(base):
        if name in _HARMLESS or name.startswith("__"):
            continue
        own = getattr(base, name)
        is_patched = name in vars(base) and isfunction(own) and not _is_lightnings(own)
        if is_patched or _is_replaced(callback, base, name):
            logger.info(
                "what %s saves is waited for, as its %s is not that of Lightning's %s, and may use the file",
                type(callback).__name__,
                name,
                base.__name__,
            )
            return False
    return base is not None


def _is_replaced(callback: Any, base: Any, name: str) -> bool:
    own = getattr(base, name)
    if not isfunction(own) and not isinstance(own, property):
        return False
    return getattr(type(callback), name) is not own or name in vars(callback)


def _is_lightnings(function: Any) -> bool:
    """Tell where *function* was written; a wrapper takes over names, but not its module's variables."""
    return _top(str(getattr(function, "__globals__", {}).get("__name__", ""))) in _LIGHTNINGS


def _top(module: str) -> str:
    return module.partition(".")[0]


@contextmanager
def _set(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
