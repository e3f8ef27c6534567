"""The check of what a second user does to us: it finds what he reads, what he has us write, and what he takes away."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
import torch

from stress.hostile import besiege_once, broken, picture, reason_for_none
from stress.intruder import Intruder
from stress.workload import digest

STATE = {"number": 1, "weights": [torch.zeros(3)], "view": torch.zeros(1)}

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")


@pytest.fixture
def intruder(tmp_path: Path) -> Iterator[Intruder]:
    """One of this very user."""
    intruder = Intruder(tmp_path, tmp_path, ["a.ckpt"], Random(0))
    yield intruder
    intruder.close()


@pytest.mark.skipif(bool(reason_for_none()), reason=reason_for_none())
def test_a_siege_is_held() -> None:
    """There is another user, who does a lot, and yet some saves succeed and nothing is wrong."""
    tally: Counter[str] = Counter()
    assert besiege_once(Random(7), tally) == []
    assert tally["hostile acts"] > 0
    assert tally["besieged: saves"] > 0


@needs_root
def test_what_can_be_read_is_found(tmp_path: Path, intruder: Intruder) -> None:
    """A file of somebody else that opens is told, wherever it is; one's own is not."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "own").touch()
    (tmp_path / "sub" / "theirs").touch(mode=0o644)
    os.chown(tmp_path / "sub" / "theirs", 12345, 12345)
    intruder.read()
    assert intruder.found == {"may read theirs, -rw-r--r--"}


def test_what_is_written_to_a_planted_file_is_found(tmp_path: Path, intruder: Intruder) -> None:
    """Whoever writes to what was planted, rather than put a new file in its place, is found."""
    path = str(tmp_path / "planted")
    intruder.plant_file(path)
    intruder.read_planted()
    assert intruder.found == set()
    Path(path).write_bytes(b"ours")
    intruder.read_planted()
    assert intruder.found == {"is written to: planted holds b'ours'"}


def test_what_is_private_is_compared(tmp_path: Path) -> None:
    """Content, mode, owner, and what is there: any change shows."""
    file = tmp_path / "precious"

    def anew() -> None:
        file.write_text("other")
        file.replace(tmp_path / "aside")
        file.write_text("precious")
        (tmp_path / "aside").unlink()

    changes: list[Callable[[], object]] = [
        lambda: file.write_text("other"),
        lambda: file.chmod(0o600),
        lambda: (tmp_path / "new").mkdir(),
        anew,
        file.unlink,
    ]
    for change in changes:
        file.write_text("precious")
        file.chmod(0o640)
        before = picture(tmp_path)
        assert picture(tmp_path) == before
        change()
        assert picture(tmp_path) != before


def test_what_was_durable_is_ours_and_there(tmp_path: Path) -> None:
    """It is gone, another state, somebody else's file or a link: each is found; below, the place is not ours."""
    assert list(broken(tmp_path, {"a.ckpt": digest(STATE), "sub/a.ckpt": "any"})) == [
        "D1: a.ckpt was durable, and is gone"
    ]
    path = tmp_path / "a.ckpt"
    torch.save(STATE, path)
    path.chmod(0o600)
    assert list(broken(tmp_path, {"a.ckpt": digest(STATE)})) == []
    assert list(broken(tmp_path, {"a.ckpt": "other"})) == ["D1: a.ckpt was durable, and is another state"]
    path.rename(tmp_path / "b.ckpt")
    path.symlink_to("b.ckpt")
    assert list(broken(tmp_path, {"a.ckpt": digest(STATE)})) == ["D1: a.ckpt was durable, and is gone"]


def test_open_files_and_leftovers_are_found(tmp_path: Path) -> None:
    """What others may read, and what is left of a save."""
    for name, mode in (("a.ckpt", 0o640), (".async_ckpt.x.tmp", 0o600)):
        (tmp_path / name).touch()
        (tmp_path / name).chmod(mode)
    found = sorted(broken(tmp_path, {}))
    (tmp_path / ".async_ckpt.x.tmp").unlink()
    assert found == ["D2: .async_ckpt.x.tmp is left behind", "a.ckpt is open to others: -rw-r-----"]
