"""Rule 2 of the queue for locations that are not the same: one in the other, and links on the way (O1)."""

from __future__ import annotations

import pytest

from async_ckpt.engine.queue import Admit, Cancel, Drop, Kind, Op, Phase, Supersede
from tests.support import Play, lane


def test_a_save_waits_for_the_removal_of_the_directory_it_lies_in() -> None:
    """What is accepted after the removal of a directory is written after it, and so is still there (O1)."""
    play, of = Play(), lane()
    running = play.save(of, "f:/run/old.ckpt")
    removal = play.remove(of, "f:/run")
    new = play.save(of, "f:/run/deep/new.ckpt")
    other = play.save(of, "f:/running/new.ckpt")
    assert (removal.phase, new.phase) == (Phase.QUEUED, Phase.QUEUED)
    play.end(running)
    assert (removal.phase, new.phase, other.phase) == (Phase.RUNNING, Phase.QUEUED, Phase.RUNNING)
    play.end(removal)
    play.end(other)
    assert new.phase is Phase.RUNNING


def test_the_removal_of_a_directory_waits_for_what_is_in_it() -> None:
    """Saves and loads in a directory that came before its removal end first, those of other services too (O1)."""
    play, of, other = Play(), lane(), lane()
    save = play.save(other, "f:/run/a.ckpt")
    load = play.load(of, "f:/run/b.ckpt")
    removal = play.remove(of, "f:/run")
    assert removal.phase is Phase.QUEUED
    play.end(save)
    assert removal.phase is Phase.QUEUED
    play.withdraw(load)
    assert removal.phase is Phase.RUNNING


def test_a_load_waits_for_the_removal_of_its_directory() -> None:
    """A load finds nothing where the directory was to be removed before (O1)."""
    play, of = Play(), lane()
    removal = play.remove(of, "f:/run")
    load = play.load(of, "f:/run/a.ckpt")
    assert (removal.phase, load.phase) == (Phase.RUNNING, Phase.QUEUED)
    play.end(removal)
    assert load.phase is Phase.RUNNING


def test_neighbours_do_not_wait_for_each_other() -> None:
    """Names of which one begins with the other, but that do not lie in each other, have nothing to do with another."""
    play, of = Play(), lane(concurrent=9)
    ops = [play.save(of, key) for key in ("f:/run", "f:/run.ckpt", "f:/run-2/a", "f:/ru", "g:/run/a")]
    assert {op.phase for op in ops} == {Phase.RUNNING}


def test_a_removal_cancels_no_save_below_it() -> None:
    """The removal of a directory lets a queued save in it run first: nobody said that this one is not wanted (O3)."""
    play, of = Play(), lane()
    running = play.save(of, "f:/other")
    queued = play.save(of, "f:/run/a")
    removal = play.remove(of, "f:/run")
    assert not any(isinstance(action, Cancel) for action in play.actions)
    for op in (running, queued, removal):
        assert op.phase is Phase.RUNNING
        play.end(op)


def test_what_failed_in_a_removed_directory_counts_no_longer() -> None:
    """A failed save stands in no removal's way once the directory that it was to lie in has been given up (D3)."""
    play, of = Play(), lane()
    play.end(play.save(of, "f:/old"))
    failed = play.save(of, "f:/run/a")
    play.end(failed, ok=False)
    removal = play.remove(of, "f:/run")
    assert play.actions[-1] == Drop(removal, failed.id)
    assert play.remove(of, "f:/old").phase is Phase.RUNNING


def test_what_lies_in_a_removed_directory_makes_up_for_nothing() -> None:
    """A checkpoint in a directory that is being removed is not what another removal may rely on (D3)."""
    play, of = Play(), lane()
    play.end(play.save(of, "f:/old"))
    failed = play.save(of, "f:/failed")
    play.end(failed, ok=False)
    play.end(play.save(of, "f:/run/new"))
    whole = play.remove(of, "f:/run")
    assert play.actions[-1] == Drop(whole, failed.id)
    play.end(play.save(of, "f:/newer"))
    whole = play.remove(of, "f:/run")
    last = play.remove(of, "f:/newer")
    assert (whole.phase, play.actions[-1]) == (Phase.RUNNING, Drop(last, failed.id))


def test_a_load_holds_the_links_on_its_way() -> None:
    """A link is neither removed nor made to lead elsewhere while a load goes through it (O1)."""
    play, of = Play(), lane()
    load = play.load(of, "f:/best", through=("f:/last",))
    link, removal = play.link(of, "f:/last", "f:/new"), play.remove(of, "f:/last")
    assert (load.phase, link.phase, removal.phase) == (Phase.RUNNING, Phase.QUEUED, Phase.QUEUED)
    play.withdraw(load)
    assert link.phase is Phase.RUNNING


def test_a_load_waits_for_the_links_on_its_way() -> None:
    """A load through a link runs after what was to be done to the link before (O1)."""
    play, of = Play(), lane()
    removal = play.remove(of, "f:/run")
    load = play.load(of, "f:/best", through=("f:/run/last",))
    assert (removal.phase, load.phase) == (Phase.RUNNING, Phase.QUEUED)
    play.end(removal)
    assert load.phase is Phase.RUNNING


def test_the_newest_checkpoint_may_go_where_another_newer_than_the_failure_stays() -> None:
    """One failure that is never made good does not keep every later checkpoint for ever (D3, rule 3)."""
    play, of = Play(), lane()
    play.end(play.save(of, "failed"), ok=False)
    play.end(play.save(of, "kept"))
    for number in range(20):
        play.end(play.save(of, f"{number}"))
        removal = play.remove(of, f"{number}")
        assert removal.phase is Phase.RUNNING, play.actions[-1]
        play.end(removal)
    last = play.remove(of, "kept")
    assert isinstance(play.actions[-1], Drop), last


def test_a_checkpoint_that_another_service_removed_makes_up_for_nothing() -> None:
    """What any service of the process has removed is not what a removal may rely on (D3)."""
    play, of, other = Play(), lane(), lane()
    failed = play.save(of, "failed")
    play.end(failed, ok=False)
    play.end(play.save(of, "a"))
    play.end(play.save(of, "b"))
    play.end(play.remove(other, "b"))
    removal = play.remove(of, "a")
    assert play.actions[-1] == Drop(removal, failed.id)


def test_a_save_that_took_anothers_place_and_is_refused_counts_as_failed() -> None:
    """Where the system has no memory for a save that superseded another, removals that waited are dropped (D3)."""
    play, of = Play(), lane(depth=2, overflow="supersede")
    running = play.save(of, "a")
    play.save(of, "new")
    removal = play.remove(of, "old")
    newer = Op(id=99, lane=of, kind=Kind.SAVE, key="new", phase=Phase.WAITING, thread=-99)
    play.queue.add(newer)
    superseding = play.queue.decide(lambda op, instead_of: True)
    assert isinstance(superseding, Supersede)
    play.carry_out(superseding)
    assert play.queue.decide(lambda op, instead_of: True) == Admit(newer)
    play.queue.withdraw(newer)
    play.settle()
    assert play.actions[-1] == Drop(removal, newer.id)
    play.end(running)


@pytest.mark.parametrize("kind", list(Kind))
def test_deep_names(kind: Kind) -> None:
    """An operation knows its relations however deep its name is."""
    play, of = Play(), lane()
    removal = play.remove(of, "f:/0")
    op = play.add(of, kind, "f:/" + "/".join(map(str, range(200))), target="f:/x")
    if op.phase is Phase.STAGING:
        play.stage(op)
    assert op.phase is Phase.QUEUED
    play.end(removal)
    assert op.phase is Phase.RUNNING


def test_whom_a_lane_may_wait_for() -> None:
    """Other services count where one of their operations is on a related location, or in the same group; else not."""
    play, of, above, base, other = Play(), lane(), lane(), lane(), lane()
    play.save(of, "f:/run/a", group="base")
    assert play.queue.related_lanes(of) == {of}
    play.remove(above, "f:/run")
    play.save(base, "f:/else", group="base")
    play.save(other, "f:/other")
    assert play.queue.related_lanes(of) == {of, above, base}
    assert play.queue.related_lanes(other) == {other}
