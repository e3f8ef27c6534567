"""The check of what processes do in places that they share: right histories pass, each kind of wrong one is found."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

import pytest
import torch

from async_ckpt.stores.leftovers import temporary_name
from stress.environment import Local
from stress.foreign import Onlooker, Places
from stress.history import ABSENT
from stress.sharing import Kind, Word, check_shared
from stress.workload import digest

STATE = {"number": 1, "weights": [torch.zeros(3)], "view": torch.zeros(1)}


def words(*said: tuple[str, int, int, Kind, str, str]) -> list[Word]:
    """Return words of these processes, lives and requests."""
    return [
        Word(process=process, life=life, request=request, kind=kind, path=path, content=content)
        for process, life, request, kind, path, content in said
    ]


def promises(said: list[Word], *, seen: Collection[tuple[str, str]] = (), **final: str) -> list[str]:
    """Return the ids of the promises that were broken."""
    return [violation.promise for violation in check_shared(said, seen=seen, final=final)]


SAVED = words(("theirs", 0, 0, "save", "a", "one"), ("theirs", 0, 0, "done", "", ""))
REMOVED = words(("theirs", 0, 1, "remove", "a", ""), ("theirs", 0, 1, "done", "", ""))
BOTH = words(
    ("ours", 0, 0, "save", "c", "ours"),
    ("theirs", 0, 0, "save", "c", "theirs"),
    ("ours", 0, 0, "done", "", ""),
    ("theirs", 0, 0, "done", "", ""),
)


def test_what_was_durable_is_there() -> None:
    """It may be neither gone nor another state once its process is dead (D1)."""
    assert promises(SAVED, a="one") == []
    assert promises(SAVED, a=ABSENT) == ["D1"]
    assert promises(SAVED[:1], a=ABSENT) == promises(SAVED[:1], a="one") == []


def test_what_came_later_may_have_happened() -> None:
    """What was asked for and not told before the death may have happened, or not; what was told has."""
    asked = SAVED + REMOVED[:1]
    assert promises(asked, a=ABSENT) == promises(asked, a="one") == []
    assert promises(SAVED + REMOVED, a=ABSENT) == []
    assert promises(SAVED + REMOVED, a="one") == ["D1"]


def test_a_later_life_goes_on_where_the_one_before_was() -> None:
    """A state that was saved over, in whichever life, may not come back (D1)."""
    later = SAVED + words(("theirs", 1, 0, "save", "a", "two"))
    assert promises(later, a="one") == promises(later, a="two") == []
    later += words(("theirs", 1, 0, "done", "", ""))
    assert promises(later, a="two") == []
    assert promises(later, a="one") == ["D1"]


def test_any_of_several_processes_may_come_last() -> None:
    """Where two save to one name, there is what one of them saved last."""
    assert promises(BOTH, c="ours") == promises(BOTH, c="theirs") == []
    assert promises(BOTH, c=ABSENT) == ["D1"]


def test_what_nobody_saved_there_is_found() -> None:
    """Content that is another file's, or torn, breaks D2, whether it is read, seen or there in the end."""
    assert promises(SAVED, a="half of one") == ["D2", "D1"]
    assert promises(SAVED, seen=[("b", "one")], a="one") == ["D2"]
    read = words(("ours", 0, 0, "read", "a", "half of one"))
    assert promises(SAVED + read, a="one") == ["D2"]


def test_a_link_leads_to_anything_whole() -> None:
    """A link has no content of its own: what was saved anywhere is right, other things are not (D2)."""
    linked = SAVED + words(("ours", 0, 5, "link", "last", "a"))
    assert promises(linked, seen=[("last", "one")], a="one", last="one") == []
    assert promises(linked, seen=[("last", "nothing, though it had been there")], last="one") == ["D2"]


def test_a_request_that_fails_because_of_others_is_found() -> None:
    """No storage fails there, so any failure is one (D2)."""
    failed = words(("theirs", 0, 0, "failed", "a", "FileNotFoundError()"))
    assert promises(SAVED[:1] + failed, a=ABSENT) == ["D2"]


def test_what_a_process_reads_is_what_it_saved_last() -> None:
    """Of its own states it reads no earlier one (O2), and never nothing before it removes it (D2)."""
    saved = words(("ours", 0, 0, "save", "c", "one"), ("ours", 0, 1, "save", "c", "two"))
    others = words(("theirs", 0, 0, "save", "c", "theirs"))
    for content, broken in (("one", ["O2"]), ("two", []), ("theirs", []), (ABSENT, ["D2"])):
        assert promises(others + saved + words(("ours", 0, 2, "read", "c", content))) == broken
    removed = words(("ours", 0, 2, "remove", "c", ""), ("ours", 0, 3, "read", "c", ABSENT))
    assert promises(others + saved + removed) == []
    killed = saved + words(("ours", 1, 0, "read", "c", ABSENT))  # neither save was told to be durable
    assert promises(killed) == []


@pytest.mark.parametrize("place", ["", "sub", "sub/deep"])
def test_leftovers_are_found_in_every_directory(tmp_path: Path, place: str) -> None:
    """Files and links that a dead process has left, however deep they are."""
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    names = [os.path.join(place, temporary_name()) for _ in range(2)]
    (tmp_path / names[0]).touch()
    (tmp_path / names[1]).symlink_to("nothing")
    found = Local(tmp_path).leftovers()
    for name in names:
        (tmp_path / name).unlink()
    assert sorted(found) == sorted(names)


def test_who_looks_on_sees_what_is_gone_or_torn(tmp_path: Path) -> None:
    """A name that nobody removes may be missing at first, and not once something was there (D2)."""
    places = Places(directories=[str(tmp_path)])
    onlooker = Onlooker(places)
    onlooker.look()
    assert onlooker.seen == {(places.last, ABSENT), (places.common[0], ABSENT)}
    torch.save(STATE, tmp_path / "common.ckpt")
    (tmp_path / "last.ckpt").symlink_to("common.ckpt")
    onlooker.look()
    (tmp_path / "common.ckpt").unlink()
    onlooker.look()
    (tmp_path / "common.ckpt").write_bytes(b"half")
    onlooker.look()
    for path in (places.last, places.common[0]):
        found = {content for where, content in onlooker.seen if where == path} - {ABSENT, digest(STATE)}
        assert len(found) == 2
        assert "nothing, though it had been there" in found
