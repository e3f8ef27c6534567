"""Becomes another program that ends when its parent does: ``python -I -S watchdog.py PARENT PROGRAM ARGUMENT...``.

Linux sends the signal when the *thread* that started us ends. Elsewhere the program runs without a watchdog.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Ask the kernel for the signal, and become the program."""
    parent, *command = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(parent):  # it ended before we asked
            sys.exit(1)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
