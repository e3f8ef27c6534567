"""Which loggers do anything with a checkpoint that they are told of.

Guarantees: a logger counts as one that does unless it surely does not: nobody is told too early. What does not belong
here: telling them (notifications).
"""

from __future__ import annotations

import dis
import inspect
from types import FunctionType
from typing import Any

__all__ = ["uses_checkpoints"]

# What a function with nothing in it is compiled to, by the Pythons there are.
_OF_NOTHING = frozenset({"LOAD_CONST", "NOP", "RESUME", "RETURN_CONST", "RETURN_VALUE"})


def uses_checkpoints(logger: Any) -> bool:
    """Return whether ``logger.after_save_checkpoint`` may look at a file, now or later.

    Most loggers, TensorBoard's and the CSV one among them, have a method that does nothing; Lightning's that upload do
    nothing with ``log_model=False``, their default.
    """
    method = logger.after_save_checkpoint
    function = inspect.unwrap(getattr(method, "__func__", method))
    if not isinstance(function, FunctionType):
        return True
    if all(each.opname in _OF_NOTHING for each in dis.get_instructions(function)):
        return False
    is_lightnings = function.__module__.startswith(("lightning.", "pytorch_lightning."))
    return not (is_lightnings and getattr(logger, "_log_model", None) is False)
