"""A mount for the time of a block, in a process of its own; and why there is none, where there is none."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.fuse.places import PLAIN, Rules

__all__ = ["Mount", "mounted", "why_not"]

_ROOT = Path(__file__).parents[2]
_DETACH = 2


@dataclass(frozen=True)
class Mount:
    """A mounted file system.

    Attributes:
        path: where.
        log: what was asked for, a line each.
    """

    path: Path
    log: Path

    def asked(self, word: str) -> list[str]:
        """Return what was asked for that begins with *word*, in order."""
        return [line for line in self.log.read_text().splitlines() if line.split()[0] == word]


@functools.cache
def why_not() -> str:
    """Return why nothing can be mounted here; empty where it can."""
    try:
        with mounted(PLAIN):
            return ""
    except OSError as error:
        return f"no FUSE mount here: {error}"


@contextmanager
def mounted(rules: Rules) -> Iterator[Mount]:
    """Mount a file system with these rules.

    Raises:
        OSError: that cannot be done here.
    """
    with tempfile.TemporaryDirectory(prefix="async_ckpt_fuse_") as folder:
        path, log = Path(folder, "mount"), Path(folder, "log")
        path.mkdir()
        command = [sys.executable, "-m", "tests.fuse.wire", str(path), json.dumps(rules.as_dict()), str(log)]
        environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
        with subprocess.Popen(
            command, cwd=_ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as server:
            assert server.stdout is not None
            assert server.stderr is not None
            if server.stdout.readline() != "mounted\n":
                raise OSError(server.stderr.read().strip().splitlines()[-1])
            try:
                yield Mount(path, log)
            finally:
                ctypes.CDLL(None).umount2(os.fsencode(path), _DETACH)
                try:
                    server.wait(timeout=10)
                except subprocess.TimeoutExpired:  # somebody has a file open there still
                    server.kill()
            assert server.returncode in (0, -9), server.stderr.read()
