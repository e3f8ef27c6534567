"""Another user of the machine, in directories where both may put something: a real one, in a process of his own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch

from async_ckpt import AsyncCheckpointIO, CheckpointService, StoreError
from async_ckpt.events import Event, LaidOut, PartWritten
from async_ckpt.stores import locate
from async_ckpt.stores.disk import Disk
from async_ckpt.stores.local.store import LocalStore
from async_ckpt.testing import ThreadWorkers
from async_ckpt.timeline import Timeline

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")

STATE = {"weights": torch.arange(100_000)}
NOBODY = 65534


def as_nobody(program: str, *arguments: object) -> str:
    """Run *program* as another user; return what it printed."""
    # The interpreter itself may lie where that user may not look.
    drop = f"import os, sys; os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})"
    done = subprocess.run(
        [sys.executable, "-S", "-E", "-c", f"{drop}\n{program}", *map(str, arguments)],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    return done.stdout


def plant(path: Path, target: Path) -> None:
    """Let the other user put a link there."""
    as_nobody("import os, sys; os.symlink(*sys.argv[1:])", target, path)


READ = """
import os, sys
for folder, _, names in os.walk(sys.argv[1]):
    for name in names:
        try:
            print(name, len(open(os.path.join(folder, name), "rb").read()))
        except OSError as error:
            print(name, error.strerror)
"""


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory as /tmp is; pytest's own are closed to others."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def victim(shared: Path) -> Iterator[Path]:
    """A file of ours, elsewhere, with something in it; untouched in the end."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    file = folder / "precious"
    file.write_text("precious")
    file.chmod(0o640)
    yield file
    assert file.read_text() == "precious"
    assert file.stat().st_mode & 0o777 == 0o640
    assert os.listdir(folder) == ["precious"]
    shutil.rmtree(folder)


@pytest.mark.parametrize("earlier", [0o600, None])
def test_nobody_reads_what_is_being_written(shared: Path, earlier: int | None) -> None:
    """While a checkpoint is written or replaced, another user reads no byte of it; afterwards, if its mode says so."""
    path = shared / "x.ckpt"
    if earlier is not None:
        path.touch()
        path.chmod(earlier)
    told: list[str] = []

    def look(event: Event) -> None:
        if isinstance(event, (LaidOut, PartWritten)):
            told.extend(as_nobody(READ, shared).splitlines())

    with CheckpointService(observer=look, part_size="64KiB") as service:
        service.save(STATE, path)
    assert any(".tmp " in line for line in told), "it did not look while there was something"
    assert {line.partition(" ")[2] for line in told if ".tmp " in line} == {"Permission denied"}
    after = as_nobody(READ, shared).split()[1]
    assert after == (str(path.stat().st_size) if earlier is None else "Permission")


@pytest.mark.parametrize("kind", ["the file", "the directory", "a dangling directory"])
def test_no_save_goes_through_a_planted_link(shared: Path, victim: Path, kind: str) -> None:
    """A save to where another user has put a link is refused at the call, naming the link; so is a removal's way."""
    if kind == "the file":
        link = path = shared / "x.ckpt"
        plant(link, victim)
    else:
        link, path = shared / "run", shared / "run" / victim.name
        plant(link, victim.parent if kind == "the directory" else victim.parent / "nothing")
    with CheckpointService() as service:
        with pytest.raises(StoreError, match=f"Another user has put the link '{link}'"):
            service.save(STATE, path)
        if link != path:
            with pytest.raises(StoreError, match="cannot delete"):
                service.remove(path).wait()
    plugin = AsyncCheckpointIO()
    if link != path:
        with pytest.raises(StoreError, match=str(link)):
            plugin.save_checkpoint({"a": 1}, path)
    plugin.teardown()


def test_a_link_that_is_planted_while_a_save_waits_is_refused(shared: Path, victim: Path) -> None:
    """What was no link at the call is looked at again when it is the save's turn."""
    link = shared / "run"

    def plant_late(event: Event) -> None:
        if type(event).__name__ == "Writing":
            plant(link, victim.parent)

    service = CheckpointService(observer=plant_late)
    handle = service.save(STATE, link / "precious")
    with pytest.raises(StoreError, match="Another user has put the link"):
        handle.wait()
    service.close()


PLANT_DIRECTORY = """
import os, sys
os.mkdir(sys.argv[1])
os.symlink(sys.argv[2], os.path.join(sys.argv[1], "precious"))
os.symlink(os.path.dirname(sys.argv[2]), os.path.join(sys.argv[1], "deep"))
"""


@pytest.mark.parametrize("name", ["precious", "deep/precious"])
def test_a_planted_directory_leads_nowhere_else(shared: Path, victim: Path, name: str) -> None:
    """Nothing is saved or removed by way of a link in a directory that another user has put there."""
    as_nobody(PLANT_DIRECTORY, shared / "run", victim)
    path = shared / "run" / name
    with CheckpointService() as service:
        with pytest.raises(StoreError, match="Another user has put the link"):
            service.save(STATE, path)
        if "deep" in name:
            with pytest.raises(StoreError, match="Another user has put the link"):
                service.remove(path).wait()
        service.save(STATE, shared / "run" / "x.ckpt").wait()  # it may be shared on purpose
    assert (shared / "run" / "x.ckpt").stat().st_uid == 0


def test_no_link_of_ours_leads_where_another_user_wants_it(shared: Path, victim: Path) -> None:
    """A link is not made to what a planted link leads to: a later save would trust it, as it is ours."""
    plant(shared / "run", victim.parent)
    with CheckpointService() as service:
        handle = service.submit_link(
            locate(shared / "last.ckpt", follow=False), locate(shared / "run" / victim.name)
        )
        with pytest.raises(StoreError, match="Another user has put the link"):
            handle.wait()
    assert not os.path.lexists(shared / "last.ckpt")


class PlantedBetween(Disk):
    """Lets the other user plant something right before the n-th of some calls, after all that was looked at."""

    def __init__(self, call: str, action: Callable[[], object]) -> None:
        self._call = call
        self._action: Callable[[], object] | None = action

    def _comes(self, call: str) -> None:
        if call == self._call and self._action is not None:
            action, self._action = self._action, None
            action()

    def mkdir(self, path: str) -> None:
        """Make one directory."""
        self._comes("mkdir")
        super().mkdir(path)

    def lstat(self, path: str) -> os.stat_result:
        """Describe *path* itself."""
        self._comes("lstat")
        return super().lstat(path)


@pytest.mark.parametrize("below", ["run/deep", "run"])
def test_a_way_that_is_planted_while_it_is_made(shared: Path, victim: Path, below: str) -> None:
    """Where another user takes the name of a directory that is about to be made, nothing is made where that leads."""
    (victim.parent / "deep").mkdir()
    disk = PlantedBetween("mkdir", lambda: plant(shared / "run", victim.parent))
    workers = ThreadWorkers(1)
    store = LocalStore(workers=workers, disk=disk)
    with pytest.raises(StoreError, match="Another user has put the link"):
        anyio.run(store.begin, locate(shared / below / "new" / "x.ckpt"), 10)
    workers.close()
    assert os.listdir(victim.parent / "deep") == []
    (victim.parent / "deep").rmdir()


def test_a_way_that_is_planted_right_before_a_removal(shared: Path, victim: Path) -> None:
    """What a removal finds only because another user has just put a link there is not deleted."""
    disk = PlantedBetween("lstat", lambda: plant(shared / "run", victim.parent))
    workers = ThreadWorkers(1)
    store = LocalStore(workers=workers, disk=disk)
    with pytest.raises(StoreError, match="Another user has put the link"):
        anyio.run(store.delete, locate(shared / "run" / victim.name))
    workers.close()


def test_no_file_of_another_user_becomes_ours(shared: Path) -> None:
    """A file that another user has put there keeps its content, and no checkpoint takes its owner or mode."""
    path = shared / "x.ckpt"
    as_nobody("import os, sys; os.close(os.open(sys.argv[1], os.O_CREAT, 0o666))", path)
    with CheckpointService() as service, pytest.raises(StoreError, match="Another user has put a file"):
        service.save(STATE, path)
    assert path.stat().st_uid == NOBODY


def test_leftovers_that_are_links_are_not_followed(shared: Path, victim: Path) -> None:
    """A link, a pipe and a hard link by the name of a dead process's file lead to nothing of ours."""
    from async_ckpt.stores.leftovers import temporary_name

    names = []
    for _ in range(3):
        _, ours, host, _, rest = temporary_name().split(".", 4)
        names.append(f".{ours}.{host}.4194304.{rest}")
    plant(shared / names[0], victim)
    as_nobody("import os, sys; os.mkfifo(sys.argv[1])", shared / names[1])
    os.link(victim, shared / names[2])
    with CheckpointService() as service:
        service.save(STATE, shared / "x.ckpt").wait()
    assert (shared / "x.ckpt").stat().st_uid == 0


def test_no_file_of_another_user_is_put_back(shared: Path) -> None:
    """What another user has given the name of a file that a dead process of ours has put aside gets no other name."""
    from async_ckpt.stores.leftovers import name_aside

    _, pid, _ = name_aside("x.ckpt").rsplit(".", 2)
    planted = shared / name_aside("x.ckpt").replace(f".{pid}.", ".4194304.")
    as_nobody("import os, sys; os.close(os.open(sys.argv[1], os.O_CREAT, 0o666))", planted)
    with CheckpointService() as service:
        service.save(STATE, shared / "y.ckpt").wait()
        service.save(STATE, shared / "x.ckpt").wait()
    assert (shared / "x.ckpt").stat().st_uid == 0
    assert planted.stat().st_uid == NOBODY


def test_a_timeline_is_not_written_elsewhere(shared: Path, victim: Path) -> None:
    """Neither through a link in its own place, nor through one in its directory's."""

    def record(path: Path) -> Any:
        timeline = Timeline(path)
        timeline.slice("steps", "step", 1.0, 2.0)
        return timeline

    plant(shared / "trace.json", victim)
    record(shared / "trace.json").write()
    assert not (shared / "trace.json").is_symlink()
    plant(shared / "run", victim.parent)
    timeline = record(shared / "run" / "precious")
    with pytest.raises(PermissionError, match="another user put this link"):
        timeline.write()
    plain = timeline.__getstate__()
    timeline.__setstate__(plain)  # nothing is left for the exit to write
