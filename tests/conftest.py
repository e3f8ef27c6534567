"""What every test gets: Hypothesis profiles and a guard that nothing is left behind.

The guard is promise B2 made into a test of every test: when a test and its fixtures have ended, no thread,
no asyncio task, no temporary file of ours and no file descriptor is left.
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

#: Real object stores as fixtures.
pytest_plugins = ["tests.servers"]

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell ignores Ctrl-C for what it runs in the background; here, tests send it, to their own children too.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# dev: quick and new examples each time. ci: the same examples each time, so a red run is red again.
# nightly: many. Timing is no property of ours to check, so no profile has a deadline.
settings.register_profile("dev", max_examples=50, deadline=None)
settings.register_profile(
    "ci", max_examples=100, deadline=None, derandomize=True, print_blob=True, database=None
)
settings.register_profile("nightly", max_examples=5000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))

#: Threads that may outlive the test which started them, by the beginning of their name, and why.
ALLOWED_THREADS = (
    "MainThread",
    "fsspecIO",  # fsspec's own loop: one a process, started by its first synchronous call, never ended
    "gcsfs-deferred-close",  # gcsfs' own: one a process, started by the first file that is opened with it, never ended
    "tqdm_monitor",  # tqdm's, behind Lightning's progress bar: one a process
    "Trio thread",  # trio keeps its idle worker threads for ten seconds
    "pytest_timeout",  # guards the test itself
)
#: How long a thread that is ending may take for it.
THREAD_END_SECONDS = 10.0
#: Descriptors that libraries open once a process at their first use (an event loop's, fsspec's, /dev/urandom).
DESCRIPTOR_TOLERANCE = 8
#: After a failed test a service may still have saves under way, and the interpreter's exit waits for those (D4).
EXIT_SECONDS = 60.0


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    """End the process, with every thread's stack, if the interpreter's exit takes too long."""
    faulthandler.dump_traceback_later(EXIT_SECONDS, exit=True, file=sys.__stderr__)


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Both event loops that our awaitables work on; used by tests marked ``anyio``."""
    return str(request.param)


@pytest.fixture(autouse=True)
def _nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves threads, tasks, temporary files or descriptors behind.

    First to be set up, so last to be torn down: the test's own fixtures have cleaned up before it looks.
    """
    folder: Path | None = request.getfixturevalue("tmp_path") if "tmp_path" in request.fixturenames else None
    threads = set(threading.enumerate())
    tasks = _running_tasks()
    descriptors = _descriptors()
    yield
    left = [f"thread {thread.name!r}" for thread in _new_threads(threads)]
    # Abandoned loops and files close when they are collected; what is held on purpose stays. A collection takes
    # tens of milliseconds, so only where there is something to find.
    if _running_tasks() - tasks or len(_descriptors()) > len(descriptors):
        gc.collect()
    left += [f"task {task!r}" for task in _running_tasks() - tasks]
    left += _files_left(folder)
    left += _descriptors_left(descriptors, folder)
    if left:
        pytest.fail("left behind: " + "; ".join(left), pytrace=False)


def _new_threads(before: set[threading.Thread]) -> list[threading.Thread]:
    """Return the threads started since and not allowed to stay, after waiting for those about to end."""
    new = [t for t in threading.enumerate() if t not in before and not _may_stay(t)]
    for thread in new:
        if thread is not threading.current_thread():
            thread.join(THREAD_END_SECONDS / len(new))
    return [thread for thread in new if thread.is_alive()]


def _may_stay(thread: threading.Thread) -> bool:
    return thread.name.startswith(ALLOWED_THREADS) or type(thread).__name__ == "TMonitor"


def _running_tasks() -> set[asyncio.Task[object]]:
    """Return all unfinished tasks of all loops but those of threads that may stay.

    asyncio has no public function that is not about one loop; where its private sets are absent, the guard
    sees no tasks, and threads and descriptors still tell of a forgotten loop.
    """
    registry = asyncio.tasks
    known = getattr(registry, "_scheduled_tasks", None) or getattr(registry, "_all_tasks", None) or ()
    idents = {thread.ident for thread in threading.enumerate() if _may_stay(thread)}
    return {
        t for t in list(known) if not t.done() and getattr(t.get_loop(), "_thread_id", None) not in idents
    }


def _files_left(folder: Path | None) -> list[str]:
    """Return the temporary files that a save left under the test's folder (D2)."""
    if folder is None or not folder.exists():
        return []
    return [f"temporary file {found}" for found in folder.rglob(".async_ckpt.*.tmp")]


def _descriptors() -> dict[int, str]:
    """Return the open file descriptors and what they point to; empty where the system does not tell."""
    found: dict[int, str] = {}
    for directory in ("/proc/self/fd", "/dev/fd"):
        if not os.path.isdir(directory):
            continue
        for name in os.listdir(directory):
            try:
                found[int(name)] = os.readlink(os.path.join(directory, name))
            except OSError:  # the descriptor of this very listing, or a system whose entries are no links
                continue
        break
    return found


def _descriptors_left(before: dict[int, str], folder: Path | None) -> list[str]:
    """Return what is open and was not: anything under the test's folder, and growth beyond the tolerance."""
    new = {fd: target for fd, target in _descriptors().items() if before.get(fd) != target}
    ours = [f"descriptor {fd} of {to}" for fd, to in new.items() if folder and to.startswith(str(folder))]
    if ours:
        return ours
    if len(_descriptors()) - len(before) > DESCRIPTOR_TOLERANCE:
        return [f"descriptors {sorted(new.values())}"]
    return []
