"""What every rank does in a sharded save; rank 0 does it as well, beside its `coordinator`.

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
    COORDINATOR,
    OUTCOME_UNKNOWN,
    Action,
    Bounds,
    Claim,
    ClaimHolder,
    End,
    LookUp,
    PollClock,
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
    FAILED = auto()  # and has told the coordinator
    CLAIMING = auto()  # has given up on the coordinator
    LOOKING_UP = auto()
    ENDED = auto()


class Participant:
    """One save, on one rank.

    Args:
        rank: the rank of this process.
        sent_plan: what the coordinator was sent in earlier saves.
        bounds: the time limits of waits.
        now: the time in seconds, on the clock that `tick` is given.
    """

    def __init__(self, rank: int, *, sent_plan: SentPlan, bounds: Bounds, now: float) -> None:
        self.rank = rank
        self.step = Step.WAITING
        self._sent_plan = sent_plan
        self._bounds = bounds
        self._clock = PollClock(bounds, now)
        self._fingerprint = b""
        self._save_id = ""
        self._has_begun_to_write = False
        self._wrote = False
        self._has_heard_coordinator = False
        self._last_seconds = 0.0  # when the coordinator's last message was received
        self._connected_seconds = 0.0  # when the store last answered
        self._heartbeat_seconds = 0.0
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
        if (
            self.step is Step.ENDED
            or self._clock.seconds - self._heartbeat_seconds < self._bounds.heartbeat_seconds
        ):
            return []
        self._heartbeat_seconds = self._clock.seconds
        return [Send(Heartbeat(self.rank))]

    def receive(self, message: FromCoordinator) -> list[Action]:
        """Process a message of the coordinator."""
        if self.step is Step.ENDED:
            return []
        self._has_heard_coordinator = True
        self._last_seconds = self._clock.seconds
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
                ack = Send(Ack(self.rank))
                if is_certain or not self._wrote:
                    return [ack, *self._end(failures, is_certain=is_certain)]
                return [ack, *self._look_up(failures)]
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
        """Report that this rank no longer waits, whatever the verdict; this ends its part."""
        if self.step is Step.ENDED:
            return []
        self.step = Step.ENDED
        self._sent_plan.forget()
        return [Send(Failed(self.rank, why)), Send(Ack(self.rank))]

    def tick(self, now: float, *, is_connected: bool = True) -> list[Action]:
        """Return the actions that are due. Call it after `receive` was called with all messages that have arrived.

        Args:
            now: the time in seconds.
            is_connected: whether the group's store answers.
        """
        self._clock.advance(now)
        seconds = self._clock.seconds
        if is_connected:
            self._connected_seconds = seconds
        bounds = self._bounds
        if self.step is Step.CLAIMING:
            has_waited = seconds - self._asked_seconds >= 2 * bounds.longest_poll_seconds
            return self.claimed(None) if has_waited else []
        if self.step is Step.LOOKING_UP:
            has_waited = seconds - self._asked_seconds >= bounds.silence_seconds
            return self.looked_up(None) if has_waited else []
        if self.step is Step.ENDED:
            return []
        since = self._last_seconds if self._has_heard_coordinator else self._connected_seconds
        if seconds - since >= bounds.silence_seconds:
            return self._claim(silent(bounds))
        if not self._has_heard_coordinator and seconds >= bounds.lateness_seconds:
            return self._claim(late(bounds))
        return []

    def claimed(self, holder: ClaimHolder) -> list[Action]:
        """End if it is certain that no rank commits; otherwise check storage."""
        if self.step is not Step.CLAIMING:
            return []
        if isinstance(holder, Mapping) or not self._wrote:  # the commit needs every rank, so also this one
            failures = holder if isinstance(holder, Mapping) else self._failures
            return [Send(GaveUp(self.rank, failures)), *self._end(failures, is_certain=True)]
        return self._look_up(self._failures)

    def looked_up(self, found: bool | None) -> list[Action]:
        """End according to what is in storage."""
        if self.step is not Step.LOOKING_UP:
            return []
        if found:
            return self._end({}, is_certain=True)
        failures = self._failures
        if found is None:
            failures = {
                rank: why if why.endswith(OUTCOME_UNKNOWN) else why + OUTCOME_UNKNOWN
                for rank, why in failures.items()
            }
        return self._end(failures, is_certain=False)

    def _claim(self, why: str) -> list[Action]:
        self.step = Step.CLAIMING
        self._asked_seconds = self._clock.seconds
        self._failures = {COORDINATOR: why}
        return [Claim(self._failures)]

    def _look_up(self, failures: Mapping[int, str]) -> list[Action]:
        self.step = Step.LOOKING_UP
        self._asked_seconds = self._clock.seconds
        self._failures = dict(failures)
        return [Stop(), LookUp(self._save_id)]

    def _end(self, failures: Mapping[int, str], *, is_certain: bool) -> list[Action]:
        self.step = Step.ENDED
        if not failures:
            return [Stop(), End({})]
        self._sent_plan.forget()
        undo = [Undo()] if is_certain and self._has_begun_to_write else []
        return [Stop(), *undo, End(dict(failures))]
