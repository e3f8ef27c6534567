"""The agreement against a model of the world, under random programs: what holds after any of them.

The world loses ranks at any message, keeps messages back for as long as it likes, cuts ranks off from the store, stops
their clocks and lets them jump, and loses the answers of storage. One thing it does not do: let a commit take place
after somebody, who has waited for its rank in vain, has asked storage whether it did.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from async_ckpt.sharded.agreement.coordinator import Coordinator, Phase
from async_ckpt.sharded.agreement.messages import Failed, FromCoordinator, Go, Ready, ToCoordinator, Verdict
from async_ckpt.sharded.agreement.participant import Participant, Step
from async_ckpt.sharded.agreement.protocol import (
    COMMIT,
    Action,
    Bounds,
    Broadcast,
    Claim,
    ClaimHolder,
    CleanUp,
    Commit,
    End,
    LookUp,
    Plan,
    PlanCache,
    Scatter,
    Send,
    SentPlan,
    Stop,
    Undo,
    Write,
)

BOUNDS = Bounds(silence_seconds=60, lateness_seconds=600)
SAVES = 3
LOOK_SECONDS = 6.0
#: A late rank, then silence for the verdict, a claim that is not answered, a look that is not.
LONGEST_SECONDS = BOUNDS.lateness_seconds + 4 * BOUNDS.silence_seconds


@dataclass
class Process:
    """One rank."""

    rank: int
    sent_plan: SentPlan = field(default_factory=SentPlan)
    work: int | None = None  # of the save that planned what it has
    now: float = 0.0
    is_alive: bool = True
    is_cut_off: bool = False  # from the group's store
    is_hung: bool = False  # its event loop

    @property
    def hears(self) -> bool:
        return self.is_alive and not self.is_cut_off


@dataclass
class Save:
    """One save, in the world."""

    number: int
    coordinator: Coordinator | None = None
    members: dict[int, Participant] = field(default_factory=dict)
    refused: set[int] = field(default_factory=set)
    gave_up: set[int] = field(default_factory=set)
    early: list[ToCoordinator] = field(default_factory=list)  # what came before the coordinator
    down: list[FromCoordinator] = field(default_factory=list)
    works: dict[int, Go] = field(default_factory=dict)
    read: dict[int, int] = field(default_factory=dict)
    end: Verdict | None = None  # what is left for who comes late
    holder: ClaimHolder = None
    doing: dict[int, Action] = field(default_factory=dict)  # by rank, one thing at a time
    claiming: dict[int, list[tuple[Any, Claim]]] = field(default_factory=dict)
    ends: dict[int, Mapping[int, str]] = field(default_factory=dict)
    objects: set[int] = field(default_factory=set)
    is_committed: bool = False
    is_clean: bool = False


class Programs(RuleBasedStateMachine):
    """Random programs of a few saves on a few ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.processes: list[Process] = []
        self.saves = [Save(number) for number in range(SAVES)]
        self.plans = PlanCache()
        self.up: dict[int, list[tuple[Save, ToCoordinator]]] = {}  # by rank, in its order
        self.is_storage_gone = False
        self.do_stopped_commits_land = False

    @initialize(world=st.sampled_from([2, 3, 2, 3, 4, 1]), land=st.booleans())
    def set_up(self, world: int, land: bool) -> None:
        self.do_stopped_commits_land = land
        self.processes = [Process(rank) for rank in range(world)]

    # -- the program

    @rule(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        """A rank comes to its next save."""
        process = self._one(data, self._alive())
        save = self._next_save(process)
        if save is not None:
            self._begin(process, save, location=data.draw(st.sampled_from("aaaaaaab")))

    @rule()
    def begin_everywhere(self) -> None:
        """All ranks come to their next saves."""
        for process in self._alive():
            save = self._next_save(process)
            if save is not None:
                self._begin(process, save, location="a")

    @rule(data=st.data())
    def refuse(self, data: st.DataObject) -> None:
        """A rank refuses its next save on the caller's thread."""
        process = self._one(data, self._alive())
        save = self._next_save(process)
        if save is not None:
            save.refused.add(process.rank)
            if process.rank == 0:
                self._coordinate(save)
            self._carry_out(save, process, [Send(Failed(process.rank, "refused"))])

    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        """The service of a rank cancels a save."""
        process = self._one(data, self._alive())
        active = [
            save
            for save in self.saves
            if process.rank in save.members and save.members[process.rank].step is not Step.ENDED
        ]
        if not active:
            return
        save = self._one(data, active)
        member = save.members[process.rank]
        save.gave_up.add(process.rank)
        stopped = self._stop(save, process)
        self._carry_out(save, process, member.give_up("cancelled"))
        if process.rank == 0 and isinstance(stopped, Commit):
            assert save.coordinator is not None
            self._carry_out(save, process, save.coordinator.commit_failed("cancelled"))

    # -- the environment

    @rule(data=st.data(), seconds=st.sampled_from([0, 0.1, 2, 5, 6, 30, 1000]), times=st.integers(1, 40))
    def look(self, data: st.DataObject, seconds: float, times: int) -> None:
        """A rank looks at its clock, whatever it has not heard yet."""
        process = self._one(data, self._alive())
        for _ in range(times):
            process.now += seconds
            self._tick(process)

    @rule(data=st.data(), hears=st.booleans())
    def step(self, data: st.DataObject, hears: bool) -> None:
        """A rank hears what there is, or a message of it, and looks."""
        process = self._one(data, self._alive())
        if hears:
            self._hear(process, at_most=data.draw(st.integers(1, 3)))
        else:
            self._hear(process)
        self._tick(process)

    @rule(steps=st.integers(1, 24), goes_on=st.booleans(), claims_first=st.booleans())
    def progress(self, steps: int, goes_on: bool, claims_first: bool) -> None:
        """All goes well for a number of small steps; *goes_on* to the next save if there is nothing left to do."""
        for _ in range(steps):
            if claims_first and self._answer_any_claim():
                continue
            if not self._small_step() and goes_on:
                self.begin_everywhere()

    @rule(phase=st.sampled_from([Phase.WRITING, Phase.CLAIMING, Phase.COMMITTING, Phase.DECIDED]))
    def progress_to(self, phase: Phase) -> None:
        """All goes well until a save has come to *phase*, which may be over with the next message."""
        known = {save.number for save in self.saves if save.coordinator and save.coordinator.phase is phase}
        while self._small_step():
            if any(
                save.coordinator and save.coordinator.phase is phase and save.number not in known
                for save in self.saves
            ):
                return

    @precondition(lambda self: self._busy())
    @rule(data=st.data(), ok=st.booleans(), lands=st.booleans())
    def finish(self, data: st.DataObject, ok: bool, lands: bool) -> None:
        """What a rank does ends, well or not."""
        save, process = self._one(data, self._busy())
        self._finish(save, process, ok=ok, lands=lands)

    @precondition(lambda self: any(save.claiming for save in self.saves))
    @rule(data=st.data(), is_lost=st.booleans())
    def answer_claim(self, data: st.DataObject, is_lost: bool) -> None:
        """The store answers a claim, or its answer is lost."""
        save = self._one(data, [save for save in self.saves if save.claiming])
        process = self.processes[data.draw(st.sampled_from(sorted(save.claiming)))]
        self._answer_claim(save, process, is_lost=is_lost)

    @rule(data=st.data(), how=st.sampled_from(["kill", "kill", "cut off", "back", "hang", "go on"]))
    def harm(self, data: st.DataObject, how: str) -> None:
        """A rank is killed, cut off, or hangs; or is there again."""
        process = self._one(data, self._alive())
        if how == "kill":
            process.is_alive = False
            for save in self.saves:
                self._die_committing(save, process, data.draw(st.booleans()))
        elif how in ("cut off", "back"):
            process.is_cut_off = how == "cut off"
        else:
            process.is_hung = how == "hang"

    @rule(data=st.data())
    def lose_patience(self, data: st.DataObject) -> None:
        """A rank hears nothing for as long as it waits, and the store answers what it then claims."""
        process = self._one(data, self._alive())
        for _ in range(11):
            process.now += BOUNDS.longest_look_seconds
            self._tick(process)
        for save in self.saves:
            if process.rank in save.claiming:
                self._answer_claim(save, process, is_lost=False)

    @rule(is_gone=st.booleans(), land=st.booleans())
    def change_storage(self, is_gone: bool, land: bool) -> None:
        """Storage does not say what is there, or does again; what is cancelled takes place all the same, or not."""
        self.is_storage_gone = is_gone
        self.do_stopped_commits_land = land

    # -- what holds at any moment

    @invariant()
    def committed_is_whole(self) -> None:
        """What is committed has every rank's object, for ever (D5)."""
        for save in self.saves:
            if save.is_committed:
                assert save.objects == set(range(len(self.processes)))

    @invariant()
    def all_end_alike(self) -> None:
        """Nobody ends well where another ends badly, or where nothing is committed (E4)."""
        for save in self.saves:
            known = [failures for failures in save.ends.values() if not self._is_untold(failures)]
            assert len({not failures for failures in known}) < 2, save.ends
            for failures in known:
                assert save.is_committed or failures
                assert not (save.is_committed and failures), save.ends

    @invariant()
    def bounded(self) -> None:
        """What is remembered is one plan and one work a rank (B3)."""
        assert len(self.plans._of) <= len(self.processes)
        assert len(self.plans.works) <= len(self.processes)

    def teardown(self) -> None:
        """Where nothing more happens than clocks that go on, everybody ends, in time, and nothing stays behind (E5)."""
        if not self.processes:
            return
        for process in self._alive():
            process.is_hung = False
        begun = [(save, process) for process in self._alive() for save in self.saves]
        waiting = [
            (save, process)
            for save, process in begun
            if process.rank in save.members and process.rank not in save.gave_up
        ]
        seconds = 0.0
        while seconds < LONGEST_SECONDS:
            seconds += LOOK_SECONDS
            for process in self._alive():
                self._hear(process)
                process.now += LOOK_SECONDS
                self._tick(process)
            for save in self.saves:
                for process in self._alive():
                    if process.rank in save.claiming and process.hears:
                        self._answer_claim(save, process, is_lost=False)
            for save, process in self._busy():
                self._finish(save, process, ok=True, lands=True)
        for save, process in waiting:
            assert process.rank in save.ends, (save, process)
            if save.coordinator is not None and process.hears and self.processes[0].hears:
                assert save.is_clean
        self.committed_is_whole()
        self.all_end_alike()

    # -- the model

    def _small_step(self) -> bool:
        """Have the next thing happen that is due, in the order of ranks; return whether there was any."""
        for process in self._alive():
            if self._has_news(process):
                self._hear(process)
                self._tick(process)
                return True
        if self._answer_any_claim():
            return True
        for save, process in self._busy():
            self._finish(save, process, ok=True, lands=True)
            self._tick(process)
            return True
        return False

    def _answer_any_claim(self) -> bool:
        for save in self.saves:
            for rank in sorted(save.claiming):
                if self.processes[rank].is_alive:
                    self._answer_claim(save, self.processes[rank], is_lost=False)
                    return True
        return False

    def _has_news(self, process: Process) -> bool:
        if not process.hears:
            return False
        if process.rank == 0:
            return any(self.up.values())
        return any(
            process.rank in save.members
            and save.members[process.rank].step is not Step.ENDED
            and (save.read.get(process.rank, 0) < len(save.down) or save.end is not None)
            for save in self.saves
        )

    def _one(self, data: st.DataObject, among: Iterable[Any]) -> Any:
        return data.draw(st.sampled_from(list(among)))

    def _alive(self) -> list[Process]:
        # One that is dead stays, lest there be nobody to draw; nothing happens to it.
        return [process for process in self.processes if process.is_alive] or self.processes[:0] or [_NOBODY]

    def _busy(self) -> list[tuple[Save, Process]]:
        return [
            (save, self.processes[rank])
            for save in self.saves
            for rank in sorted(save.doing)
            if self.processes[rank].is_alive and not self.processes[rank].is_hung
        ]

    def _next_save(self, process: Process) -> Save | None:
        for save in self.saves:
            if process.is_alive and process.rank not in save.members and process.rank not in save.refused:
                return save
        return None

    def _begin(self, process: Process, save: Save, *, location: str) -> None:
        member = Participant(process.rank, sent_plan=process.sent_plan, bounds=BOUNDS, now=process.now)
        save.members[process.rank] = member
        if process.rank == 0:
            self._coordinate(save)
        fingerprint = b"%d" % (save.number // 2)
        plan = lambda: b"plan of " + fingerprint
        self._carry_out(
            save,
            process,
            member.begin(location=location, fingerprint=fingerprint, plan=plan, sizes=()),
        )

    def _coordinate(self, save: Save) -> None:
        if save.coordinator is None:
            save.coordinator = Coordinator(
                save.number,
                save_id=f"run-{save.number}",
                world_size=len(self.processes),
                plans=self.plans,
                bounds=BOUNDS,
                now=self.processes[0].now,
            )
            for message in save.early:
                save.coordinator.receive(message)
            save.early.clear()

    def _tick(self, process: Process) -> None:
        if not process.is_alive:
            return
        for save in self.saves:
            if process.rank == 0 and save.coordinator is not None:
                coordinator = save.coordinator
                is_alone = 0 not in save.members or save.members[0].step is Step.ENDED
                if not process.is_hung or is_alone:
                    self._carry_out(save, process, coordinator.beat())
                self._carry_out(save, process, coordinator.tick(process.now, is_in_touch=process.hears))
            member = save.members.get(process.rank)
            if member is not None:
                if not process.is_hung:
                    self._carry_out(save, process, member.beat())
                self._carry_out(save, process, member.tick(process.now, is_in_touch=process.hears))

    def _hear(self, process: Process, at_most: int = 1_000_000) -> None:
        if not process.hears:
            return
        if process.rank == 0:
            for queue in self.up.values():
                for save, message in queue[:at_most]:
                    self._hear_rank(save, message)
                del queue[:at_most]
            return
        for save in self.saves:
            if process.rank in save.members:
                self._read(save, process, at_most)

    def _hear_rank(self, save: Save, message: ToCoordinator) -> None:
        if isinstance(message, Ready):
            message = self.plans.complete(message)
            assert message.plan == b"plan of " + message.fingerprint
        if save.coordinator is None:
            save.early.append(message)
        else:
            save.coordinator.receive(message)

    def _read(self, save: Save, process: Process, at_most: int) -> None:
        for _ in range(at_most):
            place = save.read.get(process.rank, 0)
            if save.end is not None:
                self._carry_out(save, process, save.members[process.rank].receive(save.end))
                return
            if place >= len(save.down):
                return
            save.read[process.rank] = place + 1
            message = save.down[place]
            if isinstance(message, Go):
                message = save.works.get(process.rank, message)
            self._tell(save, process, message)

    def _tell(self, save: Save, process: Process, message: FromCoordinator) -> None:
        member = save.members.get(process.rank)
        if member is None:
            return
        if isinstance(message, Go) and member.step is Step.WAITING:
            if message.work is not None:
                process.work = message.planned
            assert process.work == message.planned, "the work of last time is not the one that is meant"
        self._carry_out(save, process, member.receive(message))

    def _carry_out(self, save: Save, process: Process, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Send(message):
                    assert message.rank == process.rank
                    self._say(save, process, message)
                case Broadcast() | Scatter() | CleanUp():
                    self._publish(save, process, action)
                case Claim(claim):
                    owner = save.coordinator if claim == COMMIT else save.members[process.rank]
                    save.claiming.setdefault(process.rank, []).append((owner, action))
                case Stop():
                    self._stop(save, process)
                case Undo():
                    save.objects.discard(process.rank)
                case End(failures):
                    assert process.rank not in save.ends, "it ended twice"
                    assert process.rank not in save.doing, "it ended, and went on"
                    save.ends[process.rank] = failures
                case _:
                    self._do(save, process, action)

    def _say(self, save: Save, process: Process, message: ToCoordinator) -> None:
        if process.rank == 0:
            self._hear_rank(save, message)
        elif process.hears:
            self.up.setdefault(process.rank, []).append((save, message))

    def _publish(self, save: Save, process: Process, action: Broadcast | Scatter | CleanUp) -> None:
        assert not save.is_clean, "nobody listens"
        if isinstance(action, CleanUp):
            save.is_clean = True
            if process.hears:
                save.down.clear()
                save.works.clear()
                save.end = action.verdict if action.unheard - {0} else None
            return
        if isinstance(action, Scatter):
            assert set(action.messages) == set(range(len(self.processes)))
            message: FromCoordinator = action.messages[0]
            if process.hears:
                save.works.update(action.messages)
        else:
            message = action.message
        if process.hears:
            save.down.append(message)
        self._tell(save, process, message)

    def _stop(self, save: Save, process: Process) -> Action | None:
        """Cancel what a rank does; storage may have been asked for it already."""
        stopped = save.doing.pop(process.rank, None)
        if isinstance(stopped, Commit) and self.do_stopped_commits_land:
            self._commit(save)
        return stopped

    def _do(self, save: Save, process: Process, action: Action) -> None:
        if isinstance(action, LookUp) and process.rank in save.gave_up:
            self._reply_look(save, process, None)  # nobody is left who could
            return
        assert process.rank not in save.doing, "two things at a time"
        if isinstance(action, Plan):
            assert set(action.readies) == set(range(len(self.processes)))
        save.doing[process.rank] = action

    def _finish(self, save: Save, process: Process, *, ok: bool, lands: bool) -> None:
        action = save.doing.pop(process.rank, None)
        coordinator, member = save.coordinator, save.members.get(process.rank)
        done: list[Action] = []
        match action:
            case Plan() if coordinator is not None:
                is_new = self.plans.planned is None or save.number % 2 == 0
                works = dict.fromkeys(range(len(self.processes)), b"")
                done = coordinator.planned(works if is_new else None) if ok else coordinator.failed("plan")
            case Write() if member is not None:
                if ok:
                    save.objects.add(process.rank)
                done = member.wrote() if ok else member.failed("write")
            case Commit() if coordinator is not None:
                if ok or lands:
                    self._commit(save)
                done = coordinator.committed() if ok else coordinator.commit_failed("commit")
            case LookUp():
                self._land_in_flight(save, lands)
                self._reply_look(save, process, None if self.is_storage_gone else save.is_committed)
        self._carry_out(save, process, done)

    def _reply_look(self, save: Save, process: Process, found: bool | None) -> None:
        coordinator = save.coordinator
        if process.rank == 0 and coordinator is not None and coordinator.phase is Phase.LOOKING:
            self._carry_out(save, process, coordinator.looked_up(found))
        else:
            self._carry_out(save, process, save.members[process.rank].looked_up(found))

    def _land_in_flight(self, save: Save, lands: bool) -> None:
        """A commit that others have waited for in vain takes place before they look, or never."""
        if isinstance(save.doing.get(0), Commit):
            self._finish(save, self.processes[0], ok=False, lands=lands)

    def _die_committing(self, save: Save, process: Process, lands: bool) -> None:
        action = save.doing.pop(process.rank, None)
        save.claiming.pop(process.rank, None)
        if isinstance(action, Commit) and lands:
            self._commit(save)

    def _commit(self, save: Save) -> None:
        assert save.objects == set(range(len(self.processes))), "D5"
        save.is_committed = True

    def _answer_claim(self, save: Save, process: Process, *, is_lost: bool) -> None:
        claims = save.claiming[process.rank]
        owner, action = claims.pop(0)
        if not claims:
            del save.claiming[process.rank]
        holder: ClaimHolder = None
        if process.hears:
            if save.holder is None:
                save.holder = action.claim
            holder = None if is_lost else save.holder
        self._carry_out(save, process, owner.claimed(holder))

    def _is_untold(self, failures: Mapping[int, str]) -> bool:
        return any("cannot be told" in why for why in failures.values())


_NOBODY = Process(rank=-1, is_alive=False)

TestPrograms = Programs.TestCase
# Many more than of others: a program is short, and most of what matters is where two rare things meet.
TestPrograms.settings = settings(max_examples=2 * settings.default.max_examples)
