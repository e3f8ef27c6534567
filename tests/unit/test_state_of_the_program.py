"""What belongs to the program, and stays as it was whatever is saved and loaded: training draws its own numbers."""

from __future__ import annotations

import locale
import os
import random
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from async_ckpt import RetryPolicy, StoreError, load
from async_ckpt.errors import TransientStoreError
from async_ckpt.testing import Fault
from tests.support import PATIENCE_SECONDS, Harness, number_of, state


def state_of_the_program() -> dict[str, Any]:
    """Return what other code of the process can see of what a library may change by the way."""
    mask = os.umask(0o022)
    os.umask(mask)
    return {
        "random": random.getstate(),
        "numpy": [np.asarray(part).tolist() for part in np.random.get_state()],
        "torch": torch.get_rng_state().tolist(),
        "seed": torch.initial_seed(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "locale": locale.setlocale(locale.LC_ALL),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "directory": os.getcwd(),
        "filters": list(warnings.filters),
        "umask": mask,
        "recursion": sys.getrecursionlimit(),
        "hook": sys.excepthook,
    }


@pytest.mark.parametrize("memory", [True, False], ids=["memory", "disk"])
def test_nothing_of_the_programs_is_changed(tmp_path: Path, memory: bool) -> None:
    """Saves that are tried again, saves that fail, removals and loads change neither generator nor setting."""
    retry = RetryPolicy(attempts=3, initial_seconds=1e-6)
    broken = Fault(operation="put", calls=(1, 2), error=lambda: TransientStoreError("the line is broken"))
    full = Fault(operation="commit", calls=(2,), error=lambda: StoreError("no more room"))
    place = "memory://" if memory else f"{tmp_path}/"
    before = state_of_the_program()
    with Harness(broken, full, memory=memory, retry=retry) as harness:
        harness.service.save(state(1), f"{place}a").wait(PATIENCE_SECONDS)
        with pytest.raises(StoreError):
            harness.service.save(state(2), f"{place}b").wait(PATIENCE_SECONDS)
        assert number_of(harness.service.load(f"{place}a")) == 1
        if not memory:
            assert number_of(load(f"{place}a")) == 1
        harness.service.save(state(3), f"{place}b").wait(PATIENCE_SECONDS)
        harness.service.remove(f"{place}a").wait(PATIENCE_SECONDS)
        harness.service.wait(PATIENCE_SECONDS)
    assert state_of_the_program() == before


def test_a_seed_of_the_programs_does_not_time_the_retries() -> None:
    """Two jobs that were given one seed, and failed together, do not come back together (E3)."""
    from async_ckpt.retry import Retrying

    waits = []
    for _ in range(2):
        random.seed(0)
        waits.append([Retrying(RetryPolicy())._random() for _ in range(4)])
    assert waits[0] != waits[1]
