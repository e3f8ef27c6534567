"""The coordinator of a sharded save, rank 0: collects the messages of the ranks, and decides.

Guarantees: those of `protocol`. Every decision is made in `Coordinator.tick`, after all messages have been received.

What does not belong here: how a rank learns of it (participant).
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
    CANNOT_BE_TOLD,
    COMMIT,
    COORDINATOR,
    Action,
    Bounds,
    Broadcast,
    Claim,
    ClaimHolder,
    CleanUp,
    Commit,
    Count,
    LookUp,
    Plan,
    PlanCache,
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
    LOOKING = auto()  # the commit failed; storage is being checked for whether it took effect
    DECIDED = auto()  # not all ranks have acknowledged the verdict
    OVER = auto()


class Coordinator:
    """One save, as rank 0 decides it.

    Args:
        number: of the save.
        save_id: of the save, unique among all runs.
        world_size: how many ranks there are.
        plans: what is known from earlier saves.
        bounds: how long to wait.
        now: seconds on any clock, as in `tick`.
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
        self._count = Count(bounds, now)
        self._readies: dict[int, Ready] = {}
        self._wrote: set[int] = set()
        self._failures: dict[int, str] = {}
        self._heard: set[int] = set()
        self._last_seconds: dict[int, float] = {}  # when a rank was last heard
        self._beaten_seconds = -bounds.beat_seconds
        self._lost: set[int] = set()  # ranks from which nothing is expected any more
        self._touched_seconds = 0.0  # when the others could last hear of this rank
        self._since_seconds = 0.0  # when the phase began, where that counts
        self._commit_failure = ""

    def receive(self, message: ToCoordinator) -> None:
        """Record *message*, a `Ready` with its plan; `tick` returns the actions."""
        rank = message.rank
        self._last_seconds[rank] = self._count.seconds
        match message:
            case Ready():
                self._readies.setdefault(rank, message)
            case Wrote():
                self._wrote.add(rank)
            case Failed(_, why):
                self._failures.setdefault(rank, why)
                if rank not in self._readies:
                    self._heard.add(rank)  # it refused, and waits for nothing
            case GaveUp(_, failures):
                self._failures = dict(failures)
                self._heard.add(rank)
            case Ack():
                self._heard.add(rank)

    def beat(self) -> list[Action]:
        """Send a heartbeat of this rank's loop, if one is due."""
        if self.phase is Phase.OVER or not self._is_due():
            return []
        self._beaten_seconds = self._count.seconds
        return [Broadcast(CoordinatorHeartbeat())]

    def tick(self, now: float, *, is_in_touch: bool = True) -> list[Action]:
        """Look at what has come and at the clock, and say what is to be done. Call it after all that has come.

        Args:
            now: seconds.
            is_in_touch: whether the group's store answers, and so the others can hear that this rank is alive.
        """
        self._count.look(now)
        if is_in_touch:
            self._touched_seconds = self._count.seconds
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
            self._since_seconds = self._count.seconds
            return [Claim(COMMIT)]
        if self.phase is Phase.CLAIMING and self._waited() >= self._bounds.silence_seconds / 2:
            return self.claimed(None)
        if self.phase is Phase.COMMITTING:
            cut_off = self._count.seconds - self._touched_seconds >= self._bounds.silence_seconds / 2
            # Before the others give up on this rank and look themselves: a commit must not come after that.
            why = "was cut off from the process group's store while it committed"
            return [Stop(), *self.commit_failed(why)] if cut_off else []
        if self.phase is Phase.LOOKING and self._waited() >= self._bounds.silence_seconds:
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
            return self.failed("there is no work of last time")
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
        """Check whether the checkpoint is durable after all: only the answer may have been lost."""
        if self.phase is not Phase.COMMITTING:
            return []
        self.phase = Phase.LOOKING
        self._since_seconds = self._count.seconds
        self._commit_failure = why
        return [LookUp(self._save_id)]

    def looked_up(self, found: bool | None) -> list[Action]:
        """Decide by what is in storage."""
        if self.phase is not Phase.LOOKING:
            return []
        if found:
            return self._decide(Verdict({}))
        why = self._commit_failure
        if found is None:
            return self._decide(Verdict({COORDINATOR: why + CANNOT_BE_TOLD}, is_certain=False))
        return self._decide(Verdict({COORDINATOR: why}))

    def _found_failures(self) -> dict[int, str]:
        found = dict(self._failures)
        locations = {ready.location for ready in self._readies.values()}
        if len(locations) > 1:
            found = {**_other_locations(self._readies), **found}
        for rank in range(self._world_size):
            if rank in found:
                continue
            last = self._last_seconds.get(rank)
            if last is None:
                # One that fell silent in another save has ended, most likely: it is not waited for so long again.
                is_silent = rank in self._plans.silent
                seconds = self._bounds.silence_seconds if is_silent else self._bounds.lateness_seconds
                if self._count.seconds >= seconds:
                    found[rank] = silent(self._bounds) if is_silent else late(self._bounds)
                    self._lost.add(rank)
            elif self._count.seconds - last >= self._bounds.silence_seconds:
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
        self._since_seconds = self._count.seconds
        return [Broadcast(verdict)]

    def _clean_up(self) -> list[Action]:
        assert self.verdict is not None
        unheard = frozenset(range(self._world_size)) - self._heard
        if unheard - self._lost and self._waited() < self._bounds.silence_seconds:
            return []
        self.phase = Phase.OVER
        return [CleanUp(self.verdict, unheard)]

    def _waited(self) -> float:
        return self._count.seconds - self._since_seconds

    def _is_due(self) -> bool:
        return self._count.seconds - self._beaten_seconds >= self._bounds.beat_seconds


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
