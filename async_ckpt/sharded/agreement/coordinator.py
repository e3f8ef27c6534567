"""The coordinator of a sharded save, rank 0: collects the messages of the ranks, and decides.

Guarantees: those of `protocol`. Every decision is made in `Coordinator.tick`, after all messages have been received.

What does not belong here: what a rank does with a decision (participant).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from enum import Enum, auto

from async_ckpt.sharded.agreement.messages import (
    Ack,
    CoordinatorHeartbeat,
    Failed,
    GaveUp,
    Go,
    Ready,
    ToCoordinator,
    Verdict,
    Wrote,
)
from async_ckpt.sharded.agreement.protocol import (
    COMMIT,
    COORDINATOR,
    OUTCOME_UNKNOWN,
    Action,
    Bounds,
    Broadcast,
    Claim,
    ClaimHolder,
    CleanUp,
    Commit,
    LookUp,
    Plan,
    PlanCache,
    PollClock,
    Scatter,
    Stop,
    late,
    silent,
)

__all__ = ["Coordinator", "Phase"]


class Phase(Enum):
    """The phases of a save on the coordinator."""

    GATHERING = auto()  # not all ranks have begun
    PLANNING = auto()
    WRITING = auto()
    CLAIMING = auto()  # all have written
    COMMITTING = auto()  # from here on no rank's failure counts
    LOOKING_UP = auto()  # the commit failed; storage is being checked for whether it took effect
    DECIDED = auto()  # not all ranks have acknowledged the verdict
    OVER = auto()


class Coordinator:
    """One save, as rank 0 decides it.

    Args:
        number: of the save.
        save_id: unique to the save, among all runs.
        world_size: the number of ranks.
        plans: the plans of earlier saves.
        bounds: the time limits of waits.
        now: the time in seconds, on the clock that `tick` is given.
    """

    def __init__(
        self, number: int, *, save_id: str, world_size: int, plans: PlanCache, bounds: Bounds, now: float
    ) -> None:
        self.number = number
        self.phase = Phase.GATHERING
        self.verdict: Verdict | None = None
        self._save_id = save_id
        self._world_size = world_size
        self._plans = plans
        self._bounds = bounds
        self._clock = PollClock(bounds, now)
        self._readies: dict[int, Ready] = {}
        self._wrote: set[int] = set()
        self._failures: dict[int, str] = {}
        self._acknowledged: set[int] = set()
        self._last_seconds: dict[int, float] = {}  # by rank: when its last message was received
        self._heartbeat_seconds = -bounds.heartbeat_seconds
        self._lost: set[int] = set()  # ranks from which no message is expected any more
        self._connected_seconds = 0.0  # when the group's store last answered
        self._is_reachable = True
        self._reachable_seconds = 0.0  # since when other ranks can reach this one
        self._since_seconds = 0.0  # when the current phase began, if that phase has a time limit
        self._commit_failure = ""

    def receive(self, message: ToCoordinator) -> None:
        """Record *message*, a `Ready` with its plan; `tick` returns the actions."""
        rank = message.rank
        self._last_seconds[rank] = self._clock.seconds
        match message:
            case Ready():
                self._readies.setdefault(rank, message)
            case Wrote():
                self._wrote.add(rank)
            case Failed(_, why):
                self._failures.setdefault(rank, why)
                if rank not in self._readies:
                    self._acknowledged.add(rank)  # it refused the save, so it does not wait for the verdict
            case GaveUp(_, failures):
                self._failures = dict(failures)
                self._acknowledged.add(rank)
            case Ack():
                self._acknowledged.add(rank)

    def beat(self) -> list[Action]:
        """Send a heartbeat of this rank's loop, if one is due."""
        if self.phase is Phase.OVER or not self._is_due():
            return []
        self._heartbeat_seconds = self._clock.seconds
        return [Broadcast(CoordinatorHeartbeat())]

    def tick(self, now: float, *, is_connected: bool = True, is_reachable: bool = True) -> list[Action]:
        """Return the actions that are due. Call it after `receive` was called with all messages that have arrived.

        Args:
            now: the time in seconds.
            is_connected: whether the group's store answers, so that the other ranks receive heartbeats.
            is_reachable: whether this rank has ever been connected to it; before that, no other rank can be late.
        """
        self._clock.advance(now)
        self._is_reachable = is_reachable
        if not is_reachable:
            self._reachable_seconds = self._clock.seconds
        if is_connected:
            self._connected_seconds = self._clock.seconds
        return self._act()

    def _act(self) -> list[Action]:
        if self.phase in (Phase.GATHERING, Phase.PLANNING, Phase.WRITING, Phase.CLAIMING):
            failures = self._found_failures()
            if failures:
                return self._decide(Verdict(failures))
        everyone = self._world_size
        if self.phase is Phase.GATHERING and len(self._readies) == everyone:
            self.phase = Phase.PLANNING
            return [Plan(dict(sorted(self._readies.items())))]
        if self.phase is Phase.WRITING and len(self._wrote) == everyone:
            self.phase = Phase.CLAIMING
            self._since_seconds = self._clock.seconds
            return [Claim(COMMIT)]
        if self.phase is Phase.CLAIMING and self._waited() >= self._bounds.silence_seconds / 2:
            return self.claimed(None)
        if self.phase is Phase.COMMITTING:
            is_cut_off = self._clock.seconds - self._connected_seconds >= self._bounds.silence_seconds / 2
            # The other ranks will give up on this one and check storage; the commit must end before.
            why = "was cut off from the process group's store while it committed"
            return [Stop(), *self.commit_failed(why)] if is_cut_off else []
        if self.phase is Phase.LOOKING_UP and self._waited() >= self._bounds.silence_seconds:
            return self.looked_up(None)
        if self.phase is Phase.DECIDED:
            return self._clean_up()
        return []

    def planned(self, works: Mapping[int, bytes] | None) -> list[Action]:
        """Let the ranks write: each has its own work, or all repeat the last work (``None``)."""
        if self.phase is not Phase.PLANNING:
            return []
        plans = self._plans
        if works is None and plans.planned is None:
            return self.failed("there is no earlier work to repeat")
        if works is not None:
            plans.works = {rank: works.get(rank) for rank in range(self._world_size)}
            plans.planned = self.number
        assert plans.planned is not None
        self.phase = Phase.WRITING
        lacking = {
            rank
            for rank, ready in self._readies.items()
            if works is not None or ready.planned != plans.planned
        }
        same = Go(None, plans.planned, self._save_id)
        if not lacking:
            return [Broadcast(same)]
        return [
            Scatter(
                {
                    rank: replace(same, work=plans.works[rank]) if rank in lacking else same
                    for rank in range(self._world_size)
                }
            )
        ]

    def failed(self, why: str) -> list[Action]:
        """Note that planning failed; no rank has begun to write."""
        self._failures.setdefault(COORDINATOR, why)
        return self._act()

    def claimed(self, holder: ClaimHolder) -> list[Action]:
        """Commit if the claim holds."""
        if self.phase is not Phase.CLAIMING:
            return []
        if holder == COMMIT:
            self.phase = Phase.COMMITTING
            return [Commit(dict(sorted(self._readies.items())))]
        if isinstance(holder, Mapping):
            return self._decide(Verdict(dict(holder)))
        return self._decide(
            Verdict({COORDINATOR: "the process group's store did not answer before the commit"})
        )

    def committed(self) -> list[Action]:
        """Note that the checkpoint is durable."""
        return self._decide(Verdict({})) if self.phase is Phase.COMMITTING else []

    def commit_failed(self, why: str) -> list[Action]:
        """Check whether the checkpoint is durable all the same: perhaps only the answer of storage was lost."""
        if self.phase is not Phase.COMMITTING:
            return []
        self.phase = Phase.LOOKING_UP
        self._since_seconds = self._clock.seconds
        self._commit_failure = why
        return [LookUp(self._save_id)]

    def looked_up(self, found: bool | None) -> list[Action]:
        """Decide by what was found in storage."""
        if self.phase is not Phase.LOOKING_UP:
            return []
        if found:
            return self._decide(Verdict({}))
        why = self._commit_failure
        if found is None:
            return self._decide(Verdict({COORDINATOR: why + OUTCOME_UNKNOWN}, is_certain=False))
        return self._decide(Verdict({COORDINATOR: why}))

    def _found_failures(self) -> dict[int, str]:
        found = dict(self._failures)
        if not self._is_reachable and self._clock.seconds >= self._bounds.lateness_seconds:
            found = {COORDINATOR: late(self._bounds), **found}  # what the others find, too
        locations = {ready.location for ready in self._readies.values()}
        if len(locations) > 1:
            found = {**_other_locations(self._readies), **found}
        for rank in range(self._world_size):
            if rank in found:
                continue
            last = self._last_seconds.get(rank)
            if last is None and not self._is_reachable:
                continue
            if last is None:
                # A rank that fell silent in an earlier save has probably ended, so it is given less time.
                is_silent = rank in self._plans.silent
                seconds = self._bounds.silence_seconds if is_silent else self._bounds.lateness_seconds
                if self._clock.seconds - self._reachable_seconds >= seconds:
                    found[rank] = silent(self._bounds) if is_silent else late(self._bounds)
                    self._lost.add(rank)
            elif self._clock.seconds - last >= self._bounds.silence_seconds:
                found[rank] = silent(self._bounds)
                self._lost.add(rank)
                self._plans.silent.add(rank)
        if self.phase is Phase.GATHERING and not found and len(self._readies) == self._world_size:
            found = {
                rank: "its plan is not known to rank 0; please report it"
                for rank, ready in self._readies.items()
                if ready.plan is None
            }
        return found

    def _decide(self, verdict: Verdict) -> list[Action]:
        self.phase = Phase.DECIDED
        self.verdict = verdict
        self._since_seconds = self._clock.seconds
        return [Broadcast(verdict)]

    def _clean_up(self) -> list[Action]:
        assert self.verdict is not None
        unacknowledged = frozenset(range(self._world_size)) - self._acknowledged
        if unacknowledged - self._lost and self._waited() < self._bounds.silence_seconds:
            return []
        self.phase = Phase.OVER
        return [CleanUp(self.verdict, unacknowledged)]

    def _waited(self) -> float:
        return self._clock.seconds - self._since_seconds

    def _is_due(self) -> bool:
        return self._clock.seconds - self._heartbeat_seconds >= self._bounds.heartbeat_seconds


def _other_locations(readies: Mapping[int, Ready]) -> dict[int, str]:
    """Return the ranks to name if they were given different locations: the first, and those that differ from it."""
    first = min(readies)
    location = readies[first].location
    others = {rank: ready.location for rank, ready in sorted(readies.items()) if ready.location != location}
    other = min(others)
    return {
        first: f"saves to {location!r}, rank {other} to {others[other]!r}",
        **{rank: f"saves to {there!r}, rank {first} to {location!r}" for rank, there in others.items()},
    }
