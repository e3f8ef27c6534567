"""What goes wrong on one rank, as every rank learns of it: real processes, real kills."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integration.sharded.launching import all_well, play

pytestmark = pytest.mark.integration

WORLD_SIZE = 3
SILENCE_SECONDS = 3.0

RAISED: dict[str, dict[str, Any]] = {
    "staging": {"moment": "staging"},
    "nowhere": {"moment": "nowhere"},
    "laying out": {"moment": "layout"},
    "planning": {"moment": "plan"},
    "beginning": {"operation": "begin"},
    "writing": {"operation": "put"},
    "committing an object": {"operation": "commit"},
    "elsewhere": {"moment": "elsewhere"},
}


def whose(ranks: list[Any]) -> set[str]:
    """Return the ranks that are said to be at fault; every rank that was told must have been told the same."""
    told = [rank["failures"] for rank in ranks if rank["kind"] == "ShardedSaveError"]
    assert told, ranks
    assert all(each == told[0] for each in told), told
    return set(told[0])


OWN = {
    "staging": "UnpicklableStateError",
    "nowhere": "UnknownProtocolError",
    "laying out": "AsyncCheckpointError",
}
"""What the rank at fault is told itself, where it has no part in the agreement."""

CASES = {f"{case}, rank {victim}": {**RAISED[case], "victim": victim} for case in RAISED for victim in (0, 1)}


@pytest.fixture(scope="module")
def raised(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What each rank tells of each case."""
    told: dict[str, list[Any]] = {}
    # Each victim with processes of its own: every service connects anew, and torch's store has been seen to take five
    # seconds for a connection after a hundred of them.
    for victim in (0, 1):
        folder = tmp_path_factory.mktemp(f"raised-{victim}")
        cases = {name: case for name, case in CASES.items() if case["victim"] == victim}
        ranks = all_well(play("those_that_fail", WORLD_SIZE, folder, url=str(folder / "it"), cases=cases))
        told |= {name: [rank[name] for rank in ranks] for name in cases}
    return told


@pytest.mark.parametrize("name", CASES, ids=lambda name: name.replace(", ", "-").replace(" ", "-"))
def test_an_error_on_one_rank_reaches_all(raised: dict[str, list[Any]], name: str) -> None:
    """All have the same error in a second; training's group, the earlier checkpoint and the next save are well."""
    told, victim = raised[name], CASES[name]["victim"]
    blamed = whose(told)
    if not name.startswith(("planning", "elsewhere")):  # there, two ranks are at fault, or neither
        assert blamed == {str(victim)}
    for rank, each in enumerate(told):
        own = next((kind for case, kind in OWN.items() if name.startswith(case)), "ShardedSaveError")
        assert each["kind"] == (own if rank == victim else "ShardedSaveError"), each
        assert each["seconds"] < 1.0, each
        assert "twice" not in each, each
        assert each["sum"] == 6.0
        assert each["earlier"] == each["next"] == [], each
        assert len(each["files"]) == WORLD_SIZE + 1, each["files"]


KILLS: dict[str, dict[str, Any]] = {
    "rank 1 as it begins": {"victim": 1, "operation": "begin"},
    "rank 1 as it sends": {"victim": 1, "operation": "put"},
    "rank 1 as it commits its object": {"victim": 1, "operation": "commit"},
    "rank 1 when its object is there": {"victim": 1, "operation": "commit", "after": True},
    "rank 0 as it begins": {"victim": 0, "operation": "begin"},
    "rank 0 when its object is there": {"victim": 0, "operation": "commit", "after": True},
    "rank 0 as it commits the checkpoint": {"victim": 0, "operation": "commit", "call": 2},
    "rank 0 when the checkpoint is there": {"victim": 0, "operation": "commit", "call": 2, "after": True},
    "rank 0 as it tidies up": {"victim": 0, "operation": "delete"},
}


@pytest.mark.parametrize("name", KILLS, ids=lambda name: name.replace(" ", "-"))
def test_a_rank_is_killed(tmp_path: Path, name: str) -> None:
    """The others end alike within the bound; what was there loads, whole; the next start leaves nothing behind."""
    url = str(tmp_path / "it")
    case = KILLS[name]
    ranks = play(
        "one_that_fails", WORLD_SIZE, tmp_path, url=url, error="crash", silence=SILENCE_SECONDS, **case
    )
    assert ranks[case["victim"]].was_killed, ranks[case["victim"]].output
    survivors = all_well([rank for number, rank in enumerate(ranks) if number != case["victim"]])
    kinds = {each["kind"] for each in survivors}
    is_committed = name in ("rank 0 when the checkpoint is there", "rank 0 as it tidies up")
    assert kinds == {"durable" if is_committed else "ShardedSaveError"}, survivors
    assert is_committed or whose(survivors) == {str(case["victim"])}
    for each in survivors:
        assert each["seconds"] < SILENCE_SECONDS + 1, each
    for each in all_well(play("what_is_there", WORLD_SIZE - 1, tmp_path, url=url, seeds=[1.0, 2.0])):
        assert each["seed"] == (2.0 if is_committed else 1.0)
        assert each["next"] == []
        assert len(each["files"]) == WORLD_SIZE, each["files"]


def test_a_rank_that_comes_too_late(tmp_path: Path) -> None:
    """The others give a save up after ``agreement_timeout``; who comes later learns the same, and is in step again."""
    url = str(tmp_path / "it")
    case = {"victim": 1, "moment": "late", "silence": SILENCE_SECONDS}
    told = all_well(play("one_that_fails", WORLD_SIZE, tmp_path, url=url, **case))
    assert whose(told) == {"1"}
    for rank, each in enumerate(told):
        assert rank == 1 or each["seconds"] < 2 * SILENCE_SECONDS + 1, each
        assert each["sum"] == 6.0
        assert each["earlier"] == each["next"] == [], each
        assert len(each["files"]) == WORLD_SIZE + 1, each["files"]


def test_a_rank_that_never_saves(tmp_path: Path) -> None:
    """The others give the save up after ``agreement_timeout``; what was there before is there still."""
    url = str(tmp_path / "it")
    case = {"victim": 1, "moment": "never", "silence": SILENCE_SECONDS}
    told = all_well(play("one_that_fails", WORLD_SIZE, tmp_path, url=url, **case))
    assert whose(told) == {"1"}
    assert all(told[rank]["seconds"] < 2 * SILENCE_SECONDS + 1 for rank in (0, 2)), told
    for each in all_well(play("what_is_there", WORLD_SIZE, tmp_path, url=url, seeds=[1.0, 2.0])):
        assert each["seed"] == 1.0
        assert len(each["files"]) == WORLD_SIZE + 1, each["files"]
