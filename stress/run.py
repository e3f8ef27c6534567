"""Runs workloads under faults and kills processes for some time, and checks what came of it.

``python -m stress.run --seconds 60 --seed 7 --store s3``. The exit code is 1 if a promise was broken; then the
operations that show it are printed. The seed repeats all choices, though not the threads' timing.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from random import Random, SystemRandom
from time import monotonic, sleep
from typing import Any

import torch

from async_ckpt import CheckpointService, RetryPolicy
from stress.checker import Violation, check
from stress.children import start_server
from stress.crashpoints import kill_once
from stress.environment import STORES, Environment, Local, Memory, environment
from stress.foreign import Neighbourhood, Places
from stress.history import ABSENT, History
from stress.hostile import besiege_once, reason_for_none
from stress.nemesis import faulty_stores
from stress.workload import Worker, digest, look, look_on, run_together

__all__ = ["main"]

_WORKERS = 3
_CALLS = 60
_SETTLE_SECONDS = 5.0
_PATIENCE_SECONDS = 60.0  # all of this is a matter of milliseconds: who waits for so long waits in a circle


def main(arguments: Sequence[str] | None = None) -> int:
    """Run rounds until the time is over; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=None, help="repeats the choices of another run")
    parser.add_argument(
        "--store", choices=STORES, default="memory", help="beside local files; starts a server"
    )
    options = parser.parse_args(arguments)
    seed = SystemRandom().getrandbits(32) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    torch.set_num_threads(1)
    logging.getLogger("async_ckpt").setLevel(logging.ERROR)  # elsewhere a dropped deletion is worth a warning
    warnings.simplefilter("ignore", RuntimeWarning)  # on_error="warn"
    tally: Counter[str] = Counter()
    with (
        environment(options.store) as remote,
        tempfile.TemporaryDirectory(prefix="async_ckpt-stress-") as state,
    ):
        os.environ["XDG_STATE_HOME"] = state  # the killed processes' journals are nobody else's affair
        start_server()
        if reason := reason_for_none():
            print(f"without a second user who is hostile: {reason}")
        deadline = monotonic() + options.seconds
        while monotonic() < deadline:
            random = Random(f"{seed} {tally['rounds']}")
            tally["rounds"] += 1
            if broken := _round(remote, random, tally):
                tally["failed"] += 1
                print(f"round {tally['rounds']} of seed {seed}:", *broken, sep="\n", flush=True)
    print(", ".join(f"{number} {what}" for what, number in tally.items() if what != "failed"))
    print(f"{tally['rounds'] - tally['failed']} passed, {tally['failed']} failed")
    return 1 if tally["failed"] else 0


def _round(remote: Environment, random: Random, tally: Counter[str]) -> list[Violation | str]:
    with tempfile.TemporaryDirectory(prefix="async_ckpt-stress-") as directory:
        crashed = Path(directory, "crashed")
        crashed.mkdir()
        tally["processes killed"] += 1
        return [
            *_history_round(Path(directory), remote, random, tally),
            *kill_once(
                Local(crashed) if random.random() < 0.5 or isinstance(remote, Memory) else remote, random
            ),
            *(besiege_once(random, tally) if not reason_for_none() else ()),
        ]


def _history_round(
    directory: Path, remote: Environment, random: Random, tally: Counter[str]
) -> list[Violation | str]:
    """Run one workload under one nemesis; return what is wrong."""
    threads, descriptors = set(threading.enumerate()), _descriptors()
    local = [str(directory / name) for name in ("a.ckpt", "b.ckpt", "sub/c.ckpt", "sub/deep/f.ckpt")]
    spellings = _other_spellings(directory)
    there = remote.fresh()
    away = [f"{there}/d.ckpt", f"{there}/e.ckpt"]
    history = History()
    chosen = _options(random)
    service = CheckpointService(
        store_factory=faulty_stores(random, remote.storage_options),
        storage_options=remote.storage_options,
        observer=history.observe,
        **chosen,
    )
    workers = [
        Worker(
            service,
            local + away,
            history,
            Random(random.getrandbits(64)),
            directories=[str(directory / "sub"), str(directory / "sub" / "deep"), there],
            spellings=spellings,
        )
        for _ in range(_WORKERS)
    ]
    neighbourhood = Neighbourhood(_shared(directory, remote), Random(random.getrandbits(64)))
    stop = threading.Event()

    def work() -> None:
        try:
            if raised := run_together([partial(worker.run, _CALLS) for worker in workers]):
                raise raised[0]
            _close(service, history)
        finally:
            stop.set()

    programs = [work, lambda: look_on(local, history, stop), *neighbourhood.programs(stop)]
    if raised := run_together(programs):
        raise raised[0]
    for worker in workers:
        worker.settle()
    final = {path: look(path) for path in local} | {url: _look_away(remote, url) for url in away}
    _count(history, tally)
    neighbourhood.count(tally)
    raises = chosen["on_error"] == "raise"
    found: list[Violation | str] = [
        *check(history, final=final, queue_depth=chosen["queue_depth"], raises=raises)
    ]
    found += neighbourhood.wrong(partial(_look_away, remote))
    found += _left(directory, remote, threads, descriptors)
    return [*found, f"    with {chosen}"] if found else []


def _other_spellings(directory: Path) -> dict[str, str]:
    """Make links, and return other ways to some of the files: through a link, and through one to a directory."""
    (directory / "link.ckpt").symlink_to("a.ckpt")
    (directory / "linked").symlink_to("sub", target_is_directory=True)
    return {
        str(directory / "a.ckpt"): str(directory / "link.ckpt"),
        str(directory / "b.ckpt"): f"{directory}//linked/../b.ckpt",
        str(directory / "sub/c.ckpt"): str(directory / "linked/c.ckpt"),
        str(directory / "sub/deep/f.ckpt"): f"{directory}/linked/./deep//f.ckpt",
    }


def _shared(directory: Path, remote: Environment) -> Places:
    """Return where other processes work: beside what the workload saves, in a directory below, and remotely."""
    return Places(
        directories=[str(directory), str(directory / "shared" / "deep")],
        remote=[] if isinstance(remote, Memory) else [remote.fresh()],
        storage_options=remote.storage_options,
    )


def _options(random: Random) -> dict[str, Any]:
    return {
        "queue_depth": random.randint(1, 4),
        "max_concurrent_saves": random.randint(1, 3),
        "max_concurrent_parts": random.randint(1, 4),
        "overflow": random.choice(["block", "raise", "supersede"]),
        "memory_limit": random.choice(["1MiB", "4MiB", "64MiB"]),
        "on_error": random.choice(["raise", "warn"]),
        "part_size": random.choice(["64KiB", "256KiB", "32MiB"]),
        "durability": random.choice(["fsync", "process"]),
        "retry": RetryPolicy(attempts=3, initial_seconds=0.001, maximum_seconds=0.01),
        "flush_timeout": _PATIENCE_SECONDS,
    }


def _close(service: CheckpointService, history: History) -> None:
    try:
        service.close()
    except Exception as error:
        history.tell(error)


def _look_away(remote: Environment, url: str) -> str:
    try:
        return digest(remote.state_at(url))
    except FileNotFoundError:
        return ABSENT


def _count(history: History, tally: Counter[str]) -> None:
    for operation in history.operations:
        tally[f"{operation.kind}s {operation.outcome}"] += 1


# -- what is left behind


def _left(
    directory: Path, remote: Environment, threads: set[threading.Thread], descriptors: int
) -> Iterator[str]:
    for name in Local(directory).leftovers() + remote.leftovers():
        yield f"D2: {name} is left behind"
    deadline = monotonic() + _SETTLE_SECONDS
    while (left := set(threading.enumerate()) - threads) and monotonic() < deadline:
        sleep(0.01)  # a thread that has been joined through its executor may still be on its way out
    for thread in left:
        yield f"B2: thread {thread.name} is left behind"
    if _descriptors() > descriptors:
        yield f"B2: {_descriptors() - descriptors} file descriptors are left open"


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


if __name__ == "__main__":
    sys.exit(main())
