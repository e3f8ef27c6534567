"""Ctrl-C at every line of a first save, the standard library's included: the program ends, and can save before it does.

Each line needs a process of its own, for the first save of a process begins what later ones find: so one process is
forked per line, from one that has imported everything and started no thread of ours. What Ctrl-C does to an import is
left out: Python itself may then keep the lock of a module for ever.
"""

from __future__ import annotations

import json
import os

import pytest

from tests.support import PATIENCE_SECONDS, python

#: Interrupts one line in so many; each one at night.
STRIDE = 1 if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else 307

WALK = """
import faulthandler, os, signal, sys, threading, time, warnings
import anyio._backends._asyncio, fsspec, fsspec.utils, torch
from async_ckpt import CheckpointService
from tests.support import MemoryStore, number_of, state

warnings.simplefilter("ignore")
torch.set_num_threads(4)
stride, copies, patience = int(sys.argv[1]), sys.argv[2] == "True", float(sys.argv[3])
PARTS = ("async_ckpt", "threading.py", "queue.py", "weakref.py", "contextlib.py")

def at_line(number):
    lines = 0
    def trace(frame, event, argument):
        nonlocal lines
        if not any(part in frame.f_code.co_filename for part in PARTS) or frame.f_code.co_name == "__del__":
            return None
        if event == "line":
            lines += 1
            if lines == number:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace
    sys.settrace(trace)

def child(number):
    store = MemoryStore()
    service = CheckpointService(store_factory=lambda *_: store)
    at_line(number)
    interrupted = False
    try:
        service.save(state(1, nbytes=64 << 20 if copies else 4096), "memory://a")
    except KeyboardInterrupt:
        interrupted = True
    sys.settrace(None)
    service.save(state(2), "memory://b").wait(patience)
    assert number_of(service.load("memory://b")) == 2
    return interrupted  # and the exit closes the service

outcomes = []
number = 1
while True:
    pid = os.fork()
    if pid == 0:
        faulthandler.dump_traceback_later(patience, exit=True)
        sys.exit(0 if child(number) else 3)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code == 3:
        break
    outcomes.append(code)
    if code:
        print("line", number, "ended with", code, file=sys.stderr)
    number += stride
print(number, sorted(set(outcomes)))
"""


@pytest.mark.integration
@pytest.mark.parametrize("copies", [False, True], ids=["alone", "with threads that copy"])
def test_ctrl_c_at_any_line_of_a_first_save_lets_the_program_end(copies: bool) -> None:
    """After Ctrl-C at any line of its first save a program saves, loads, and ends with the exit code 0 (D4, B2)."""
    done = python(WALK, STRIDE, copies, PATIENCE_SECONDS, timeout=3600 if STRIDE == 1 else 110)
    count, outcomes = done.stdout.split(" ", 1)
    assert int(count) > 500
    assert json.loads(outcomes) == [0], done.stderr
