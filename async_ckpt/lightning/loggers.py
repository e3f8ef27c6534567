"""Finds out which loggers may read the checkpoints that they are notified of.

Guarantees: in doubt, a logger counts as one that may, so none is notified too early.

What does not belong here: notifying them (notifications).
"""

from __future__ import annotations

import dis
import inspect
from types import FunctionType
from typing import Any

__all__ = ["uses_checkpoints"]

# The byte code of an empty function, in all supported versions of Python.
_OF_NOTHING = frozenset({"LOAD_CONST", "NOP", "RESUME", "RETURN_CONST", "RETURN_VALUE"})


def uses_checkpoints(logger: Any) -> bool:
    """Return whether ``logger.after_save_checkpoint`` may read a file, now or later.

    The method of most loggers does nothing, such as TensorBoard's and the CSV logger's. Lightning's loggers that upload
    files do nothing with ``log_model=False``, their default.
    """
    method = logger.after_save_checkpoint
    function = inspect.unwrap(getattr(method, "__func__", method))
    if not isinstance(function, FunctionType):
        return True
    if all(each.opname in _OF_NOTHING for each in dis.get_instructions(function)):
        return False
    is_lightnings = function.__module__.startswith(("lightning.", "pytorch_lightning."))
    return not (is_lightnings and getattr(logger, "_log_model", None) is False)
