"""Rule 2 of the queue: one location is in order, others do not wait (O1, O2); and deciding is all it does."""

from __future__ import annotations

from async_ckpt.engine.queue import Admit, Kind, Phase, Start
from tests.support import Play, lane


def test_one_location_is_in_order() -> None:
    """Operations on one location run one after the other, as they came (O1)."""
    play, of = Play(), lane(concurrent=9)
    first, load, second = play.save(of, "a"), play.load(of, "a"), play.save(of, "a")
    assert (load.phase, second.phase) == (Phase.QUEUED, Phase.QUEUED)
    play.end(first)
    assert (load.phase, second.phase) == (Phase.RUNNING, Phase.QUEUED)
    play.withdraw(load)
    assert second.phase is Phase.RUNNING


def test_loads_of_one_location_run_side_by_side() -> None:
    """Loads do not wait for each other; a save between two of them waits for the first and holds the second (O1)."""
    play, of = Play(), lane()
    first, second = play.load(of, "a"), play.load(lane(), "a")
    save, last = play.save(of, "a"), play.load(of, "a")
    phases = [op.phase for op in (first, second, save, last)]
    assert phases == [Phase.RUNNING, Phase.RUNNING, Phase.QUEUED, Phase.QUEUED]
    play.withdraw(first)
    assert [op.phase for op in (save, last)] == [Phase.QUEUED, Phase.QUEUED]
    play.withdraw(second)
    assert [op.phase for op in (save, last)] == [Phase.RUNNING, Phase.QUEUED]


def test_loads_that_wait_for_one_save_start_together() -> None:
    """When the save ends that several loads of its location wait for, all of them start (O2)."""
    play, of = Play(), lane()
    save = play.save(of, "a")
    loads = [play.load(of, "a") for _ in range(3)]
    play.end(save)
    assert [load.phase for load in loads] == [Phase.RUNNING] * 3


def test_one_location_is_in_order_across_services() -> None:
    """A save through one service waits for another service's save of the same location (O1)."""
    play = Play()
    first, second = play.save(lane(), "a"), play.save(lane(), "a")
    assert second.phase is Phase.QUEUED
    play.end(first)
    assert second.phase is Phase.RUNNING


def test_order_is_that_of_acceptance_not_of_staging() -> None:
    """A save whose snapshot is complete first still waits for an earlier save of the location (O1)."""
    play, of = Play(), lane(concurrent=9)
    slow, fast = play.save(of, "a", stage=False), play.save(of, "a")
    assert fast.phase is Phase.QUEUED
    play.stage(slow)
    assert (slow.phase, fast.phase) == (Phase.RUNNING, Phase.QUEUED)


def test_other_locations_do_not_wait() -> None:
    """A load waits for saves of its location and for no others (O2)."""
    play, of = Play(), lane()
    play.save(of, "a")
    play.save(of, "b")
    assert play.load(of, "c").phase is Phase.RUNNING


def test_an_unstaged_save_of_another_location_does_not_block_the_queue() -> None:
    """While one thread takes its snapshot, another thread's save is written (B1)."""
    play, of = Play(), lane()
    play.save(of, "a", stage=False)
    assert play.save(of, "b").phase is Phase.RUNNING


def test_full_services_do_not_wait_for_each_other_in_a_circle() -> None:
    """A save that waits for a place keeps no other service's accepted save waiting: each could hold the place that the
    other needs (B1, O1).
    """
    play, one, two = Play(), lane(depth=1), lane(depth=1)
    holds_one = play.save(one, "c", stage=False)
    play.save(one, "b")
    holds_two = play.save(two, "b")
    play.save(two, "c")
    assert holds_two.phase is Phase.RUNNING
    play.stage(holds_one)
    assert holds_one.phase is Phase.RUNNING


def test_deciding_changes_nothing() -> None:
    """The queue returns what to do and leaves the doing to its caller: asked again, it says the same."""
    play, of = Play(), lane()
    op = play.add(of, Kind.SAVE, "a")
    op.phase = Phase.QUEUED
    first, again = (
        play.queue.decide(lambda op, instead_of: True),
        play.queue.decide(lambda op, instead_of: True),
    )
    assert first == again == Start(op)
    assert op.phase is Phase.QUEUED


def test_nothing_to_do_is_none() -> None:
    """An empty queue decides nothing."""
    play = Play()
    assert play.queue.decide(lambda op, instead_of: True) is None
    assert not [action for action in play.actions if isinstance(action, Admit)]
