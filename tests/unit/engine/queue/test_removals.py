"""Rules 3 and 4 of the queue: what a removal cancels, waits for and inherits (O3, D3)."""

from __future__ import annotations

from async_ckpt.engine.queue import Cancel, Drop, Phase, Start, Supersede
from tests.support import Play, lane


def test_removal_cancels_a_queued_save() -> None:
    """A removal ends a queued save of its location at once (O3)."""
    play, of = Play(), lane()
    play.save(of, "a")
    queued = play.save(of, "b")
    removal = play.remove(of, "b")
    assert Cancel(queued, removal) in play.actions


def test_removal_cancels_every_queued_save_of_its_location() -> None:
    """Several queued saves of one location are all ended by a removal that comes after them (O3)."""
    play, of = Play(), lane()
    play.save(of, "a")
    queued = [play.save(of, "b") for _ in range(3)]
    removal = play.remove(of, "b")
    cancelled = [action for action in play.actions if isinstance(action, Cancel)]
    assert cancelled == [Cancel(save, removal) for save in reversed(queued)]


def test_removal_waits_for_a_running_save() -> None:
    """A removal of a location that is being saved waits, then deletes (O3)."""
    play, of = Play(), lane()
    running = play.save(of, "a")
    removal = play.remove(of, "a")
    assert removal.phase is Phase.QUEUED
    play.end(running)
    assert removal.phase is Phase.RUNNING


def test_removal_does_not_cancel_what_a_load_waits_for() -> None:
    """A load between the save and the removal keeps the save (O1)."""
    play, of = Play(), lane()
    first = play.save(of, "a")
    queued, load = play.save(of, "b"), play.load(of, "b")
    removal = play.remove(of, "b")
    assert not any(isinstance(action, Cancel) for action in play.actions)
    play.end(first)
    play.end(queued)
    assert (load.phase, removal.phase) == (Phase.RUNNING, Phase.QUEUED)


def test_removal_waits_for_all_saves_before_it() -> None:
    """A removal runs when every save accepted before it is durable, whatever its location (D3)."""
    play, of = Play(), lane(concurrent=2)
    new, other = play.save(of, "new"), play.save(of, "other")
    removal = play.remove(of, "old")
    later = play.save(of, "later", stage=False)
    play.end(new)
    assert removal.phase is Phase.QUEUED
    play.end(other)
    assert removal.phase is Phase.RUNNING
    assert later.phase is Phase.STAGING


def test_removal_does_not_wait_for_another_service() -> None:
    """A removal waits for the saves of its own service (D3)."""
    play = Play()
    play.save(lane(), "new")
    assert play.remove(lane(), "old").phase is Phase.RUNNING


def test_removal_is_dropped_when_a_save_before_it_fails() -> None:
    """A failed save drops the removals that waited for it, so the old checkpoint stays (D3)."""
    play, of = Play(), lane()
    new = play.save(of, "new")
    removal = play.remove(of, "old")
    play.end(new, ok=False)
    assert play.actions[-1] == Drop(removal, new.id)


def test_removal_is_dropped_when_a_save_before_it_had_failed_already() -> None:
    """It makes no difference whether the failure comes before or after the request to remove (D3)."""
    play, of = Play(), lane()
    play.end(play.save(of, "old"))
    new = play.save(of, "new")
    play.end(new, ok=False)
    removal = play.remove(of, "old")
    assert play.actions[-1] == Drop(removal, new.id)


def test_a_newer_durable_save_makes_up_for_a_failure() -> None:
    """Once a newer checkpoint is durable, older ones may go; that newest one may not (D3)."""
    play, of = Play(), lane()
    play.end(play.save(of, "old"))
    failed = play.save(of, "failed")
    play.end(failed, ok=False)
    play.end(play.save(of, "new"))
    assert play.remove(of, "old").phase is Phase.RUNNING
    newest = play.remove(of, "new")
    assert play.actions[-1] == Drop(newest, failed.id)


def test_a_rotation_goes_on_after_a_failure() -> None:
    """What failed once and was given up drops no removal for ever: the save that is under way makes up for it (D3)."""
    play, of = Play(), lane()
    play.end(play.save(of, "failed"), ok=False)
    play.end(play.save(of, "1"))
    for number in range(2, 5):
        newer = play.save(of, f"{number}")
        older = play.remove(of, f"{number - 1}")
        assert older.phase is Phase.QUEUED
        play.end(newer)
        assert older.phase is Phase.RUNNING
        play.end(older)
    assert not any(isinstance(action, Drop) for action in play.actions)


def test_a_rotation_stops_where_nothing_makes_up_for_a_failure() -> None:
    """If the save that was to make up for a failure fails, too, the last checkpoint stays (D3)."""
    play, of = Play(), lane()
    play.end(play.save(of, "failed"), ok=False)
    play.end(play.save(of, "last"))
    newer = play.save(of, "newer")
    removal = play.remove(of, "last")
    play.end(newer, ok=False)
    assert play.actions[-1] == Drop(removal, newer.id)


def test_a_location_saved_again_has_not_failed() -> None:
    """A second save of the location that failed, once durable, ends the matter (D3)."""
    play, of = Play(), lane()
    play.end(play.save(of, "a"), ok=False)
    play.end(play.save(of, "a"))
    assert play.remove(of, "a").phase is Phase.RUNNING


def test_a_failed_location_that_is_given_up_counts_no_longer() -> None:
    """After its own removal was asked for, a failed save stands in no other removal's way (D3)."""
    play, of = Play(), lane()
    play.end(play.save(of, "old"))
    failed = play.save(of, "failed")
    play.end(failed, ok=False)
    assert isinstance(play.actions[-1], Start)
    removal = play.remove(of, "failed")
    assert play.actions[-1] == Drop(removal, failed.id)
    assert play.remove(of, "old").phase is Phase.RUNNING


def test_a_withdrawn_save_drops_the_removals_after_it() -> None:
    """An accepted save whose caller was interrupted counts as failed for the removals that wait (D3)."""
    play, of = Play(), lane()
    staging = play.save(of, "new", stage=False)
    removal = play.remove(of, "old")
    play.withdraw(staging)
    assert play.actions[-1] == Drop(removal, staging.id)


def test_a_save_withdrawn_before_admission_is_nothing() -> None:
    """A save whose caller was interrupted while it waited for room has never been accepted (D3, B1)."""
    play, of = Play(), lane(depth=1)
    running = play.save(of, "a")
    waiting = play.save(of, "b")
    play.withdraw(waiting)
    play.end(running)
    assert play.remove(of, "a").phase is Phase.RUNNING


def test_removal_inherits_from_the_superseding_save() -> None:
    """A removal that waited for a superseded save waits for the one that took its place (D3)."""
    play, of = Play(), lane(depth=2, overflow="supersede")
    running = play.save(of, "a")
    play.save(of, "new")
    removal = play.remove(of, "old")
    newer = play.save(of, "new")
    play.end(running)
    assert (newer.phase, removal.phase) == (Phase.RUNNING, Phase.QUEUED)
    play.end(newer, ok=False)
    assert play.actions[-1] == Drop(removal, newer.id)


def test_removal_inherits_from_the_cancelling_removal() -> None:
    """A removal that waited for a cancelled save waits for what the cancelling removal waits for (D3)."""
    play, of = Play(), lane()
    running = play.save(of, "running")
    play.save(of, "queued")
    old = play.remove(of, "old")
    play.remove(of, "queued")
    assert old.phase is Phase.QUEUED
    play.end(running, ok=False)
    assert Drop(old, running.id) in play.actions


def test_a_save_supersedes_only_if_it_is_then_admitted() -> None:
    """Where the memory of the queued save would not do, the new save waits, and the queued one is written (D4, B1)."""
    play, of = Play(limit=10), lane(depth=10, overflow="supersede")
    running = play.save(of, "a", nbytes=6)
    queued = play.save(of, "new", nbytes=4)
    newer = play.save(of, "new", nbytes=9)
    assert (queued.phase, newer.phase) == (Phase.QUEUED, Phase.WAITING)
    play.end(running)
    assert queued.phase is Phase.RUNNING
    play.end(queued)
    assert newer.phase is Phase.STAGING


def test_a_superseding_save_fits_in_the_memory_of_the_superseded() -> None:
    """The memory that a superseded save gives back counts for its successor (B1)."""
    play, of = Play(limit=10), lane(depth=10, overflow="supersede")
    play.save(of, "a", nbytes=6)
    queued = play.save(of, "new", nbytes=4)
    newer = play.save(of, "new", nbytes=3)
    assert Supersede(queued, newer) in play.actions
    assert newer.phase is Phase.QUEUED


def test_superseding_never_waits_in_a_circle_through_memory() -> None:
    """A removal never waits for a save that waits for memory which a save behind the removal holds (D4)."""
    play, of = Play(limit=10), lane(depth=4, overflow="supersede")
    running = play.save(of, "a", nbytes=1)
    superseded = play.save(of, "c", nbytes=4)
    removal = play.remove(of, "b")
    behind = play.save(of, "b", nbytes=4)
    newer = play.save(of, "c", nbytes=8)
    for op in (running, superseded, removal, behind):
        assert op.phase is Phase.RUNNING
        play.end(op)
    play.stage(newer)
    assert newer.phase is Phase.RUNNING


def test_inheritance_never_waits_in_a_circle() -> None:
    """A queued save is not cancelled where a removal would inherit a save that itself waits for that removal (D3)."""
    play, of = Play(), lane()
    running = play.save(of, "a")
    kept = play.save(of, "b")
    removal = play.remove(of, "c")
    after_removal = play.save(of, "c")
    play.remove(of, "b")
    assert not any(isinstance(action, Cancel) for action in play.actions)
    for op in (running, kept, removal, after_removal):
        play.end(op)


def test_a_save_supersedes_none_of_another_service() -> None:
    """A queued save of another service stays: that service's removals would not wait for the one in its place (D3)."""
    play, of = Play(), lane(overflow="supersede")
    other = lane(depth=1, overflow="supersede")
    play.load(of, "a")
    queued = play.save(of, "a")
    full = play.save(other, "b")
    waiting = play.save(other, "a")
    assert (full.phase, queued.phase, waiting.phase) == (Phase.RUNNING, Phase.QUEUED, Phase.WAITING)
