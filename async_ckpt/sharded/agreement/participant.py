"""The part of every rank in a sharded save, that of rank 0 included.

Guarantees: those of `protocol`; each save ends once.

What does not belong here: the decision (coordinator).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum, auto

from async_ckpt.sharded.agreement.messages import (
    Ack,
    Failed,
    FromCoordinator,
    GaveUp,
    Go,
    Heartbeat,
    Ready,
    Verdict,
    Wrote,
)
from async_ckpt.sharded.agreement.protocol import (
    CANNOT_BE_TOLD,
    COORDINATOR,
    Action,
    Bounds,
    Claim,
    ClaimHolder,
    Count,
    End,
    LookUp,
    Send,
    SentPlan,
    Stop,
    Undo,
    Write,
    late,
    silent,
)

__all__ = ["Participant", "Step"]


class Step(Enum):
    """The phases of a save on a rank."""

    WAITING = auto()
    WRITING = auto()
    WROTE = auto()
    FAILED = auto()  # and said so
    CLAIMING = auto()  # has given up on the coordinator
    LOOKING = auto()
    ENDED = auto()


class Participant:
    """One save, on one rank.

    Args:
        rank: this one.
        sent_plan: what the coordinator was sent in earlier saves.
        bounds: how long to wait.
        now: seconds on any clock, as in `tick`.
    """

    def __init__(self, rank: int, *, sent_plan: SentPlan, bounds: Bounds, now: float) -> None:
        self.rank = rank
        self.step = Step.WAITING
        self._sent_plan = sent_plan
        self._bounds = bounds
        self._count = Count(bounds, now)
        self._fingerprint = b""
        self._save_id = ""
        self._has_begun_to_write = False
        self._wrote = False
        self._has_heard = False
        self._last_seconds = 0.0  # when the coordinator was last heard
        self._touched_seconds = 0.0  # when the store last answered
        self._beaten_seconds = 0.0
        self._asked_seconds = 0.0
        self._failures: dict[int, str] = {}

    def begin(
        self, *, location: str, fingerprint: bytes, plan: Callable[[], bytes], sizes: tuple[int, ...]
    ) -> list[Action]:
        """Announce that this rank has begun. *plan* is called only if the coordinator does not know it."""
        sent_plan = self._sent_plan
        self._fingerprint = fingerprint
        if sent_plan.fingerprint == fingerprint and sent_plan.is_known:
            ready = Ready(self.rank, location, fingerprint, None, sizes, sent_plan.planned)
        else:
            ready = Ready(self.rank, location, fingerprint, plan(), sizes, sent_plan.planned)
            sent_plan.fingerprint, sent_plan.is_known = fingerprint, False
        return [Send(ready)]

    def beat(self) -> list[Action]:
        """Send a heartbeat of this rank's loop, if one is due."""
        if self.step is Step.ENDED or self._count.seconds - self._beaten_seconds < self._bounds.beat_seconds:
            return []
        self._beaten_seconds = self._count.seconds
        return [Send(Heartbeat(self.rank))]

    def receive(self, message: FromCoordinator) -> list[Action]:
        """Follow a message of the coordinator."""
        if self.step is Step.ENDED:
            return []
        self._has_heard = True
        self._last_seconds = self._count.seconds
        match message:
            case Go(work, planned, save_id):
                if self._sent_plan.fingerprint == self._fingerprint:
                    self._sent_plan.is_known = True
                self._sent_plan.planned = planned
                self._save_id = save_id
                if self.step is Step.WAITING:
                    self.step = Step.WRITING
                    self._has_begun_to_write = True
                    return [Write(work, save_id)]
            case Verdict(failures, is_certain):
                heard = Send(Ack(self.rank))
                if is_certain or not self._wrote:
                    return [heard, *self._end(failures, is_certain=is_certain)]
                return [heard, *self._look_up(failures)]
        return []

    def wrote(self) -> list[Action]:
        """Report that this rank's part is durable."""
        if self.step is not Step.WRITING:
            return []
        self.step = Step.WROTE
        self._wrote = True
        return [Send(Wrote(self.rank))]

    def failed(self, why: str) -> list[Action]:
        """Report that this rank cannot write its part."""
        if self.step not in (Step.WAITING, Step.WRITING):
            return []
        self.step = Step.FAILED
        return [Send(Failed(self.rank, why))]

    def give_up(self, why: str) -> list[Action]:
        """Report that this rank no longer waits, whatever the others do; its last message."""
        if self.step is Step.ENDED:
            return []
        self.step = Step.ENDED
        self._sent_plan.forget()
        return [Send(Failed(self.rank, why)), Send(Ack(self.rank))]

    def tick(self, now: float, *, is_in_touch: bool = True) -> list[Action]:
        """Look at the clock. Call it after all that has come.

        Args:
            now: seconds.
            is_in_touch: whether the group's store answers.
        """
        self._count.look(now)
        seconds = self._count.seconds
        if is_in_touch:
            self._touched_seconds = seconds
        bounds = self._bounds
        if self.step is Step.CLAIMING:
            has_waited = seconds - self._asked_seconds >= 2 * bounds.longest_look_seconds
            return self.claimed(None) if has_waited else []
        if self.step is Step.LOOKING:
            has_waited = seconds - self._asked_seconds >= bounds.silence_seconds
            return self.looked_up(None) if has_waited else []
        if self.step is Step.ENDED:
            return []
        since = self._last_seconds if self._has_heard else self._touched_seconds
        if seconds - since >= bounds.silence_seconds:
            return self._claim(silent(bounds))
        if not self._has_heard and seconds >= bounds.lateness_seconds:
            return self._claim(late(bounds))
        return []

    def claimed(self, holder: ClaimHolder) -> list[Action]:
        """End if it is certain that no rank commits; otherwise check storage."""
        if self.step is not Step.CLAIMING:
            return []
        if isinstance(holder, Mapping) or not self._wrote:  # without this rank nobody can have committed
            failures = holder if isinstance(holder, Mapping) else self._failures
            return [Send(GaveUp(self.rank, failures)), *self._end(failures, is_certain=True)]
        return self._look_up(self._failures)

    def looked_up(self, found: bool | None) -> list[Action]:
        """End according to what is in storage."""
        if self.step is not Step.LOOKING:
            return []
        if found:
            return self._end({}, is_certain=True)
        failures = self._failures
        if found is None:
            failures = {
                rank: why if why.endswith(CANNOT_BE_TOLD) else why + CANNOT_BE_TOLD
                for rank, why in failures.items()
            }
        return self._end(failures, is_certain=False)

    def _claim(self, why: str) -> list[Action]:
        self.step = Step.CLAIMING
        self._asked_seconds = self._count.seconds
        self._failures = {COORDINATOR: why}
        return [Claim(self._failures)]

    def _look_up(self, failures: Mapping[int, str]) -> list[Action]:
        self.step = Step.LOOKING
        self._asked_seconds = self._count.seconds
        self._failures = dict(failures)
        return [Stop(), LookUp(self._save_id)]

    def _end(self, failures: Mapping[int, str], *, is_certain: bool) -> list[Action]:
        self.step = Step.ENDED
        if not failures:
            return [Stop(), End({})]
        self._sent_plan.forget()
        undo = [Undo()] if is_certain and self._has_begun_to_write else []
        return [Stop(), *undo, End(dict(failures))]
