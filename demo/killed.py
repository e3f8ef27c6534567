"""A run in a process of its own that is killed in the middle of a save: ``python -m demo.killed FOLDER EPOCHS``.

It waits there to be killed.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

from async_ckpt import AsyncCheckpointIO
from async_ckpt.events import Event, PartWritten
from demo.digits import ProgressLine, prepare_process, train
from demo.printing import say

__all__ = ["kill_in_mid_save"]

#: Each epoch saves twice, so the third epoch's ``last.ckpt`` is never finished.
NTH_SAVE = 6
MARK = "killed here:"


def kill_in_mid_save(folder: str, epochs: int) -> int:
    """Start the run, print its output, kill it when it waits; return its exit code."""
    command = [sys.executable, "-m", "demo.killed", folder, str(epochs)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                if MARK in line:
                    break
        finally:
            process.kill()
    return process.returncode


class StopsInMidSave:
    """An observer that prints a line at the first part of the n-th save, and waits there to be killed."""

    def __init__(self, nth_save: int) -> None:
        self.nth_save = nth_save
        self.seen: set[int] = set()

    def __call__(self, event: Event) -> None:
        """Look at one event, on the thread that writes."""
        if not isinstance(event, PartWritten):
            return
        self.seen.add(event.request_id)
        if len(self.seen) == self.nth_save:
            say(f"{MARK} part {event.index} of {Path(event.url).name} is written, most others are not")
            threading.Event().wait()


if __name__ == "__main__":
    prepare_process()
    plugin = AsyncCheckpointIO(queue_depth=2, part_size="4MiB", observer=StopsInMidSave(NTH_SAVE))
    train(sys.argv[1], int(sys.argv[2]), plugins=[plugin], callbacks=[ProgressLine(plugin)])
