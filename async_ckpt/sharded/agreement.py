"""Who decides how a sharded save ends, and how each rank learns of it: messages and a clock in, actions out.

Guarantees, for any order of messages, the loss of any rank at any of them, and any clock:

* The coordinator has the checkpoint committed only when every rank has written and none has failed, and when no rank
  has given up on it (D5).
* Every rank that lives ends once, and all alike (E4). Who cannot hear the verdict claims the right to one in the
  group's store, where only one claim holds: the coordinator's, to commit, or another's, that nobody ever will. Only
  where the store is gone, or the coordinator has ended while it committed, storage is asked.
* Every wait is bounded (E5): a rank that said something and then nothing for ``silence`` seconds has failed, and one
  that says nothing at all for ``lateness`` seconds. Seconds are *counted*, here, between two looks, and no two looks
  count for more than a part of the bound: whoever was stopped himself finds nobody silent.
* Objects are deleted only where it is certain that no checkpoint refers to them.

What does not belong here: storage, threads, torch. `Coordinator` and `Member` say what is to be done, and are told what
came of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum, auto

from async_ckpt.sharded.messages import (
    Alive,
    Beat,
    Failed,
    FromCoordinator,
    GaveUp,
    Go,
    Heard,
    Ready,
    ToCoordinator,
    Verdict,
    Wrote,
)

__all__ = ["COMMIT", "COORDINATOR", "Action", "Bounds", "Claim", "CleanUp", "Commit", "Coordinator", "End"]
__all__ += ["Holder", "LookUp", "Member", "Plan", "Plans", "Say", "Stop", "Tell", "TellEach", "Told", "Undo"]
__all__ += ["Write"]

COORDINATOR = 0
"""The rank that decides."""

COMMIT = "commit"
"""Who holds the claim if the coordinator does."""

Holder = str | Mapping[int, str] | None
"""Whose claim holds: `COMMIT`, or the failures that another rank claimed; ``None`` if the store did not say."""

_CANNOT_BE_TOLD = "; whether the checkpoint was committed cannot be told"


# -- what is to be done


@dataclass(frozen=True, slots=True)
class Say:
    """Send *message* to the coordinator."""

    message: ToCoordinator


@dataclass(frozen=True, slots=True)
class Tell:
    """Send *message* to every rank."""

    message: FromCoordinator


@dataclass(frozen=True, slots=True)
class TellEach:
    """Send each rank its own message."""

    messages: Mapping[int, Go]


@dataclass(frozen=True, slots=True)
class Claim:
    """Claim the decision in the group's store, `COMMIT` or failures, and tell `claimed` who holds it."""

    claim: str | Mapping[int, str]


@dataclass(frozen=True, slots=True)
class Plan:
    """Make of what the ranks have what each is to write; tell `planned`."""

    readies: Mapping[int, Ready]


@dataclass(frozen=True, slots=True)
class Write:
    """Write this rank's part; tell `wrote` or `failed`."""

    work: bytes | None
    save_id: str


@dataclass(frozen=True, slots=True)
class Commit:
    """Make the checkpoint exist; tell `committed` or `commit_failed`."""

    readies: Mapping[int, Ready]


@dataclass(frozen=True, slots=True)
class LookUp:
    """Ask storage whether the checkpoint exists; tell `looked_up`."""

    save_id: str


@dataclass(frozen=True, slots=True)
class Stop:
    """Stop whatever is being done for this save on this rank, and wait for its end."""


@dataclass(frozen=True, slots=True)
class Undo:
    """Delete what this rank has written."""


@dataclass(frozen=True, slots=True)
class End:
    """The save has ended: durable if *failures* is empty."""

    failures: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class CleanUp:
    """Take away what was said of this save.

    Attributes:
        verdict: how it ended.
        unheard: ranks that have not said that they know.
    """

    verdict: Verdict
    unheard: frozenset[int]


Action = Say | Tell | TellEach | Claim | Plan | Write | Commit | LookUp | Stop | Undo | End | CleanUp


# -- what is kept from save to save


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How long anybody waits.

    Attributes:
        silence_seconds: for a rank that has said something.
        lateness_seconds: for one that has said nothing yet.
    """

    silence_seconds: float = 60.0
    lateness_seconds: float = 600.0

    @property
    def beat_seconds(self) -> float:
        """How often to say that one is alive: a few may be lost."""
        return self.silence_seconds / 6

    @property
    def longest_look_seconds(self) -> float:
        """What the time between two looks counts for at the most."""
        return self.silence_seconds / 10


class Told:
    """What a rank knows that the coordinator knows of it, over all saves. One a rank."""

    def __init__(self) -> None:
        self.fingerprint: bytes | None = None  # of the last plan sent
        self.is_known = False  # the coordinator has that one
        self.planned: int | None = None  # the save whose planning gave the last work

    def forget(self) -> None:
        """Tell it anew."""
        self.__init__()  # type: ignore[misc]  # a new one, in the same place


class Plans:
    """What the coordinator knows of each rank, over all saves: the last plan and the last work, no more."""

    def __init__(self) -> None:
        self.works: dict[int, bytes | None] = {}
        self.planned: int | None = None
        self._of: dict[int, tuple[bytes, bytes]] = {}

    def complete(self, ready: Ready) -> Ready:
        """Return *ready* with its plan. To be called for all of a rank's, in the order in which it said them."""
        if ready.plan is not None:
            self._of[ready.rank] = (ready.fingerprint, ready.plan)
            return ready
        fingerprint, plan = self._of.get(ready.rank, (None, None))
        return replace(ready, plan=plan) if fingerprint == ready.fingerprint else ready


class _Count:
    """Seconds, counted from look to look."""

    def __init__(self, bounds: Bounds, now: float) -> None:
        self.seconds = 0.0
        self._most = bounds.longest_look_seconds
        self._last = now

    def look(self, now: float) -> None:
        self.seconds += min(max(now - self._last, 0.0), self._most)
        self._last = now


# -- the coordinator


class Phase(Enum):
    """How far a save is, on the coordinator."""

    GATHERING = auto()  # not all ranks have come
    PLANNING = auto()
    WRITING = auto()
    CLAIMING = auto()  # all have written
    COMMITTING = auto()  # from here on nobody's failure counts
    LOOKING = auto()  # the commit failed; whether it took place is being asked
    DECIDED = auto()  # not all ranks know it
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
        self, number: int, *, save_id: str, world_size: int, plans: Plans, bounds: Bounds, now: float
    ) -> None:
        self.number = number
        self.phase = Phase.GATHERING
        self.verdict: Verdict | None = None
        self._save_id = save_id
        self._world_size = world_size
        self._plans = plans
        self._bounds = bounds
        self._count = _Count(bounds, now)
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
        """Take note of *message*, a `Ready` with its plan; `tick` says what is to be done about it."""
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
            case Heard():
                self._heard.add(rank)

    def beat(self) -> list[Action]:
        """Say that this rank's loop is alive, if it is time to."""
        if self.phase is Phase.OVER or not self._is_due():
            return []
        self._beaten_seconds = self._count.seconds
        return [Tell(Alive())]

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
        """Go: each rank has its work, or all the work of last time (``None``)."""
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
            return [Tell(same)]
        return [
            TellEach(
                {
                    rank: replace(same, work=plans.works[rank]) if rank in lacking else same
                    for rank in range(self._world_size)
                }
            )
        ]

    def failed(self, why: str) -> list[Action]:
        """Planning failed; no rank has begun to write."""
        self._failures.setdefault(COORDINATOR, why)
        return self._act()

    def claimed(self, holder: Holder) -> list[Action]:
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
        """It is durable."""
        return self._decide(Verdict({})) if self.phase is Phase.COMMITTING else []

    def commit_failed(self, why: str) -> list[Action]:
        """Look whether it is durable all the same, as an answer that got lost may mean."""
        if self.phase is not Phase.COMMITTING:
            return []
        self.phase = Phase.LOOKING
        self._since_seconds = self._count.seconds
        self._commit_failure = why
        return [LookUp(self._save_id)]

    def looked_up(self, found: bool | None) -> list[Action]:
        """Decide by what storage shows."""
        if self.phase is not Phase.LOOKING:
            return []
        if found:
            return self._decide(Verdict({}))
        why = self._commit_failure
        if found is None:
            return self._decide(Verdict({COORDINATOR: why + _CANNOT_BE_TOLD}, is_certain=False))
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
                if self._count.seconds >= self._bounds.lateness_seconds:
                    found[rank] = _late(self._bounds)
                    self._lost.add(rank)
            elif self._count.seconds - last >= self._bounds.silence_seconds:
                found[rank] = _silent(self._bounds)
                self._lost.add(rank)
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
        return [Tell(verdict)]

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
    """Return whom to name where ranks were told different locations: the first, and who differs from it."""
    first = min(readies)
    location = readies[first].location
    others = {rank: ready.location for rank, ready in sorted(readies.items()) if ready.location != location}
    other = min(others)
    return {
        first: f"saves to {location!r}, rank {other} to {others[other]!r}",
        **{rank: f"saves to {there!r}, rank {first} to {location!r}" for rank, there in others.items()},
    }


def _late(bounds: Bounds) -> str:
    return f"did not begin this save within {bounds.lateness_seconds:g} s"


def _silent(bounds: Bounds) -> str:
    return f"nothing was heard of it for {bounds.silence_seconds:g} s: it has ended, hangs, or is cut off"


# -- every rank


class Step(Enum):
    """How far a save is, on a rank."""

    WAITING = auto()
    WRITING = auto()
    WROTE = auto()
    FAILED = auto()  # and said so
    CLAIMING = auto()  # has given up on the coordinator
    LOOKING = auto()
    ENDED = auto()


class Member:
    """One save, on one rank.

    Args:
        rank: this one.
        told: what the coordinator has been told in earlier saves.
        bounds: how long to wait.
        now: seconds on any clock, as in `tick`.
    """

    def __init__(self, rank: int, *, told: Told, bounds: Bounds, now: float) -> None:
        self.rank = rank
        self.step = Step.WAITING
        self._told = told
        self._bounds = bounds
        self._count = _Count(bounds, now)
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
        """Say that this rank has come. *plan* is called only if the coordinator does not know it."""
        told = self._told
        self._fingerprint = fingerprint
        if told.fingerprint == fingerprint and told.is_known:
            ready = Ready(self.rank, location, fingerprint, None, sizes, told.planned)
        else:
            ready = Ready(self.rank, location, fingerprint, plan(), sizes, told.planned)
            told.fingerprint, told.is_known = fingerprint, False
        return [Say(ready)]

    def beat(self) -> list[Action]:
        """Say that this rank's loop is alive, if it is time to."""
        if self.step is Step.ENDED or self._count.seconds - self._beaten_seconds < self._bounds.beat_seconds:
            return []
        self._beaten_seconds = self._count.seconds
        return [Say(Beat(self.rank))]

    def receive(self, message: FromCoordinator) -> list[Action]:
        """Do what the coordinator says."""
        if self.step is Step.ENDED:
            return []
        self._has_heard = True
        self._last_seconds = self._count.seconds
        match message:
            case Go(work, planned, save_id):
                if self._told.fingerprint == self._fingerprint:
                    self._told.is_known = True
                self._told.planned = planned
                self._save_id = save_id
                if self.step is Step.WAITING:
                    self.step = Step.WRITING
                    self._has_begun_to_write = True
                    return [Write(work, save_id)]
            case Verdict(failures, is_certain):
                heard = Say(Heard(self.rank))
                if is_certain or not self._wrote:
                    return [heard, *self._end(failures, is_certain=is_certain)]
                return [heard, *self._look_up(failures)]
        return []

    def wrote(self) -> list[Action]:
        """Say that this rank's part is durable."""
        if self.step is not Step.WRITING:
            return []
        self.step = Step.WROTE
        self._wrote = True
        return [Say(Wrote(self.rank))]

    def failed(self, why: str) -> list[Action]:
        """Say that this rank cannot do its part."""
        if self.step not in (Step.WAITING, Step.WRITING):
            return []
        self.step = Step.FAILED
        return [Say(Failed(self.rank, why))]

    def give_up(self, why: str) -> list[Action]:
        """Say that this rank waits no longer, whatever the others do; nothing follows."""
        if self.step is Step.ENDED:
            return []
        self.step = Step.ENDED
        self._told.forget()
        return [Say(Failed(self.rank, why)), Say(Heard(self.rank))]

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
            return self._claim(_silent(bounds))
        if not self._has_heard and seconds >= bounds.lateness_seconds:
            return self._claim(_late(bounds))
        return []

    def claimed(self, holder: Holder) -> list[Action]:
        """End if it is certain that nobody commits; else look."""
        if self.step is not Step.CLAIMING:
            return []
        if isinstance(holder, Mapping) or not self._wrote:  # without this rank nobody can have committed
            failures = holder if isinstance(holder, Mapping) else self._failures
            return [Say(GaveUp(self.rank, failures)), *self._end(failures, is_certain=True)]
        return self._look_up(self._failures)

    def looked_up(self, found: bool | None) -> list[Action]:
        """End by what storage shows."""
        if self.step is not Step.LOOKING:
            return []
        if found:
            return self._end({}, is_certain=True)
        failures = self._failures
        if found is None:
            failures = {
                rank: why if why.endswith(_CANNOT_BE_TOLD) else why + _CANNOT_BE_TOLD
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
        self._told.forget()
        undo = [Undo()] if is_certain and self._has_begun_to_write else []
        return [Stop(), *undo, End(dict(failures))]
