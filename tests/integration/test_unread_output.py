"""Nobody need read what the program writes: a terminal that is gone, or none, costs no checkpoint (D4, E1)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.test_exit import script
from tests.support import number_at, python

pytestmark = pytest.mark.integration

UNREAD = {
    "none, as in a daemon": "sys.stderr = sys.stdout = None",
    "closed": "sys.stderr.close(), sys.stdout.close()",
    "its reader has gone": """
import os
ours, theirs = os.pipe()
os.dup2(theirs, 1), os.dup2(theirs, 2), os.close(ours), os.close(theirs)
""",
    "one of the program's own, that raises": """
class Raises:
    def write(self, text):
        raise RuntimeError(text)

    flush = write

sys.stderr = Raises()
""",
}


@pytest.mark.parametrize("how", UNREAD)
def test_the_exit_code_tells_all_the_same(tmp_path: Path, how: str) -> None:
    """A failure that cannot be printed at exit still makes the exit code 1 (E1)."""
    done = python(
        script(f"failing_service().save(state(1), 'memory://a')\n{UNREAD[how]}\n"),
        tmp_path,
    )
    assert done.returncode == 1


def test_a_failure_that_cannot_be_printed_is_logged(tmp_path: Path) -> None:
    """Where there is no standard error, what would have been printed at exit is in the program's log (E1)."""
    done = python(
        script("""
import logging
logging.basicConfig(filename=f"{path}/log")
failing_service().save(state(1), "memory://a")
sys.stderr = None
"""),
        tmp_path,
    )
    assert done.returncode == 1
    assert "'memory://a' failed, and the error has not been raised yet" in (tmp_path / "log").read_text()


def test_the_exit_waits_though_it_cannot_say_so(tmp_path: Path) -> None:
    """A save that takes longer than the exit keeps silent becomes durable, though the terminal is gone by then (D4)."""
    done = python(
        script("""
gate, hold = gated("commit")

class Gone:
    def write(self, text):
        gate.open()  # only now: so the save is under way when the exit says that it waits
        raise BrokenPipeError(text)

    def flush(self):
        pass

accepted(Harness(hold).service, state(1), f"{path}/a.ckpt")
sys.stderr = Gone()
"""),
        tmp_path,
    )
    assert done.returncode == 0
    assert number_at(tmp_path / "a.ckpt") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]
