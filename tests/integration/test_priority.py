"""``priority="background"``: training goes before a save, until somebody waits for it."""

from __future__ import annotations

import asyncio
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt import CheckpointService, FlushTimeoutError
from async_ckpt.engine import execution
from async_ckpt.system.priority import NICE
from tests.held_disk import USUAL, HeldDisk, may_rise, nice_of, until
from tests.support import python, start_python

pytestmark = pytest.mark.integration

needs_the_right = pytest.mark.skipif(not may_rise(), reason="this user's threads may not rise again")

STATE = {"weight": torch.ones(1 << 20)}  # 4 MiB
OTHER = {"weight": torch.zeros(1 << 20)}
STARVED_SECONDS = 60.0


@contextmanager
def held(**options: Any) -> Iterator[tuple[HeldDisk, CheckpointService]]:
    """Give a disk that holds a save up, and its service; let all writes go at the end."""
    disk = HeldDisk()
    service = disk.service(**{"priority": "background", **options})
    try:
        yield disk, service
    finally:
        disk.goes_on = lambda: True
        service.close()


@needs_the_right
def test_a_save_that_nobody_waits_for_is_in_the_background(tmp_path: Path) -> None:
    """What writes is lowered; neither the loop thread is, nor any thread of the program's."""
    with held() as (disk, service), ThreadPoolExecutor(1) as mine:
        mine.submit(threading.get_native_id).result()
        service.save(STATE, tmp_path / "a.ckpt")
        assert disk.held.wait()
        values = {thread: nice_of(int(thread)) for thread in os.listdir("/proc/self/task")}
        lowered = [int(thread) for thread, value in values.items() if value != USUAL]
        assert lowered == [disk.thread]
        assert nice_of(disk.thread) == NICE


async def await_(handle: Any) -> None:
    """Await a handle."""
    await handle


WAYS: dict[str, Callable[[CheckpointService, Any, Path], object]] = {
    "wait": lambda service, handle, path: service.wait(),
    "handle.wait": lambda service, handle, path: handle.wait(),
    "flush": lambda service, handle, path: asyncio.run(service.flush()),
    "await handle": lambda service, handle, path: asyncio.run(await_(handle)),
    "close": lambda service, handle, path: service.close(),
    "aclose": lambda service, handle, path: asyncio.run(service.aclose()),
    "back-pressure": lambda service, handle, path: service.save(OTHER, path.with_name("b.ckpt")),
    "memory": lambda service, handle, path: service.save(OTHER, path.with_name("c.ckpt")),
    "load": lambda service, handle, path: service.load(path),
}


@needs_the_right
@pytest.mark.parametrize("way", WAYS)
def test_whoever_waits_has_it_rise(tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that is held up until it is at normal priority ends as soon as somebody waits for it."""
    room = {"back-pressure": {"queue_depth": 1}, "memory": {"memory_limit": "5MiB"}}.get(way, {})
    monkeypatch.setattr(execution, "LATE_SECONDS", math.inf)
    with held(**room) as (disk, service):
        handle = service.save(STATE, tmp_path / "a.ckpt")
        assert disk.held.wait()
        assert nice_of(disk.thread) == NICE
        disk.goes_on = disk.is_normal
        WAYS[way](service, handle, tmp_path / "a.ckpt")
        assert handle.done()
        assert not disk.gave_up
    assert disk.values[0] == NICE


@needs_the_right
def test_the_exit_has_it_rise(tmp_path: Path) -> None:
    """The end of the interpreter waits at normal priority as well."""
    done = python(
        """
import atexit, math, sys, torch
from async_ckpt.engine import execution
from async_ckpt.system.priority import NICE
from tests.held_disk import USUAL, HeldDisk

execution.LATE_SECONDS = math.inf
disk = HeldDisk()
service = disk.service(priority="background")
service.save({"weight": torch.ones(1 << 20)}, sys.argv[1] + "/a.ckpt")
disk.held.wait()
print(disk.is_normal())
disk.goes_on = disk.is_normal
atexit.register(lambda: print(disk.gave_up))
""",
        tmp_path,
    )
    assert (done.returncode, done.stdout) == (0, "False\nFalse\n"), done.stderr
    assert (tmp_path / "a.ckpt").exists()


@needs_the_right
def test_it_sinks_again_when_nobody_waits_any_more(tmp_path: Path) -> None:
    """After a wait that was given up, what comes next of the save is in the background again."""
    with held(part_size="1MiB") as (disk, service):
        handle = service.save(STATE, tmp_path / "a.ckpt")
        assert disk.held.wait()
        with pytest.raises(FlushTimeoutError):
            handle.wait(0.01)
        assert disk.is_normal()
        disk.goes_on = lambda: True
        assert until(handle.done)
    assert len(disk.values) >= 4
    assert set(disk.values[:4]) == {NICE}


@needs_the_right
def test_a_save_that_is_late_rises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After some seconds, a save is at normal priority though nobody waits for it."""
    monkeypatch.setattr(execution, "LATE_SECONDS", 0.2)
    with held() as (disk, service):
        handle = service.save(STATE, tmp_path / "a.ckpt")
        assert disk.held.wait()
        disk.goes_on = disk.is_normal
        assert until(handle.done)
        assert not disk.gave_up


@needs_the_right
def test_services_of_both_kinds_do_not_touch_each_other(tmp_path: Path) -> None:
    """Beside a service in the background, one that is not is at normal priority."""
    with held() as (behind, background), held(priority="normal") as (ahead, normal):
        background.save(STATE, tmp_path / "a.ckpt")
        assert behind.held.wait()
        normal.save(STATE, tmp_path / "b.ckpt")
        assert ahead.held.wait()
        assert ahead.values == [USUAL]


def test_by_default_no_priority_is_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the option, the system is not even asked."""
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(os, "setpriority", lambda *what: asked.append(what))
    with CheckpointService() as service:
        service.save(STATE, tmp_path / "a.ckpt").wait()
    assert asked == []


REFUSED = """
import ctypes, logging, os, resource, sys, torch
from async_ckpt import CheckpointService
from async_ckpt.system.priority import NICE
from tests.held_disk import USUAL, HeldDisk, may_rise

libc = ctypes.CDLL(None)
head, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
libc.capget(head, sets)
sets[0] &= ~(1 << 23)  # CAP_SYS_NICE, of those that count
libc.capset(head, sets)
resource.setrlimit(resource.RLIMIT_NICE, (0, 0))
assert not may_rise()

logging.basicConfig(level=logging.DEBUG, stream=sys.stdout, format="%(message)s")
disk = HeldDisk()
disk.goes_on = lambda: True
with disk.service(priority="background", part_size="1MiB") as service:
    handle = service.save({"weight": torch.ones(1 << 20)}, sys.argv[1] + "/a.ckpt")
    while not handle.done():
        os.sched_yield()
print(set(disk.values) == {USUAL})
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a right of Linux")
def test_without_the_right_nothing_changes(tmp_path: Path) -> None:
    """Where a thread could not restore its priority, none lowers it; that is logged once, and nothing fails."""
    done = python(REFUSED, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "True"
    assert done.stdout.count("could not restore its own") == 1
    assert (tmp_path / "a.ckpt").exists()


@contextmanager
def every_cpu_busy() -> Iterator[None]:
    """Have a process for each CPU, and one more, compute all the time."""
    busy = [start_python("while True: pass") for _ in range(len(os.sched_getaffinity(0)) + 1)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
        for process in busy:
            process.communicate()


@needs_the_right
@pytest.mark.timeout(180)
def test_on_busy_cpus_no_save_starves(tmp_path: Path) -> None:
    """On CPUs that are always busy, a save that is waited for ends soon, and any other one not much later."""
    state = {"weight": torch.ones(16 << 20)}
    with CheckpointService(priority="background") as service, every_cpu_busy():
        service.save(state, tmp_path / "first.ckpt").wait(STARVED_SECONDS)
        service.save(state, tmp_path / "waited.ckpt").wait(STARVED_SECONDS)
        handle = service.save(state, tmp_path / "not-waited.ckpt")
        end = time.monotonic() + STARVED_SECONDS
        assert until_or(handle.done, end)


def until_or(is_so: Callable[[], bool], end: float) -> bool:
    """Look again and again, leaving the CPU to others, until it is so, or a time; return whether it is so."""
    pause = threading.Event()
    while not is_so() and time.monotonic() < end:
        pause.wait(0.05)
    return is_so()
