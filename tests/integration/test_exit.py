"""What happens to pending saves when the interpreter ends, however it ends (D4, E1)."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from tests.support import PATIENCE_SECONDS, complaints, number_at, python, start_python

pytestmark = pytest.mark.integration

#: Every script begins with this: a service that is never closed, whose store stops or fails as told.
BEGIN = """
import signal, sys, threading
from async_ckpt import CheckpointService, StoreError
from async_ckpt.testing import Fault, Gate
from tests.support import PATIENCE_SECONDS, Harness, accepted, gated, reached, state

def failing_service(**options):
    return Harness(Fault(operation="commit", error=lambda: StoreError("no more room")), memory=True, **options).service

path = sys.argv[1]
"""

#: Has each of *ends* end a child of its own, and prints their exit codes; what follows is the child's.
IN_CHILDREN = """
import os
for end in {ends!r}:
    if (child := os.fork()) == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
"""


def script(code: str) -> str:
    """Return *code* after the beginning."""
    return BEGIN + code


def test_end_without_close(tmp_path: Path) -> None:
    """A program that ends without close leaves every accepted save durable, and ends well (D4)."""
    done = python(
        script("""
service = CheckpointService(queue_depth=5)
for number in range(5):
    service.save(state(number), f"{path}/{number}.ckpt")
service.remove(f"{path}/0.ckpt")
"""),
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert [number_at(tmp_path / f"{number}.ckpt") for number in range(1, 5)] == [1, 2, 3, 4]
    assert not (tmp_path / "0.ckpt").exists()


def test_a_failure_nobody_was_told_of(tmp_path: Path) -> None:
    """A failed save with no further call is printed at exit with its traceback, and the exit code tells (E1)."""
    ends = IN_CHILDREN.format(ends=["pass", "sys.exit(0)", "sys.exit(7)"])
    done = python(script(f"{ends}\nfailing_service().save(state(1), 'memory://a')\nexec(end)\n"), tmp_path)
    assert [code != "0" for code in done.stdout.split()] == [True] * 3
    for said in (
        "'memory://a' failed, and the error has not been raised yet",
        "StoreError: no more room",
        "in commit",
    ):
        assert done.stderr.count(said) == 3, done.stderr


def test_a_failure_that_was_told_is_not_printed(tmp_path: Path) -> None:
    """What a handle has told is told: nothing is printed, and the exit code is 0 (E1)."""
    done = python(
        script("""
handle = failing_service().save(state(1), "memory://a")
try:
    handle.wait()
except StoreError:
    pass
"""),
        tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_warn_does_not_fail_the_program(tmp_path: Path) -> None:
    """With on_error="warn" the failure is printed at exit and the exit code stays 0 (E1)."""
    done = python(script("failing_service(on_error='warn').save(state(1), 'memory://a')"), tmp_path)
    assert done.returncode == 0
    assert "no more room" in done.stderr


def test_an_exception_in_main_keeps_its_traceback(tmp_path: Path) -> None:
    """The program's own exception is printed first and whole; ours follows; pending saves become durable (E2, D4)."""
    done = python(
        script("""
CheckpointService().save(state(1), f"{path}/a.ckpt")
failing_service().save(state(1), "memory://a")
raise ZeroDivisionError("training failed")
"""),
        tmp_path,
    )
    assert done.returncode == 1
    assert done.stderr.index("ZeroDivisionError: training failed") < done.stderr.index("no more room")
    assert number_at(tmp_path / "a.ckpt") == 1


def test_exit_handlers_and_output_survive(tmp_path: Path) -> None:
    """Where the exit code has to tell of a lost checkpoint, other exit handlers run and all output is written (E1)."""
    done = python(
        script("""
import atexit
atexit.register(print, "handler before")
failing_service().save(state(1), "memory://a")
atexit.register(print, "handler after")
print("output")
"""),
        tmp_path,
    )
    assert done.returncode == 1
    assert done.stdout.split("\n")[:1] == ["output"]
    assert {"handler before", "handler after"} <= set(done.stdout.split("\n"))


def test_an_exit_handler_may_save(tmp_path: Path) -> None:
    """A save in an exit handler of the program's own is refused or becomes durable; it never hangs (D4)."""
    done = python(
        script("""
import atexit
service = CheckpointService()
def last():
    try:
        service.save(state(2), f"{path}/b.ckpt").wait(PATIENCE_SECONDS)
    except Exception as error:
        print(type(error).__name__)
atexit.register(last)
service.save(state(1), f"{path}/a.ckpt")
"""),
        tmp_path,
    )
    assert done.stdout in ("", "ServiceClosedError\n"), done.stderr
    assert number_at(tmp_path / "a.ckpt") == 1


@pytest.mark.parametrize("used_before", [True, False])
def test_an_exit_handler_may_not_begin(tmp_path: Path, used_before: bool) -> None:
    """A service that is first used in an exit handler refuses every save, as nobody would wait for it (D4)."""
    done = python(
        script(f"""
import atexit
from async_ckpt import ServiceClosedError
def last():
    for number in range(2):
        try:
            CheckpointService().save(state(number), f"{{path}}/{{number}}.ckpt")
        except ServiceClosedError as error:
            print("ending" in str(error))
atexit.register(last)
if {used_before}:
    CheckpointService().save(state(1), f"{{path}}/a.ckpt")
"""),
        tmp_path,
    )
    assert (done.stdout, complaints(done)) == ("True\nTrue\n", "")
    assert [path.name for path in tmp_path.iterdir()] == (["a.ckpt"] if used_before else [])


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_multiprocessing_child_drains(tmp_path: Path, method: str) -> None:
    """A child process that ends without close leaves its saves durable; a failure makes its exit code 1 (D4, E1)."""
    file = tmp_path / "program.py"
    file.write_text(
        script(f"""
import multiprocessing
import torch

def good(path):
    CheckpointService().save(state(1), f"{{path}}/a.ckpt")

def bad(path):
    failing_service().save(state(1), "memory://a")

if __name__ == "__main__":
    torch.set_num_threads(1)
    context = multiprocessing.get_context("{method}")
    children = [context.Process(target=target, args=(path,)) for target in (good, bad)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    print([child.exitcode for child in children])
""")
    )
    done = python(file, tmp_path)
    assert done.stdout == "[0, 1]\n", done.stderr
    assert "no more room" in done.stderr
    assert number_at(tmp_path / "a.ckpt") == 1


def test_the_deadline_bounds_the_exit(tmp_path: Path) -> None:
    """At exit, what is not done after flush_timeout is abandoned with a message, and leaves no temporary file (D4)."""
    done = python(
        script("""
gate, hold = gated("commit")
accepted(Harness(hold, flush_timeout=0.2).service, state(1), f"{path}/a.ckpt")
reached(gate)
"""),
        tmp_path,
    )
    assert done.returncode == 1
    assert "AbandonedError" in done.stderr
    assert not list(tmp_path.iterdir())


#: A store whose call never returns: a thread that cannot be stopped.
STUCK = """
from tests.support import MemoryStore

class Stuck(MemoryStore):
    def __init__(self, location, workers):
        super().__init__()
        self.workers = workers

    async def begin(self, location, nbytes):
        await self.workers.run(self.stick)

    def stick(self):
        is_stuck.set()
        threading.Event().wait()

is_stuck = threading.Event()
service = CheckpointService(store_factory=Stuck, flush_timeout=0.2, abandon_grace_seconds=0.2)
handle = accepted(service, state(1), "memory://a")
assert is_stuck.wait(PATIENCE_SECONDS)
"""


def test_stuck_storage_does_not_hold_the_exit(tmp_path: Path) -> None:
    """A storage call that never returns is left behind after the grace; the program ends, with exit code 1 (D4, B2)."""
    ends = IN_CHILDREN.format(ends=["pass", "service.close()", "sys.exit(0)"])
    done = python(script(f"{ends}{STUCK}exec(end)"), tmp_path)
    assert done.stdout.split() == ["1"] * 3, done.stderr
    assert done.stderr.count("its storage does not answer") == 3, done.stderr


def test_work_goes_on_after_stuck_storage_was_left_behind(tmp_path: Path) -> None:
    """After close has left a stuck thread behind, a new service works (B2, L1)."""
    done = python(
        script(
            STUCK
            + """
from async_ckpt import AbandonedError
try:
    service.close()
except AbandonedError:
    pass
with CheckpointService() as other:
    other.save(state(2), f"{path}/a.ckpt")
print(handle.state.value)
"""
        ),
        tmp_path,
    )
    assert done.stdout == "failed\n", done.stderr
    assert number_at(tmp_path / "a.ckpt") == 2


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_at_exit_gives_up(tmp_path: Path, times: int) -> None:
    """Ctrl-C while the exit waits abandons what is pending, with a message; once more, it ends at once (D4)."""
    code = STUCK.replace("flush_timeout=0.2, abandon_grace_seconds=0.2", "abandon_grace_seconds=GRACE")
    code = f"GRACE = {0.2 if times == 1 else 600}\n{code}"
    process = start_python(script(code), tmp_path)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert "Ctrl-C gives up" in line
        process.send_signal(signal.SIGINT)
        assert "given up" in process.stderr.readline()
        if times == 2:
            process.send_signal(signal.SIGINT)
        process.communicate(timeout=PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail("it hangs: " + "".join(process.communicate()))
    assert process.returncode == 1
