"""A world for the agreement of sharded saves: ranks, messages on their way, a claim, storage; all in virtual time.

It checks what it is asked to do: nobody ends twice, nothing is committed of which a part is missing (D5).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from async_ckpt.sharded.agreement.coordinator import Coordinator, Phase
from async_ckpt.sharded.agreement.messages import FromCoordinator, Go, Ready, ToCoordinator, Verdict
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


class World:
    """The ranks, their saves, and everything between them.

    Args:
        world_size: the number of ranks.
        land: whether a commit that is cancelled takes effect all the same.

    Attributes:
        up: by rank, the messages on their way to the coordinator, in order.
        is_storage_gone: whether storage does not answer.
    """

    def __init__(self, world_size: int, *, land: bool) -> None:
        self.processes = [Process(rank) for rank in range(world_size)]
        self.saves = [Save(number) for number in range(SAVES)]
        self.plans = PlanCache()
        self.up: dict[int, list[tuple[Save, ToCoordinator]]] = {}
        self.is_storage_gone = False
        self.do_stopped_commits_land = land

    def small_step(self) -> bool:
        """Have the next thing happen that is due, in the order of ranks; return whether there was any."""
        for process in self.alive():
            if self.has_news(process):
                self.hear(process)
                self.tick(process)
                return True
        if self.answer_any_claim():
            return True
        for save, process in self.busy():
            self.finish(save, process, ok=True, lands=True)
            self.tick(process)
            return True
        return False

    def answer_any_claim(self) -> bool:
        """Answer the first claim there is; return whether there was one."""
        for save in self.saves:
            for rank in sorted(save.claiming):
                if self.processes[rank].is_alive:
                    self.answer_claim(save, self.processes[rank], is_lost=False)
                    return True
        return False

    def has_news(self, process: Process) -> bool:
        """Return whether there are messages for a rank."""
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

    def alive(self) -> list[Process]:
        """Return the ranks that live; one to which nothing happens if there is none."""
        # One that is dead stays, lest there be nobody to draw; nothing happens to it.
        return [process for process in self.processes if process.is_alive] or self.processes[:0] or [_NOBODY]

    def busy(self) -> list[tuple[Save, Process]]:
        """Return what is being done now, by save and rank."""
        return [
            (save, self.processes[rank])
            for save in self.saves
            for rank in sorted(save.doing)
            if self.processes[rank].is_alive and not self.processes[rank].is_hung
        ]

    def next_save(self, process: Process) -> Save | None:
        """Return the next save of a rank."""
        for save in self.saves:
            if process.is_alive and process.rank not in save.members and process.rank not in save.refused:
                return save
        return None

    def begin(self, process: Process, save: Save, *, location: str) -> None:
        """Begin a save on a rank."""
        member = Participant(process.rank, sent_plan=process.sent_plan, bounds=BOUNDS, now=process.now)
        save.members[process.rank] = member
        if process.rank == 0:
            self.coordinate(save)
        fingerprint = b"%d" % (save.number // 2)
        plan = lambda: b"plan of " + fingerprint
        self.carry_out(
            save,
            process,
            member.begin(location=location, fingerprint=fingerprint, plan=plan, sizes=()),
        )

    def coordinate(self, save: Save) -> None:
        """Make the coordinator of a save, if there is none."""
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

    def tick(self, process: Process) -> None:
        """Advance the state machines of a rank."""
        if not process.is_alive:
            return
        for save in self.saves:
            if process.rank == 0 and save.coordinator is not None:
                coordinator = save.coordinator
                is_alone = 0 not in save.members or save.members[0].step is Step.ENDED
                if not process.is_hung or is_alone:
                    self.carry_out(save, process, coordinator.beat())
                self.carry_out(save, process, coordinator.tick(process.now, is_connected=process.hears))
            member = save.members.get(process.rank)
            if member is not None:
                if not process.is_hung:
                    self.carry_out(save, process, member.beat())
                self.carry_out(save, process, member.tick(process.now, is_connected=process.hears))

    def hear(self, process: Process, at_most: int = 1_000_000) -> None:
        """Deliver messages to a rank."""
        if not process.hears:
            return
        if process.rank == 0:
            for queue in self.up.values():
                for save, message in queue[:at_most]:
                    self.hear_rank(save, message)
                del queue[:at_most]
            return
        for save in self.saves:
            if process.rank in save.members:
                self.read(save, process, at_most)

    def hear_rank(self, save: Save, message: ToCoordinator) -> None:
        """Deliver a message to the coordinator."""
        if isinstance(message, Ready):
            message = self.plans.complete(message)
            assert message.plan == b"plan of " + message.fingerprint
        if save.coordinator is None:
            save.early.append(message)
        else:
            save.coordinator.receive(message)

    def read(self, save: Save, process: Process, at_most: int) -> None:
        """Deliver messages of the coordinator to a rank."""
        for _ in range(at_most):
            place = save.read.get(process.rank, 0)
            if save.end is not None:
                self.carry_out(save, process, save.members[process.rank].receive(save.end))
                return
            if place >= len(save.down):
                return
            save.read[process.rank] = place + 1
            message = save.down[place]
            if isinstance(message, Go):
                message = save.works.get(process.rank, message)
            self.tell(save, process, message)

    def tell(self, save: Save, process: Process, message: FromCoordinator) -> None:
        """Deliver one message of the coordinator to a rank."""
        member = save.members.get(process.rank)
        if member is None:
            return
        if isinstance(message, Go) and member.step is Step.WAITING:
            if message.work is not None:
                process.work = message.planned
            assert process.work == message.planned, "the work of last time is not the one that is meant"
        self.carry_out(save, process, member.receive(message))

    def carry_out(self, save: Save, process: Process, actions: list[Action]) -> None:
        """Carry out what a state machine has returned."""
        for action in actions:
            match action:
                case Send(message):
                    assert message.rank == process.rank
                    self.say(save, process, message)
                case Broadcast() | Scatter() | CleanUp():
                    self.publish(save, process, action)
                case Claim(claim):
                    owner = save.coordinator if claim == COMMIT else save.members[process.rank]
                    save.claiming.setdefault(process.rank, []).append((owner, action))
                case Stop():
                    self.stop(save, process)
                case Undo():
                    save.objects.discard(process.rank)
                case End(failures):
                    assert process.rank not in save.ends, "it ended twice"
                    assert process.rank not in save.doing, "it ended, and went on"
                    save.ends[process.rank] = failures
                case _:
                    self.do(save, process, action)

    def say(self, save: Save, process: Process, message: ToCoordinator) -> None:
        """Send a message to the coordinator."""
        if process.rank == 0:
            self.hear_rank(save, message)
        elif process.hears:
            self.up.setdefault(process.rank, []).append((save, message))

    def publish(self, save: Save, process: Process, action: Broadcast | Scatter | CleanUp) -> None:
        """Send a message of the coordinator to all ranks."""
        assert not save.is_clean, "nobody listens"
        if isinstance(action, CleanUp):
            save.is_clean = True
            if process.hears:
                save.down.clear()
                save.works.clear()
                save.end = action.verdict if action.unacknowledged - {0} else None
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
        self.tell(save, process, message)

    def stop(self, save: Save, process: Process) -> Action | None:
        """Cancel what a rank does; storage may have been asked for it already."""
        stopped = save.doing.pop(process.rank, None)
        if isinstance(stopped, Commit) and self.do_stopped_commits_land:
            self.commit(save)
        return stopped

    def do(self, save: Save, process: Process, action: Action) -> None:
        """Begin an action that takes time."""
        if isinstance(action, LookUp) and process.rank in save.gave_up:
            self.reply_look(save, process, None)  # nobody is left who could
            return
        assert process.rank not in save.doing, "two things at a time"
        if isinstance(action, Plan):
            assert set(action.readies) == set(range(len(self.processes)))
        save.doing[process.rank] = action

    def finish(self, save: Save, process: Process, *, ok: bool, lands: bool) -> None:
        """End what a rank is doing, well or not."""
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
                    self.commit(save)
                done = coordinator.committed() if ok else coordinator.commit_failed("commit")
            case LookUp():
                self.land_in_flight(save, lands)
                self.reply_look(save, process, None if self.is_storage_gone else save.is_committed)
        self.carry_out(save, process, done)

    def reply_look(self, save: Save, process: Process, found: bool | None) -> None:
        """Report what was found in storage."""
        coordinator = save.coordinator
        if process.rank == 0 and coordinator is not None and coordinator.phase is Phase.LOOKING_UP:
            self.carry_out(save, process, coordinator.looked_up(found))
        else:
            self.carry_out(save, process, save.members[process.rank].looked_up(found))

    def land_in_flight(self, save: Save, lands: bool) -> None:
        """A commit that others have waited for in vain takes place before they look, or never."""
        if isinstance(save.doing.get(0), Commit):
            self.finish(save, self.processes[0], ok=False, lands=lands)

    def die_committing(self, save: Save, process: Process, lands: bool) -> None:
        """Let a rank die, maybe while its commit takes effect."""
        action = save.doing.pop(process.rank, None)
        save.claiming.pop(process.rank, None)
        if isinstance(action, Commit) and lands:
            self.commit(save)

    def commit(self, save: Save) -> None:
        """Let a commit take effect."""
        assert save.objects == set(range(len(self.processes))), "D5"
        save.is_committed = True

    def answer_claim(self, save: Save, process: Process, *, is_lost: bool) -> None:
        """Let the store answer the oldest claim of a rank, or lose the answer."""
        claims = save.claiming[process.rank]
        owner, action = claims.pop(0)
        if not claims:
            del save.claiming[process.rank]
        holder: ClaimHolder = None
        if process.hears:
            if save.holder is None:
                save.holder = action.claim
            holder = None if is_lost else save.holder
        self.carry_out(save, process, owner.claimed(holder))

    def is_unknown(self, failures: Mapping[int, str]) -> bool:
        """Return whether the outcome is reported as unknown."""
        return any("it is unknown" in why for why in failures.values())


_NOBODY = Process(rank=-1, is_alive=False)
