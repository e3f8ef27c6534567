"""The rules of the queue, one by one, played by hand: no thread, no storage, no clock."""

from __future__ import annotations

import pytest

from async_ckpt.queue import Admit, Cancel, Drop, Kind, Phase, Refuse, Start, Supersede
from tests.support import Play, lane

# -- rule 1: admission


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


# -- rule 2: order


def test_one_location_is_in_order() -> None:
    """Operations on one location run one after the other, as they came (O1)."""
    play, of = Play(), lane(concurrent=9)
    first, load, second = play.save(of, "a"), play.load(of, "a"), play.save(of, "a")
    assert (load.phase, second.phase) == (Phase.QUEUED, Phase.QUEUED)
    play.end(first)
    assert (load.phase, second.phase) == (Phase.RUNNING, Phase.QUEUED)
    play.withdraw(load)
    assert second.phase is Phase.RUNNING


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


# -- rule 3: removals


def test_removal_cancels_a_queued_save() -> None:
    """A removal ends a queued save of its location at once (O3)."""
    play, of = Play(), lane()
    play.save(of, "a")
    queued = play.save(of, "b")
    removal = play.remove(of, "b")
    assert Cancel(queued, removal) in play.actions


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


# -- rule 4: inheritance


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


# -- rule 5: signal handlers


def test_a_handler_may_save_past_every_bound() -> None:
    """A save that interrupted a save on its own thread is admitted at once: no place can come free before (L1)."""
    play, of = Play(limit=10), lane(depth=1)
    interrupted = play.save(of, "a", thread=7, nbytes=10, stage=False)
    nested = play.save(of, "b", thread=7, nbytes=10)
    assert nested.phase is Phase.RUNNING
    play.end(nested)
    play.stage(interrupted)
    assert interrupted.phase is Phase.RUNNING


def test_a_handler_may_save_while_its_thread_waits_for_admission() -> None:
    """So is one that interrupted a save which waits for a place; the interrupted one goes on waiting (L1)."""
    play, of = Play(), lane(depth=1)
    running = play.save(of, "a")
    waiting = play.save(of, "b", thread=7)
    nested = play.save(of, "c", thread=7)
    assert (waiting.phase, nested.phase) == (Phase.WAITING, Phase.QUEUED)
    play.end(running)
    play.end(nested)
    assert waiting.phase is Phase.STAGING


def test_another_thread_is_not_urgent() -> None:
    """Only the thread that was interrupted passes the bounds (B1)."""
    play, of = Play(), lane(depth=1)
    play.save(of, "a", thread=7, stage=False)
    assert play.save(of, "b", thread=8).phase is Phase.WAITING


def test_a_handler_does_not_wait_for_what_it_interrupted() -> None:
    """A save, a load and a removal in a handler pass the interrupted save of the same location by (L1)."""
    play, of = Play(), lane()
    interrupted = play.save(of, "a", thread=7, stage=False)
    nested = play.save(of, "a", thread=7)
    assert nested.phase is Phase.RUNNING
    play.end(nested)
    load = play.load(of, "a", thread=7)
    assert load.phase is Phase.RUNNING
    play.withdraw(load)
    removal = play.remove(of, "a", thread=7)
    assert removal.phase is Phase.RUNNING
    play.end(removal)
    play.stage(interrupted)
    assert interrupted.phase is Phase.RUNNING


def test_what_was_passed_by_does_not_run_beside_it() -> None:
    """The interrupted save, once staged, still waits for a running operation of its location (O1, L1)."""
    play, of = Play(), lane(concurrent=9)
    interrupted = play.save(of, "a", thread=7, stage=False)
    nested = play.save(of, "a", thread=7)
    play.stage(interrupted)
    assert (nested.phase, interrupted.phase) == (Phase.RUNNING, Phase.QUEUED)
    play.end(nested)
    assert interrupted.phase is Phase.RUNNING


def test_a_handler_may_load_what_its_thread_is_loading() -> None:
    """A load that interrupted a load of the same location does not wait for it (L1)."""
    play, of = Play(), lane()
    outer = play.load(of, "a", thread=7)
    inner = play.load(of, "a", thread=7)
    assert (outer.phase, inner.phase) == (Phase.RUNNING, Phase.RUNNING)


# -- what it decides is all it does


def test_deciding_changes_nothing() -> None:
    """The queue returns what to do and leaves the doing to its caller: asked again, it says the same."""
    play, of = Play(), lane()
    op = play.add(of, Kind.SAVE, "a")
    op.phase = Phase.QUEUED
    first, again = play.queue.decide(lambda _: True), play.queue.decide(lambda _: True)
    assert first == again == Start(op)
    assert op.phase is Phase.QUEUED


def test_nothing_to_do_is_none() -> None:
    """An empty queue decides nothing."""
    play = Play()
    assert play.queue.decide(lambda _: True) is None
    assert not [action for action in play.actions if isinstance(action, Admit)]


def test_a_save_supersedes_none_of_another_service() -> None:
    """A queued save of another service stays: that service's removals would not wait for the one in its place (D3)."""
    play, of = Play(), lane(overflow="supersede")
    other = lane(depth=1, overflow="supersede")
    play.load(of, "a")
    queued = play.save(of, "a")
    full = play.save(other, "b")
    waiting = play.save(other, "a")
    assert (full.phase, queued.phase, waiting.phase) == (Phase.RUNNING, Phase.QUEUED, Phase.WAITING)


# -- rule 5: links


def test_a_link_waits_for_what_it_leads_to() -> None:
    """A link runs once the newest save of its target is durable, not before, and waits for no other location."""
    play, of = Play(), lane(depth=4, concurrent=2)
    play.save(of, "other")
    save = play.save(of, "new")
    link = play.link(of, "last", "new")
    assert link.phase is Phase.QUEUED
    play.end(save)
    assert link.phase is Phase.RUNNING


def test_a_link_to_what_failed_is_dropped() -> None:
    """A link whose save failed is not made, and nothing that it would have replaced is removed afterwards (D3)."""
    play, of = Play(), lane(depth=4)
    save = play.save(of, "new")
    link = play.link(of, "last", "new")
    removal = play.remove(of, "old")
    play.end(save, ok=False)
    assert Drop(link, save.id) in play.actions
    assert play.actions[-1] == Drop(removal, link.id)


def test_a_link_to_what_has_failed_already_is_dropped() -> None:
    """A save that failed before the link came counts as much as one that fails later."""
    play, of = Play(), lane(depth=4)
    save = play.save(of, "new")
    play.end(save, ok=False)
    link = play.link(of, "last", "new")
    assert play.actions[-1] == Drop(link, save.id)


def test_a_removal_waits_for_the_link() -> None:
    """What a link has led to so far is removed only once it leads elsewhere (D3)."""
    play, of = Play(), lane(depth=4)
    save = play.save(of, "new")
    link = play.link(of, "last", "new")
    removal = play.remove(of, "old")
    play.end(save)
    assert (link.phase, removal.phase) == (Phase.RUNNING, Phase.QUEUED)
    play.end(link)
    assert removal.phase is Phase.RUNNING


def test_a_link_takes_no_place_of_a_save() -> None:
    """A link comes in at once, whatever the queue's depth, and costs no save its place (B1)."""
    play, of = Play(), lane(depth=2, concurrent=2)
    save = play.save(of, "new")
    play.link(of, "last", "new")
    following = play.save(of, "newer")
    assert (save.phase, following.phase) == (Phase.RUNNING, Phase.RUNNING)


def test_a_link_inherits_from_the_superseding_save() -> None:
    """A link to a superseded save waits for the one that took its place."""
    play, of = Play(), lane(depth=2, overflow="supersede")
    running = play.save(of, "a")
    play.save(of, "new")
    link = play.link(of, "last", "new")
    newer = play.save(of, "new")
    play.end(running)
    assert link.phase is Phase.QUEUED
    play.end(newer)
    assert link.phase is Phase.RUNNING


def test_a_save_that_a_link_leads_to_is_not_cancelled() -> None:
    """A removal of what a link leads to lets the save run, then the link, and then removes."""
    play, of = Play(), lane(depth=4)
    play.load(of, "new")
    save = play.save(of, "new")
    link = play.link(of, "last", "new")
    removal = play.remove(of, "new")
    assert {save.phase, link.phase, removal.phase} == {Phase.QUEUED}
