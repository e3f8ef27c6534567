"""The coordinator where two things meet that random programs rarely bring together."""

from __future__ import annotations

from async_ckpt.sharded.agreement.coordinator import Coordinator
from async_ckpt.sharded.agreement.messages import Failed, Heartbeat, Ready, Verdict, Wrote
from async_ckpt.sharded.agreement.protocol import COMMIT, Bounds, Broadcast, Claim, Commit, PlanCache


def claiming() -> Coordinator:
    """Return a coordinator of two ranks that have written, which has just claimed the decision."""
    coordinator = Coordinator(1, save_id="run-1", world_size=2, plans=PlanCache(), bounds=Bounds(), now=0.0)
    for rank in range(2):
        coordinator.receive(Ready(rank, "s3://a", b"f", b"plan"))
    coordinator.tick(1.0)
    coordinator.planned({0: b"", 1: b""})
    coordinator.receive(Wrote(0))
    assert coordinator.tick(2.0) == []
    coordinator.receive(Wrote(1))
    assert coordinator.tick(3.0) == [Claim(COMMIT)]
    return coordinator


def test_who_comes_second_with_a_claim_does_not_commit() -> None:
    """Where a rank had given up first, nothing is committed, and all end with its failures (D5, E4)."""
    coordinator = claiming()
    assert coordinator.claimed({0: "silent"}) == [Broadcast(Verdict({0: "silent"}))]
    assert coordinator.committed() == []


def test_a_claim_without_an_answer_does_not_commit() -> None:
    """Where the store does not say who holds the claim, nothing is committed (D5)."""
    (told,) = claiming().claimed(None)
    assert isinstance(told, Broadcast)
    assert isinstance(told.message, Verdict)
    assert set(told.message.failures) == {0}


def test_a_failure_after_the_commit_began_counts_no_more() -> None:
    """A rank that gives up after the commit began undoes nothing: the commit decides (E4)."""
    coordinator = claiming()
    (commit,) = coordinator.claimed(COMMIT)
    assert isinstance(commit, Commit)
    coordinator.receive(Failed(1, "cancelled"))
    assert coordinator.tick(4.0) == []
    assert coordinator.committed() == [Broadcast(Verdict({}))]


def test_a_rank_that_fell_silent_is_not_waited_for_as_one_that_is_late() -> None:
    """What else is under way then ends after ``silence``, and not after ten times as long (E5)."""
    plans, bounds = PlanCache(), Bounds(silence_seconds=60.0, lateness_seconds=600.0)

    def begun(number: int, *ranks: int) -> Coordinator:
        coordinator = Coordinator(
            number, save_id=f"run-{number}", world_size=2, plans=plans, bounds=bounds, now=0.0
        )
        for rank in ranks:
            coordinator.receive(Ready(rank, "s3://a", b"f", b"plan"))
        return coordinator

    def failures(coordinator: Coordinator, until: int) -> dict[int, str] | None:
        """Look once a second, with word from rank 0 alone."""
        for now in range(1, until + 1):
            coordinator.receive(Heartbeat(0))
            for action in coordinator.tick(float(now)):
                if isinstance(action, Broadcast) and isinstance(action.message, Verdict):
                    return dict(action.message.failures)
        return None

    dies = begun(1, 0, 1)
    dies.tick(0.0)
    dies.planned({0: b"", 1: b""})
    found = failures(dies, 61)
    assert found is not None
    assert set(found) == {1}
    found = failures(begun(2, 0), 61)
    assert found is not None
    assert set(found) == {1}
    plans.silent.clear()  # it has been heard
    assert failures(begun(3, 0), 599) is None
