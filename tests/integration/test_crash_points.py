"""SIGKILL at every event of a save, and at random moments: what is found afterwards (D1, D2)."""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from async_ckpt import CheckpointService
from async_ckpt.events import Event, Swept
from async_ckpt.stores.leftovers import is_leftover
from tests.support import PATIENCE_SECONDS, number_at, python, start_python, state

pytestmark = pytest.mark.integration

#: Forks a child for each event of the second save, which dies at that event; the last child survives them all.
WALK = """
    import os, signal, sys
    import torch
    from async_ckpt import CheckpointService
    from tests.support import state

    torch.set_num_threads(1)  # OpenMP does not survive a fork

    def run(directory, target, last):
        seen = 0

        def observer(event):
            nonlocal seen
            seen += 1
            with open(directory + ".log", "a") as log:
                log.write(type(event).__name__ + chr(10))
            if seen == last:
                os.kill(os.getpid(), signal.SIGKILL)

        with CheckpointService() as service:
            service.save(state(1), directory + "/a.ckpt")
        options = {"part_size": "64KiB", "max_concurrent_parts": 1, "page_cache": page_cache}
        with CheckpointService(observer=observer, **options) as service:
            service.save(state(2, nbytes=200_000), directory + "/" + target)

    root, target, page_cache = sys.argv[1:]
    with CheckpointService() as service:
        service.save(state(0), "memory://warm")  # imports, once for all children
    last, survived = 0, False
    while not survived:
        last += 1
        directory = f"{root}/{last}"
        os.mkdir(directory)
        child = os.fork()
        if child == 0:
            run(directory, target, last)
            sys.exit(0)
        survived = os.waitpid(child, 0)[1] == 0
"""

LIFE = ["Accepted", "Staged", "Writing", "LaidOut", "Begun", *["PartWritten"] * 4, "Committing", "Durable"]


@dataclass
class Wreck:
    """What a killed process left."""

    directory: Path
    seen: list[str]

    @property
    def checkpoints(self) -> set[str]:
        """The names of all files but temporary ones."""
        return {name for name in os.listdir(self.directory) if not is_leftover(name)}

    @property
    def leftovers(self) -> set[str]:
        """The names of temporary files."""
        return {name for name in os.listdir(self.directory) if is_leftover(name)}


PLACES = {"over-the-old": "a.ckpt", "beside-the-old": "b.ckpt"}


@pytest.fixture(
    scope="module",
    params=[(target, page_cache) for target in PLACES.values() for page_cache in ("keep", "drop")],
    ids=[f"{place}-{page_cache}" for place in PLACES for page_cache in ("keep", "drop")],
)
def wrecks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, list[Wreck]]:
    """One wreck for each event of a save, and what a survivor left, last."""
    root = tmp_path_factory.mktemp("wrecks")
    target, page_cache = request.param
    done = python(WALK, root, target, page_cache)
    assert (done.returncode, done.stderr) == (0, "")
    numbers = sorted(int(path.name) for path in root.iterdir() if path.is_dir())
    return target, [Wreck(root / str(n), (root / f"{n}.log").read_text().split()) for n in numbers]


def test_every_event_is_walked(wrecks: tuple[str, list[Wreck]]) -> None:
    """There is a wreck for each event of a save with four parts, from the first to the last."""
    _, found = wrecks
    assert [wreck.seen for wreck in found] == [LIFE[:n] for n in range(1, len(LIFE) + 1)] + [LIFE]


def test_the_previous_checkpoint_loads(wrecks: tuple[str, list[Wreck]]) -> None:
    """Whenever the process dies, the old checkpoint or, once committing, the new one is there and whole (D2)."""
    target, found = wrecks
    for wreck in found:
        number = number_at(wreck.directory / "a.ckpt")
        if target != "a.ckpt" or "Committing" not in wreck.seen:
            assert number == 1
        elif "Durable" in wreck.seen:
            assert number == 2
        else:
            assert number in (1, 2)


def test_what_was_durable_survives(wrecks: tuple[str, list[Wreck]]) -> None:
    """A checkpoint that was called durable is there after the process was killed at that very moment (D1)."""
    target, found = wrecks
    durable = [wreck for wreck in found if "Durable" in wreck.seen]
    assert len(durable) == 2
    for wreck in durable:
        assert number_at(wreck.directory / target) == 2


def test_nothing_torn_is_visible(wrecks: tuple[str, list[Wreck]]) -> None:
    """Under a final name there is a whole checkpoint or nothing; all else is a temporary file (D2)."""
    target, found = wrecks
    for wreck in found:
        expected = {"a.ckpt", target} if "Committing" in wreck.seen else {"a.ckpt"}
        assert {"a.ckpt"} <= wreck.checkpoints <= expected
        for name in wreck.checkpoints:
            with zipfile.ZipFile(wreck.directory / name) as archive:
                assert archive.testzip() is None
        assert len(wreck.leftovers) <= 1
    assert any(wreck.leftovers for wreck in found), "no death left anything, so nothing was proven"


def test_the_next_save_sweeps(wrecks: tuple[str, list[Wreck]]) -> None:
    """The next save in the directory removes what the dead process left there, and says so (D2)."""
    _, found = wrecks
    for wreck in found:
        left, events = wreck.leftovers, list[Event]()
        with CheckpointService(observer=events.append) as service:
            service.save(state(3), wreck.directory / "c.ckpt")
        assert wreck.leftovers == set()
        swept = {name for event in events if isinstance(event, Swept) for name in event.names}
        assert swept == left


#: Saves one number after the other over the same file, and says which are durable.
LOOP = """
    import sys
    from async_ckpt import CheckpointService
    from tests.support import state

    with CheckpointService(part_size="64KiB", page_cache=sys.argv[2]) as service:
        number = 0
        while True:
            number += 1
            handle = service.save(state(number, nbytes=1_000_000), sys.argv[1])
            handle.add_done_callback(lambda _, number=number: print(number, flush=True))
"""


@pytest.mark.parametrize("page_cache", ["keep", "drop"])
@pytest.mark.parametrize("seed", range(4))
def test_random_moments(tmp_path: Path, seed: int, page_cache: str) -> None:
    """Killed at any moment, a process leaves the last durable checkpoint or a newer one, whole (D1, D2)."""
    path = tmp_path / "a.ckpt"
    chance = random.Random(seed)
    process = start_python(LOOP, path, page_cache)
    try:
        assert process.stdout is not None
        for _ in range(chance.randint(1, 8)):
            assert process.stdout.readline()
        select.select([process.stdout], [], [], chance.random() / 100)  # somewhere in the next save
    finally:
        process.send_signal(signal.SIGKILL)
        rest, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == -signal.SIGKILL, errors
    told = [int(line) for line in rest.split()]
    assert number_at(path) >= (told[-1] if told else 1)
    with CheckpointService() as service:
        service.save(state(0), path)
    assert os.listdir(tmp_path) == ["a.ckpt"]


def test_a_living_process_is_not_swept(tmp_path: Path) -> None:
    """The unfinished file of a process that is alive is left alone by others (D2)."""
    code = """
        import sys
        from async_ckpt import CheckpointService
        from tests.support import Harness, gated, reached, state

        gate, hold = gated("commit")
        with Harness(hold) as harness:
            harness.service.save(state(1), sys.argv[1])
            reached(gate)
            print("begun", flush=True)
            sys.stdin.readline()
    """
    process = start_python(code, tmp_path / "a.ckpt", stdin=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        with CheckpointService() as service:
            service.save(state(2), tmp_path / "b.ckpt")
        assert len([name for name in os.listdir(tmp_path) if is_leftover(name)]) == 1
        _, errors = process.communicate("go on\n", timeout=PATIENCE_SECONDS)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, errors) == (0, "")
    assert (number_at(tmp_path / "a.ckpt"), number_at(tmp_path / "b.ckpt")) == (1, 2)
