"""Rule 5 of the queue: a second name waits for what it leads to, and removals wait for it (D3)."""

from __future__ import annotations

from async_ckpt.engine.queue import Drop, Phase
from tests.support import Play, lane


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
