"""The rule by which links are followed in directories where anybody may put something."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_ckpt.system.trusted_paths import foreign_link_on, is_foreign, resolve

_NAMES = st.sampled_from(["a", "b", "c", ".", "..", "", "nothing"])
_WAYS = st.lists(_NAMES, min_size=1, max_size=6).map("/".join)


@given(targets=st.lists(st.tuples(st.sampled_from(["a", "b", "c", "a/b"]), _WAYS), max_size=5), way=_WAYS)
def test_a_path_is_resolved_as_the_system_does(
    tmp_path_factory: pytest.TempPathFactory, targets: list[tuple[str, str]], way: str
) -> None:
    """Links to links, to nothing, upwards and absolute: the same as ``os.path.realpath``, and none is foreign."""
    folder = tmp_path_factory.mktemp("tree")
    (folder / "a").mkdir()
    (folder / "a" / "c").mkdir()
    for name, target in targets:
        if target and not os.path.lexists(folder / name):
            os.symlink(f"{folder}/{target}" if len(target) % 2 else target, folder / name)
    path = f"{folder}/{way}"
    if os.path.exists(path):
        assert resolve(path).path == os.path.realpath(path)
    assert foreign_link_on(path) == ""


def test_a_circle_of_links_leads_nowhere(tmp_path: Path) -> None:
    """It is an error, as it is for the system; none of its links is told to be foreign."""
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="symbolic links"):
        resolve(f"{tmp_path}/a/x")
    assert foreign_link_on(f"{tmp_path}/a/x") == ""


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a link to another user")


@needs_root
@pytest.mark.parametrize(
    ("mode", "owner", "directory_owner", "foreign"),
    [
        (0o1777, 12345, 0, True),
        (0o1777, 0, 0, False),
        (0o1777, 12345, 12345, False),  # the directory is theirs
        (0o0777, 12345, 0, False),  # anybody can do anything there
        (0o1775, 12345, 0, False),  # a group that shares a directory
        (0o0755, 12345, 0, False),
    ],
)
def test_whose_names_count(
    tmp_path: Path, mode: int, owner: int, directory_owner: int, foreign: bool
) -> None:
    """In a sticky directory that all may write to: our own and those of the directory's owner; elsewhere, all."""
    (tmp_path / "elsewhere").mkdir()
    shared = tmp_path / "shared"
    shared.mkdir()
    link = shared / "run"
    link.symlink_to(tmp_path / "elsewhere")
    os.lchown(link, owner, owner)
    os.chown(shared, directory_owner, directory_owner)
    shared.chmod(mode)
    assert is_foreign(link.lstat(), str(shared)) is foreign
    assert foreign_link_on(f"{link}/x.ckpt") == (str(link) if foreign else "")
    found = resolve(f"{link}/x.ckpt")
    assert (found.path, found.foreign) == (
        str(tmp_path / "elsewhere" / "x.ckpt"),
        str(link) if foreign else "",
    )


@needs_root
@pytest.mark.parametrize(
    ("leads_to", "owner", "foreign"),
    [
        ("{private}", 12345, True),
        ("../../private", 12345, True),
        ("inside", 12345, False),  # to what is theirs anyway
        ("{private}", 0, False),  # ours
        ("{private}", 54321, True),  # of a third user, whom they have let in
    ],
)
@pytest.mark.parametrize("missing", [False, True])
def test_a_directory_of_another_user_leads_nowhere_else(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    leads_to: str,
    owner: int,
    foreign: bool,
    missing: bool,
) -> None:
    """Where another user has put a whole directory, no link of theirs in it leads out of it, however deep it is."""
    private, shared = tmp_path / "private", tmp_path / "shared"
    for folder in (private, shared, shared / "run", shared / "run" / "inside"):
        folder.mkdir()
    shared.chmod(0o1777)
    link = shared / "run" / "deep"
    link.symlink_to(leads_to.format(private=private) + ("/nothing" if missing else ""))
    for path in (shared / "run", shared / "run" / "inside", link):
        os.chown(path, 12345, 12345, follow_symlinks=False)
    os.lchown(link, owner, owner)
    assert foreign_link_on(f"{link}/x.ckpt") == (str(link) if foreign else "")
    assert resolve(str(link)).foreign == (str(link) if foreign else "")
    assert resolve(str(link), follow=False).foreign == ""
    monkeypatch.chdir(shared / "run" / "inside")
    assert foreign_link_on("../deep/x.ckpt") == (str(link) if foreign else "")
    shared.chmod(0o777)
    assert foreign_link_on(f"{link}/x.ckpt") == ""


def _move(folder: Path, name: str) -> None:
    if (folder / name).exists() and not (folder / f"{name}.old").exists():
        (folder / name).rename(folder / f"{name}.old")


def _lead(folder: Path, name: str) -> None:
    _move(folder, name)
    if not os.path.lexists(folder / name):
        (folder / name).symlink_to(f"{name}.old")


def _make(folder: Path, name: str) -> None:
    if not os.path.lexists(folder / name):
        (folder / name).mkdir(parents=True)


def _take_away(folder: Path, name: str) -> None:
    if (folder / name).is_symlink():
        (folder / name).unlink()
    elif (folder / name).is_dir():
        shutil.rmtree(folder / name)


_CHANGES = st.sampled_from([_move, _lead, _make, _take_away])
_PLACES = st.sampled_from(["a", "a/b", "c", "c/b", "a.old", "a.old/b"])


@given(st.lists(st.tuples(_CHANGES, _PLACES), max_size=8))
def test_a_directory_is_known_no_longer_once_it_has_changed(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[Callable[[Path, str], None], str]]
) -> None:
    """Whatever is moved, replaced by a link, or made anew, a path leads to what the system says, each time."""
    folder = tmp_path_factory.mktemp("tree")
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "c").symlink_to("a")
    for change, place in [(_make, "a"), *changes]:
        with suppress(OSError):  # what it needs is not there, or in its way
            change(folder, place)
        for way in ("a/b/x", "c/b/x", "c/b/../x", "a.old/b/x"):
            path, expected = f"{folder}/{way}", os.path.realpath(f"{folder}/{way}")
            if os.path.isdir(os.path.dirname(path)):
                found = resolve(path).path
                assert os.path.samefile(os.path.dirname(found), os.path.dirname(expected))
                assert os.path.basename(found) == os.path.basename(expected)


@needs_root
def test_a_directory_of_another_with_the_same_inode_is_not_known(tmp_path: Path) -> None:
    """Where a directory of ours has become another user's, in a place open to all, the links in it count as theirs."""
    tmp_path.chmod(0o1777)
    run = tmp_path / "run"
    run.mkdir()
    assert resolve(f"{run}/x").foreign == ""
    os.chown(run, 12345, -1)  # as one that was removed and made anew by that user may look, inode and all
    (run / "x").symlink_to("/etc/passwd")
    os.chown(run / "x", 12345, -1, follow_symlinks=False)
    assert resolve(f"{run}/x").foreign == f"{run}/x"


@needs_root
def test_what_one_user_knows_another_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that changes its user looks anew: a directory of its former user's is another user's by now."""
    tmp_path.chmod(0o1777)
    run = tmp_path / "run"
    run.mkdir()
    (run / "x").symlink_to("/etc/passwd")
    for path in (run, run / "x"):
        os.lchown(path, 12345, 12345)
    with monkeypatch.context() as as_them:
        as_them.setattr(os, "geteuid", lambda: 12345)
        assert resolve(f"{run}/x").foreign == ""
    assert resolve(f"{run}/x").foreign == f"{run}/x"
