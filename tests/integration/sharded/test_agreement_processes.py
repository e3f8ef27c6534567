"""Three processes of a gloo group: each way to fail, and every survivor ends alike, in time, with training unharmed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.sharded_ranks import Outcome, Save, World, run_ranks

pytestmark = [pytest.mark.integration]

FULL = "OSError: [Errno 28] No space left on device"
SILENT = "sent nothing for 2 s: it has ended, hangs, or cannot reach the group's store"
#: On a machine that is busy with other things, beyond the bound of which the test is.
SLACK_SECONDS = 2.0


def ended_alike(answers: list[list[Outcome] | None], number: int = 0) -> dict[int, str] | None:
    """Return how save *number* ended for all that live, which must be the same."""
    ends = [answer[number].failures for answer in answers if answer is not None]
    assert all(end == ends[0] for end in ends), ends
    return ends[0]


def slowest(answers: list[list[Outcome] | None], number: int = 0) -> float:
    """Return the seconds after which the last rank knew."""
    return max(answer[number].seconds for answer in answers if answer is not None)


def test_errors_reach_all_ranks_while_training_goes_on(tmp_path: Path) -> None:
    """Whatever raises: all ranks have the same error within a second; training and the next save work (E4, T1)."""
    errors = [
        {},
        {0: "plan"},
        {0: "write"},
        {2: "write"},
        {0: "commit"},
        {1: "elsewhere"},
        {0: "elsewhere"},
        {},
    ]
    saves = [Save(errors=each) for each in errors]
    answers = run_ranks(World(folder=tmp_path, saves=saves))
    for number, each in enumerate(errors):
        failures = ended_alike(answers, number)
        if not each:
            assert failures is None
            continue
        ((rank, step),) = each.items()
        assert failures is not None
        assert slowest(answers, number) < 1 + SLACK_SECONDS
        if step == "elsewhere":
            assert rank in failures
            assert len(failures) > 1
        else:
            assert failures == {rank: FULL}
    left = sorted(path.name for path in tmp_path.iterdir())
    assert len(left) == 2 * 3 + 1, left  # two saves, and the marker of the last


@pytest.mark.parametrize("rank", [0, 2])
def test_a_refusal_on_the_callers_thread_reaches_all_ranks(tmp_path: Path, rank: int) -> None:
    """A rank that has no room fails the save for all, at once (O4, E4)."""
    answers = run_ranks(World(folder=tmp_path, saves=[Save(errors={rank: "refuse"}), Save()]))
    others = [answer for index, answer in enumerate(answers) if index != rank]
    assert ended_alike(others) == {rank: "QueueFullError: no room"}
    assert slowest(others) < 1 + SLACK_SECONDS
    assert ended_alike(answers, 1) is None


@pytest.mark.parametrize("rank", [0, 1])
def test_a_late_rank_fails_the_save(tmp_path: Path, rank: int) -> None:
    """Nobody waits longer than the bound for a rank that does not come, and it learns of it when it does (E5)."""
    answers = run_ranks(World(folder=tmp_path, saves=[Save(errors={rank: "late"}), Save()]))
    assert ended_alike(answers) == {rank: "did not begin this save within 3 s"}
    assert slowest(answers) < 3.5 + SLACK_SECONDS
    assert ended_alike(answers, 1) is None


@pytest.mark.parametrize("rank", [0, 1])
def test_a_loop_that_hangs_is_silent(tmp_path: Path, rank: int) -> None:
    """A rank whose event loop stands still ends the save for all within the bound, and is told when it goes on (E5)."""
    saves = [Save(hangs={rank: 5.0}), Save()]
    answers = run_ranks(World(folder=tmp_path, saves=saves, lateness_seconds=20.0))
    assert ended_alike(answers) == {rank: SILENT}
    assert all(
        answer is not None and answer[0].seconds < (5 if index == rank else 2.5) + SLACK_SECONDS
        for index, answer in enumerate(answers)
    )
    assert ended_alike(answers, 1) is None


@pytest.mark.parametrize("step", ["begun", "write", "written"])
def test_a_killed_rank_fails_the_save(tmp_path: Path, step: str) -> None:
    """A rank that is killed ends the save for all others within the silence bound, unless it had done its part (E5)."""
    answers = run_ranks(World(folder=tmp_path, saves=[Save(kills={1: step})], trains=False))
    assert answers[1] is None
    failures = ended_alike(answers)
    if step == "written":  # all its bytes are durable, and nobody waits for it any more
        assert failures is None
        assert (tmp_path / "metadata").exists()
    else:
        assert failures == {1: SILENT}
        assert not (tmp_path / "metadata").exists()
    assert slowest(answers) < 1.0 + 2.5 + SLACK_SECONDS


@pytest.mark.parametrize("is_host_rank_0", [False, True], ids=["a launcher's store", "its own store"])
@pytest.mark.parametrize("step", ["begun", "plan", "write", "commit", "committed"])
def test_a_killed_coordinator_ends_the_save(tmp_path: Path, step: str, is_host_rank_0: bool) -> None:
    """Rank 0 is killed, with or without the store: the others end alike, as storage has it, in time (E4, E5)."""
    world = World(folder=tmp_path, saves=[Save(kills={0: step})], is_host_rank_0=is_host_rank_0, trains=False)
    answers = run_ranks(world)
    assert answers[0] is None
    failures = ended_alike(answers)
    if step == "committed":
        assert failures is None
    else:
        assert failures is not None
        assert set(failures) == {0}
        assert not (tmp_path / "metadata").exists()
    # Who had not heard of rank 0 yet, in the one second that it lived, waits as for one that is late.
    assert slowest(answers) < 1.0 + (3 if step == "begun" else 2) + 0.5 + SLACK_SECONDS
