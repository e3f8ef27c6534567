"""Directories in which some user may do some things: sticky, not to be listed, or with a file mounted into them."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from async_ckpt import CheckpointService, StoreError
from tests.support import complaints, python

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can be others, and mount"),
]

ONE, OTHER, GROUP = 12345, 12346, 23456

# Everything is imported before: the interpreter may lie where that user may not look.
AS_ONE = f"""
import os, sys
import torch, torch.utils._pytree
from async_ckpt import CheckpointService, StoreError
with CheckpointService() as service:
    service.save({{"step": 0}}, sys.argv[2]).wait(timeout=60)
os.setgroups([{GROUP}])
os.setgid({GROUP})
os.setuid({ONE})
"""


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory that others come to; pytest's own are closed to them."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def as_one(program: str, *arguments: object, shared: Path) -> str:
    """Run *program* as the one user; return what it printed."""
    warm = shared / "warm"
    warm.mkdir(exist_ok=True)
    done = python(AS_ONE + program, arguments[0], warm / "x.ckpt", *arguments[1:], cwd="/")
    assert done.returncode == 0, done.stderr
    assert not complaints(done)
    return done.stdout


SAVE = """
with CheckpointService(**eval(sys.argv[3])) as service:
    try:
        service.save({"step": 1}, sys.argv[1]).wait(timeout=60)
    except StoreError as error:
        print(error.stage, error.errno, error)
"""


SAVE_AT_THE_CALL = """
with CheckpointService(**eval(sys.argv[3])) as service:
    try:
        handle = service.save({"step": 1}, sys.argv[1])
    except StoreError as error:
        print(error)
    else:
        handle.wait(timeout=60)
"""


def test_a_sticky_directory_of_a_group(shared: Path) -> None:
    """Another user's file, which may be written to but not replaced, is refused before the first byte, with advice."""
    folder = shared / "scratch"
    folder.mkdir()
    path = folder / "x.ckpt"
    torch.save({"step": 0}, path)
    for each, owner, mode in ((folder, 0, 0o1775), (path, OTHER, 0o664)):
        os.chown(each, owner, GROUP)
        each.chmod(mode)
    told = as_one(SAVE, path, {}, shared=shared)
    assert told.startswith("begin 1 ")
    assert "belongs to another user" in told
    assert 'in_place="allow"' in told
    assert torch.load(path)["step"] == 0
    assert as_one(SAVE, path, {"in_place": "allow"}, shared=shared) == ""
    assert torch.load(path)["step"] == 1
    assert (path.stat().st_uid, path.stat().st_mode & 0o777) == (OTHER, 0o664)
    assert os.listdir(folder) == ["x.ckpt"]
    assert as_one(SAVE, folder / "own.ckpt", {}, shared=shared) == ""
    assert as_one(SAVE, folder / "own.ckpt", {}, shared=shared) == ""


@pytest.mark.parametrize("durability", ["fsync", "process"])
def test_a_directory_that_may_not_be_listed(shared: Path, durability: str) -> None:
    """Where one may write but not look, a checkpoint is saved, replaced, loaded and removed."""
    folder = shared / "drop"
    folder.mkdir()
    folder.chmod(0o733)
    program = """
path = sys.argv[1]
with CheckpointService(durability=sys.argv[3]) as service:
    for step in (1, 2):
        service.save({"step": step}, path).wait(timeout=60)
    print(service.load(path)["step"])
    service.save({"step": 3}, path + "2").wait(timeout=60)
    service.remove(path).wait(timeout=60)
"""
    assert as_one(program, folder / "x.ckpt", durability, shared=shared) == "2\n"
    assert os.listdir(folder) == ["x.ckpt2"]
    assert torch.load(folder / "x.ckpt2")["step"] == 3


def test_a_file_in_a_directory_that_may_not_be_written_to(shared: Path) -> None:
    """Where only the file may be written to, a save is refused at the call, naming the option that lets it be."""
    path = shared / "x.ckpt"
    torch.save({"step": 0}, path)
    path.chmod(0o666)
    warm = shared.with_name(shared.name + "-warm")
    warm.mkdir()
    try:
        for options, step in (({}, 0), ({"in_place": "allow"}, 1)):
            done = python(AS_ONE + SAVE_AT_THE_CALL, path, warm / "x.ckpt", options, cwd="/")
            assert done.returncode == 0, done.stderr
            assert ('in_place="allow"' in done.stdout) == (not options)
            assert torch.load(path)["step"] == step
        assert os.listdir(shared) == ["x.ckpt"]
    finally:
        shutil.rmtree(warm)


@pytest.fixture
def single(shared: Path) -> Iterator[Path]:
    """A file mounted into a directory, as it is into a container."""
    source, path = shared / "source", shared / "into" / "x.ckpt"
    path.parent.mkdir()
    torch.save({"step": 0}, source)
    path.touch()
    done = subprocess.run(["mount", "--bind", source, path], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"nothing can be mounted: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", path], check=True)


def test_a_file_that_is_a_mount(single: Path) -> None:
    """A file that is mounted by itself is refused before the first byte; in place it is written, and stays mounted."""
    written: list[str] = []
    with CheckpointService(observer=lambda event: written.append(type(event).__name__)) as service:
        with pytest.raises(StoreError, match=r"mount of its own.*Mount its directory") as caught:
            service.save({"step": 1}, single).wait(timeout=60)
    assert caught.value.stage == "begin"
    assert "PartWritten" not in written
    assert torch.load(single)["step"] == 0
    with CheckpointService(in_place="allow") as service:
        service.save({"step": 1}, single).wait(timeout=60)
        service.save({"step": 2}, single.parent / "y.ckpt").wait(timeout=60)
    assert torch.load(single)["step"] == 1
    assert torch.load(single.parents[1] / "source")["step"] == 1
    assert sorted(os.listdir(single.parent)) == ["x.ckpt", "y.ckpt"]
