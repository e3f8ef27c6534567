"""Rule 6 of the queue: nothing waits for what is suspended beneath it on its own thread (L1)."""

from __future__ import annotations

from async_ckpt.engine.queue import Phase
from tests.support import Play, lane


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


def test_a_link_does_not_wait_for_a_save_that_it_interrupted() -> None:
    """A handler may link to what its thread is about to save: the link leads to what was saved there before (L1)."""
    play, of = Play(), lane()
    play.end(play.save(of, "a"))
    interrupted = play.save(of, "a", thread=7, stage=False)
    link = play.link(of, "last", "a", thread=7)
    assert link.phase is Phase.RUNNING
    play.end(link)
    play.stage(interrupted)
    assert interrupted.phase is Phase.RUNNING


def test_a_handler_may_save_past_every_bound_in_a_load() -> None:
    """A save that interrupted a load is admitted at once: what fills the queue may wait for that load (L1)."""
    play, of = Play(), lane(depth=1)
    interrupted = play.load(of, "a", thread=7)
    behind = play.save(of, "a", thread=8)
    nested = play.save(of, "b", thread=7)
    assert (behind.phase, nested.phase) == (Phase.QUEUED, Phase.RUNNING)
    play.end(nested)
    play.withdraw(interrupted)
    assert behind.phase is Phase.RUNNING


def test_a_removal_of_another_waits_for_what_it_interrupted() -> None:
    """A handler deletes no checkpoint before the one that its thread is saving is durable (D3)."""
    play, of = Play(), lane()
    play.end(play.save(of, "old"))
    interrupted = play.save(of, "new", thread=7, stage=False)
    removal = play.remove(of, "old", thread=7)
    assert removal.phase is Phase.QUEUED
    assert play.queue.would_deadlock(removal, 7)
    play.stage(interrupted)
    assert not play.queue.would_deadlock(removal, 7)
    play.end(interrupted)
    assert removal.phase is Phase.RUNNING


def test_a_removal_of_what_it_lies_in_does_not() -> None:
    """A handler may remove the directory in which its thread is saving."""
    play, of = Play(), lane()
    play.save(of, "run/new", thread=7, stage=False)
    assert play.remove(of, "run", thread=7).phase is Phase.RUNNING


def test_held_up_by_way_of_others() -> None:
    """What waits for what waits for a suspended call is held up by it, too; on other threads nothing is."""
    play, of = Play(), lane()
    play.save(of, "a", thread=7, stage=False)
    behind = play.save(of, "a", thread=8)
    load = play.load(of, "a", thread=9)
    beside = play.save(of, "b", thread=8)
    assert play.queue.would_deadlock(behind, 7)
    assert play.queue.would_deadlock(load, 7)
    assert not play.queue.would_deadlock(load, 9)
    assert not play.queue.would_deadlock(beside, 7)


def test_what_passed_it_by_comes_first() -> None:
    """The interrupted save comes after what a handler did at its location: its call returned last (O1)."""
    for ask in (Play.save, Play.remove):
        play, of = Play(), lane(concurrent=1)
        elsewhere = play.save(of, "b")
        interrupted = play.save(of, "a", thread=7, stage=False)
        nested = ask(play, of, "a", thread=7)
        play.stage(interrupted)
        play.end(elsewhere)
        assert (nested.phase, interrupted.phase) == (Phase.RUNNING, Phase.QUEUED)
        play.end(nested)
        assert interrupted.phase is Phase.RUNNING


def test_what_cannot_pass_it_by_comes_after_it() -> None:
    """Behind another thread's save, which waits for the interrupted one, a handler's save is the last (O1)."""
    play, of = Play(), lane(concurrent=3)
    interrupted = play.save(of, "a", thread=7, stage=False)
    behind = play.save(of, "a", thread=8)
    nested = play.save(of, "a", thread=7)
    play.stage(interrupted)
    for op in (interrupted, behind, nested):
        assert op.phase is Phase.RUNNING
        play.end(op)


def test_a_removal_that_passed_it_by_waits_for_nothing_that_waits_for_it() -> None:
    """A handler's removals, of what else there is and of what is being saved, come to their end in any order (L1)."""
    play, of = Play(), lane(depth=2, concurrent=2)
    interrupted = play.save(of, "a", thread=7, stage=False)
    old = play.remove(of, "old", thread=7)
    again = play.save(of, "old", thread=7)
    nested = play.remove(of, "a", thread=7)
    play.stage(interrupted)
    for op in (nested, interrupted, old, again):
        assert op.phase is Phase.RUNNING
        play.end(op)
