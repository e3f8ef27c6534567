"""Rule 1 of the queue: places and memory, first come, first served (B1)."""

from __future__ import annotations

import pytest

from async_ckpt.engine.queue import Phase, Refuse, Supersede
from tests.support import Play, lane


def test_admission_is_bounded_by_depth() -> None:
    """No more than queue_depth saves are accepted; the next comes in when one has ended (B1)."""
    play, of = Play(), lane(depth=2)
    first, second, third = (play.save(of, key) for key in "abc")
    assert (first.phase, second.phase, third.phase) == (Phase.RUNNING, Phase.QUEUED, Phase.WAITING)
    play.end(first)
    assert (second.phase, third.phase) == (Phase.RUNNING, Phase.STAGING)


def test_admission_is_bounded_by_memory() -> None:
    """A save whose memory does not fit waits until enough has come back (B1)."""
    play, of = Play(limit=10), lane()
    first, second = play.save(of, "a", nbytes=6), play.save(of, "b", nbytes=6)
    assert second.phase is Phase.WAITING
    play.end(first)
    assert second.phase is Phase.STAGING


def test_oversize_is_admitted_alone() -> None:
    """A save larger than the limit waits until nothing else is held, and runs then (B1)."""
    play, of = Play(limit=10), lane()
    small, huge = play.save(of, "a", nbytes=1), play.save(of, "b", nbytes=99)
    assert huge.phase is Phase.WAITING
    play.end(small)
    assert huge.phase is Phase.STAGING


def test_admission_is_first_come_first_served() -> None:
    """A small save does not overtake a large one that waits for memory, so no save waits for ever (B1)."""
    play, of = Play(limit=10), lane()
    first = play.save(of, "a", nbytes=6)
    large, small = play.save(of, "b", nbytes=8), play.save(of, "c", nbytes=3)
    assert (large.phase, small.phase) == (Phase.WAITING, Phase.WAITING)
    play.end(first)
    assert (large.phase, small.phase) == (Phase.STAGING, Phase.WAITING)


def test_lanes_do_not_wait_for_each_other() -> None:
    """A full service does not keep another one's saves out (B1)."""
    play, full, empty = Play(), lane(depth=1), lane(depth=1)
    play.save(full, "a")
    assert play.save(full, "b").phase is Phase.WAITING
    assert play.save(empty, "c").phase is Phase.RUNNING


@pytest.mark.parametrize(("limit", "lacking"), [(10**9, "queue"), (5, "memory")])
def test_overflow_raise_refuses(limit: int, lacking: str) -> None:
    """With overflow="raise" a save for which there is no room is refused at once, and says what lacks (B1)."""
    play = Play(limit=limit)
    of = lane(depth=1 if lacking == "queue" else 10, overflow="raise")
    play.save(of, "a", nbytes=4)
    refused = play.save(of, "b", nbytes=4)
    assert play.actions[-1] == Refuse(refused, lacking)  # type: ignore[arg-type]
    assert len(play.queue) == 1


def test_a_refused_save_is_no_failure() -> None:
    """A save that was never accepted does not stand in the way of removals (D3)."""
    play, of = Play(), lane(depth=1, overflow="raise")
    running = play.save(of, "a")
    play.save(of, "b")
    play.end(running)
    assert play.remove(of, "a").phase is Phase.RUNNING


def test_overflow_supersede_replaces_a_queued_save() -> None:
    """With overflow="supersede" a queued save of the same location gives its place to the new one (B1)."""
    play, of = Play(), lane(depth=2, overflow="supersede")
    play.save(of, "a")
    queued = play.save(of, "b")
    newer = play.save(of, "b")
    assert Supersede(queued, newer) in play.actions
    assert newer.phase is Phase.QUEUED


def test_overflow_supersede_waits_where_there_is_nothing_to_replace() -> None:
    """A running save, and one of another location, are never superseded: the new save waits (B1)."""
    play, of = Play(), lane(depth=2, overflow="supersede")
    play.save(of, "a")
    play.save(of, "b")
    assert play.save(of, "a").phase is Phase.WAITING
    assert play.save(of, "c").phase is Phase.WAITING


def test_a_save_that_is_counted_on_is_not_superseded() -> None:
    """A load between the queued save and the new one keeps the queued save (O1)."""
    play, of = Play(), lane(depth=2, overflow="supersede")
    play.save(of, "a")
    queued = play.save(of, "b")
    play.load(of, "b")
    assert play.save(of, "b").phase is Phase.WAITING
    assert queued.phase is Phase.QUEUED


def test_concurrent_saves_are_bounded() -> None:
    """No more than max_concurrent_saves of a service run at the same time (B2)."""
    play, of = Play(), lane(concurrent=2)
    saves = [play.save(of, key) for key in "abc"]
    assert [op.phase for op in saves] == [Phase.RUNNING, Phase.RUNNING, Phase.QUEUED]


def test_operations_of_one_group_exclude_each_other() -> None:
    """A base CheckpointIO's saves and removals of one file system run one at a time, in all services."""
    play = Play()
    first = play.save(lane(), "a", group="g")
    second, other = play.save(lane(), "b", group="g"), play.save(lane(), "c", group="h")
    removal = play.remove(lane(), "d", group="g")
    assert (second.phase, other.phase, removal.phase) == (Phase.QUEUED, Phase.RUNNING, Phase.QUEUED)
    play.end(first)
    assert (second.phase, removal.phase) == (Phase.RUNNING, Phase.QUEUED)
