"""The agreement against a model of the world, under random programs: what holds after any of them.

The world loses ranks at any message, keeps messages back for as long as it likes, cuts ranks off from the store, stops
their clocks and lets them jump, and loses the answers of storage. One thing it does not do: let a commit take place
after somebody, who has waited for its rank in vain, has asked storage whether it did.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from async_ckpt.sharded.agreement.coordinator import Phase
from async_ckpt.sharded.agreement.messages import Failed
from async_ckpt.sharded.agreement.participant import Step
from async_ckpt.sharded.agreement.protocol import Commit, Send
from tests.agreement_world import BOUNDS, World

LOOK_SECONDS = 6.0
#: A late rank, then silence for the verdict, a claim that is not answered, a look that is not.
LONGEST_SECONDS = BOUNDS.lateness_seconds + 4 * BOUNDS.silence_seconds


class Programs(RuleBasedStateMachine):
    """Random programs of a few saves on a few ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(0, land=False)

    @initialize(world=st.sampled_from([2, 3, 2, 3, 4, 1]), land=st.booleans())
    def set_up(self, world: int, land: bool) -> None:
        self.world = World(world, land=land)

    # -- the program

    @rule(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        """A rank comes to its next save."""
        process = self._one(data, self.world.alive())
        save = self.world.next_save(process)
        if save is not None:
            self.world.begin(process, save, location=data.draw(st.sampled_from("aaaaaaab")))

    @rule()
    def begin_everywhere(self) -> None:
        """All ranks come to their next saves."""
        for process in self.world.alive():
            save = self.world.next_save(process)
            if save is not None:
                self.world.begin(process, save, location="a")

    @rule(data=st.data())
    def refuse(self, data: st.DataObject) -> None:
        """A rank refuses its next save on the caller's thread."""
        process = self._one(data, self.world.alive())
        save = self.world.next_save(process)
        if save is not None:
            save.refused.add(process.rank)
            if process.rank == 0:
                self.world.coordinate(save)
            self.world.carry_out(save, process, [Send(Failed(process.rank, "refused"))])

    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        """The service of a rank cancels a save."""
        process = self._one(data, self.world.alive())
        active = [
            save
            for save in self.world.saves
            if process.rank in save.members and save.members[process.rank].step is not Step.ENDED
        ]
        if not active:
            return
        save = self._one(data, active)
        member = save.members[process.rank]
        save.gave_up.add(process.rank)
        stopped = self.world.stop(save, process)
        self.world.carry_out(save, process, member.give_up("cancelled"))
        if process.rank == 0 and isinstance(stopped, Commit):
            assert save.coordinator is not None
            self.world.carry_out(save, process, save.coordinator.commit_failed("cancelled"))

    # -- the environment

    @rule(data=st.data(), seconds=st.sampled_from([0, 0.1, 2, 5, 6, 30, 1000]), times=st.integers(1, 40))
    def look(self, data: st.DataObject, seconds: float, times: int) -> None:
        """A rank looks at its clock, whatever it has not heard yet."""
        process = self._one(data, self.world.alive())
        for _ in range(times):
            process.now += seconds
            self.world.tick(process)

    @rule(data=st.data(), hears=st.booleans())
    def step(self, data: st.DataObject, hears: bool) -> None:
        """A rank hears what there is, or a message of it, and looks."""
        process = self._one(data, self.world.alive())
        if hears:
            self.world.hear(process, at_most=data.draw(st.integers(1, 3)))
        else:
            self.world.hear(process)
        self.world.tick(process)

    @rule(steps=st.integers(1, 24), goes_on=st.booleans(), claims_first=st.booleans())
    def progress(self, steps: int, goes_on: bool, claims_first: bool) -> None:
        """All goes well for a number of small steps; *goes_on* to the next save if there is nothing left to do."""
        for _ in range(steps):
            if claims_first and self.world.answer_any_claim():
                continue
            if not self.world.small_step() and goes_on:
                self.begin_everywhere()

    @rule(phase=st.sampled_from([Phase.WRITING, Phase.CLAIMING, Phase.COMMITTING, Phase.DECIDED]))
    def progress_to(self, phase: Phase) -> None:
        """All goes well until a save has come to *phase*, which may be over with the next message."""
        known = {
            save.number for save in self.world.saves if save.coordinator and save.coordinator.phase is phase
        }
        while self.world.small_step():
            if any(
                save.coordinator and save.coordinator.phase is phase and save.number not in known
                for save in self.world.saves
            ):
                return

    @precondition(lambda self: self.world.busy())
    @rule(data=st.data(), ok=st.booleans(), lands=st.booleans())
    def finish(self, data: st.DataObject, ok: bool, lands: bool) -> None:
        """What a rank does ends, well or not."""
        save, process = self._one(data, self.world.busy())
        self.world.finish(save, process, ok=ok, lands=lands)

    @precondition(lambda self: any(save.claiming for save in self.world.saves))
    @rule(data=st.data(), is_lost=st.booleans())
    def answer_claim(self, data: st.DataObject, is_lost: bool) -> None:
        """The store answers a claim, or its answer is lost."""
        save = self._one(data, [save for save in self.world.saves if save.claiming])
        process = self.world.processes[data.draw(st.sampled_from(sorted(save.claiming)))]
        self.world.answer_claim(save, process, is_lost=is_lost)

    @rule(data=st.data(), how=st.sampled_from(["kill", "kill", "cut off", "back", "hang", "go on"]))
    def harm(self, data: st.DataObject, how: str) -> None:
        """A rank is killed, cut off, or hangs; or is there again."""
        process = self._one(data, self.world.alive())
        if how == "kill":
            process.is_alive = False
            for save in self.world.saves:
                self.world.die_committing(save, process, data.draw(st.booleans()))
        elif how in ("cut off", "back"):
            process.is_cut_off = how == "cut off"
        else:
            process.is_hung = how == "hang"

    @rule(data=st.data())
    def lose_patience(self, data: st.DataObject) -> None:
        """A rank hears nothing for as long as it waits, and the store answers what it then claims."""
        process = self._one(data, self.world.alive())
        for _ in range(11):
            process.now += BOUNDS.longest_poll_seconds
            self.world.tick(process)
        for save in self.world.saves:
            if process.rank in save.claiming:
                self.world.answer_claim(save, process, is_lost=False)

    @rule(is_gone=st.booleans(), land=st.booleans())
    def change_storage(self, is_gone: bool, land: bool) -> None:
        """Storage does not say what is there, or does again; what is cancelled takes place all the same, or not."""
        self.world.is_storage_gone = is_gone
        self.world.do_stopped_commits_land = land

    # -- what holds at any moment

    @invariant()
    def committed_is_whole(self) -> None:
        """What is committed has every rank's object, for ever (D5)."""
        for save in self.world.saves:
            if save.is_committed:
                assert save.objects == set(range(len(self.world.processes)))

    @invariant()
    def all_end_alike(self) -> None:
        """Nobody ends well where another ends badly, or where nothing is committed (E4)."""
        for save in self.world.saves:
            known = [failures for failures in save.ends.values() if not self.world.is_unknown(failures)]
            assert len({not failures for failures in known}) < 2, save.ends
            for failures in known:
                assert save.is_committed or failures
                assert not (save.is_committed and failures), save.ends

    @invariant()
    def bounded(self) -> None:
        """What is remembered is one plan and one work a rank (B3)."""
        assert len(self.world.plans._of) <= len(self.world.processes)
        assert len(self.world.plans.works) <= len(self.world.processes)

    def teardown(self) -> None:
        """Where nothing more happens than clocks that go on, everybody ends, in time, and nothing stays behind (E5)."""
        if not self.world.processes:
            return
        for process in self.world.alive():
            process.is_hung = False
        begun = [(save, process) for process in self.world.alive() for save in self.world.saves]
        waiting = [
            (save, process)
            for save, process in begun
            if process.rank in save.members and process.rank not in save.gave_up
        ]
        seconds = 0.0
        while seconds < LONGEST_SECONDS:
            seconds += LOOK_SECONDS
            for process in self.world.alive():
                self.world.hear(process)
                process.now += LOOK_SECONDS
                self.world.tick(process)
            for save in self.world.saves:
                for process in self.world.alive():
                    if process.rank in save.claiming and process.hears:
                        self.world.answer_claim(save, process, is_lost=False)
            for save, process in self.world.busy():
                self.world.finish(save, process, ok=True, lands=True)
        for save, process in waiting:
            assert process.rank in save.ends, (save, process)
            if save.coordinator is not None and process.hears and self.world.processes[0].hears:
                assert save.is_clean
        self.committed_is_whole()
        self.all_end_alike()

    def _one(self, data: st.DataObject, among: Iterable[Any]) -> Any:
        return data.draw(st.sampled_from(list(among)))


TestPrograms = Programs.TestCase
# Many more than of others: a program is short, and most of what matters is where two rare things meet.
TestPrograms.settings = settings(max_examples=2 * settings.default.max_examples)
