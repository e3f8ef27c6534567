"""The protocol of a sharded save: its rules, its actions, and what is kept from one save to the next.

This is a two-phase commit. `coordinator` and `participant` implement it as pure state machines: messages and a clock go
in, actions come out. Guarantees, for any order of messages, for the loss of any rank at any message, and for any clock:

* The coordinator commits the checkpoint only when every rank has written its part, none has failed, and none has given
  up on the coordinator (D5).
* On every rank that survives, the save ends once, with the same outcome (E4). A rank that does not receive the verdict
  claims the decision in the group's store. Only one claim can hold: that of the coordinator, which then commits, or
  that of another rank, after which no rank commits. Storage is checked only if the store does not answer, or if the
  coordinator died while it was committing.
* Every wait is bounded (E5). A rank has failed if it sends nothing for ``silence_seconds`` after a message, or no
  message at all for ``lateness_seconds``. Time is counted from poll to poll, and no interval counts for more than a
  fraction of the bound, so a process that was stopped and continues does not consider the others silent.
* Objects are deleted only if it is certain that no checkpoint refers to them.

One case remains: a commit that takes effect after the other ranks have given up on the coordinator and have checked
storage. The coordinator stops committing in time if it cannot reach the group's store. But a process that was stopped
may still send, when it continues, the request that it was about to send.

What does not belong here: storage, threads, torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from async_ckpt.sharded.agreement.messages import (
    FromCoordinator,
    Go,
    Ready,
    ToCoordinator,
    Verdict,
)

__all__ = [
    "COMMIT",
    "COORDINATOR",
    "OUTCOME_UNKNOWN",
    "Action",
    "Bounds",
    "Broadcast",
    "Claim",
    "ClaimHolder",
    "CleanUp",
    "Commit",
    "End",
    "LookUp",
    "Plan",
    "PlanCache",
    "PollClock",
    "Scatter",
    "Send",
    "SentPlan",
    "Stop",
    "Undo",
    "Write",
    "late",
    "silent",
]

COORDINATOR = 0
"""The rank that decides."""

COMMIT = "commit"
"""The value of the claim if the coordinator holds it."""

ClaimHolder = str | Mapping[int, str] | None
"""The claim that holds: `COMMIT`, or the failures that another rank claimed; ``None`` if the store did not answer."""

OUTCOME_UNKNOWN = "; it is unknown whether the checkpoint was committed"


# -- actions


@dataclass(frozen=True, slots=True)
class Send:
    """Send *message* to the coordinator."""

    message: ToCoordinator


@dataclass(frozen=True, slots=True)
class Broadcast:
    """Send *message* to every rank."""

    message: FromCoordinator


@dataclass(frozen=True, slots=True)
class Scatter:
    """Send each rank its own message."""

    messages: Mapping[int, Go]


@dataclass(frozen=True, slots=True)
class Claim:
    """Claim the decision in the group's store, `COMMIT` or failures; report the claim that holds to `claimed`."""

    claim: str | Mapping[int, str]


@dataclass(frozen=True, slots=True)
class Plan:
    """Plan what each rank writes; report to `planned`."""

    readies: Mapping[int, Ready]


@dataclass(frozen=True, slots=True)
class Write:
    """Write this rank's part; report to `wrote` or `failed`."""

    work: bytes | None
    save_id: str


@dataclass(frozen=True, slots=True)
class Commit:
    """Commit the checkpoint; report to `committed` or `commit_failed`."""

    readies: Mapping[int, Ready]


@dataclass(frozen=True, slots=True)
class LookUp:
    """Check storage for the checkpoint; report to `looked_up`."""

    save_id: str


@dataclass(frozen=True, slots=True)
class Stop:
    """Cancel the work for this save on this rank, and wait for its end."""


@dataclass(frozen=True, slots=True)
class Undo:
    """Delete what this rank has written."""


@dataclass(frozen=True, slots=True)
class End:
    """The save has ended: durable if *failures* is empty."""

    failures: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class CleanUp:
    """Delete the messages about this save.

    Attributes:
        verdict: the outcome of the save.
        unacknowledged: the ranks that have not acknowledged the verdict.
    """

    verdict: Verdict
    unacknowledged: frozenset[int]


Action = Send | Broadcast | Scatter | Claim | Plan | Write | Commit | LookUp | Stop | Undo | End | CleanUp


# -- what is kept from save to save


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """The time limits of waits.

    Attributes:
        silence_seconds: for the next message of a rank.
        lateness_seconds: for the first message of a rank.
    """

    silence_seconds: float = 60.0
    lateness_seconds: float = 600.0

    @property
    def heartbeat_seconds(self) -> float:
        """The interval of heartbeats; a few may be lost."""
        return self.silence_seconds / 6

    @property
    def longest_poll_seconds(self) -> float:
        """How long the time between two polls counts at most."""
        return self.silence_seconds / 10


class SentPlan:
    """What one rank has sent to the coordinator in all saves so far, and so need not send again."""

    def __init__(self) -> None:
        self.fingerprint: bytes | None = None  # of the last plan sent
        self.is_known = False  # whether the coordinator has received it
        self.planned: int | None = None  # the number of the save whose planning assigned the last work

    def forget(self) -> None:
        """Have the plan sent again with the next save."""
        self.fingerprint, self.is_known, self.planned = None, False, None


class PlanCache:
    """What the coordinator keeps of each rank from save to save: only the last plan and the last work (B3).

    Attributes:
        works: what each rank was last told to write.
        planned: the number of the save whose planning assigned that work.
        silent: the ranks that fell silent in a save and have sent nothing since.
    """

    def __init__(self) -> None:
        self.silent: set[int] = set()
        self.works: dict[int, bytes | None] = {}
        self.planned: int | None = None
        self._of: dict[int, tuple[bytes, bytes]] = {}

    def complete(self, ready: Ready) -> Ready:
        """Return *ready* with its plan. Must be called for every `Ready`, in the order in which its rank sent them."""
        if ready.plan is not None:
            self._of[ready.rank] = (ready.fingerprint, ready.plan)
            return ready
        fingerprint, plan = self._of.get(ready.rank, (None, None))
        return replace(ready, plan=plan) if fingerprint == ready.fingerprint else ready


class PollClock:
    """A clock that advances from poll to poll."""

    def __init__(self, bounds: Bounds, now: float) -> None:
        self.seconds = 0.0
        self._most = bounds.longest_poll_seconds
        self._last = now

    def advance(self, now: float) -> None:
        """Advance to *now*."""
        self.seconds += min(max(now - self._last, 0.0), self._most)
        self._last = now


def late(bounds: Bounds) -> str:
    """Return the failure message of a rank that has not begun the save."""
    return f"did not begin this save within {bounds.lateness_seconds:g} s"


def silent(bounds: Bounds) -> str:
    """Return the failure message of a rank that has fallen silent."""
    return f"sent nothing for {bounds.silence_seconds:g} s: it has ended, hangs, or cannot reach the group's store"
