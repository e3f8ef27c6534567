"""The queue against a model of the world, under random programs: what holds after any of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from async_ckpt.engine.queue import Action, Cancel, Drop, Kind, Lane, Op, Phase, Start, Supersede
from tests.support import Play, lane

KEYS = st.sampled_from("abcd")
LIMIT = 4


@dataclass
class Fate:
    """What is known about one operation, kept by the model."""

    op: Op
    outcome: str = "live"  # then: done, failed, dropped, withdrawn, refused, replaced
    heir: Op | None = None  # of a replaced save
    saves_before: list[Op] = field(
        default_factory=list
    )  # of a removal, links among them; of a link, the one it needs


class Programs(RuleBasedStateMachine):
    """Random programs on two services; the environment stages and ends what it may, well or badly."""

    overflows = ("block", "block")

    def __init__(self) -> None:
        super().__init__()
        self.play = _Watched(LIMIT, self._see)
        self.fates: dict[int, Fate] = {}
        self.lanes: list[Lane] = []
        self.order: dict[str, list[Op]] = {key: [] for key in "abcd"}
        self.world: dict[str, int] = {}

    @initialize(
        depths=st.tuples(st.integers(1, 3), st.integers(1, 3)),
        concurrent=st.integers(1, 2),
        overflow=st.sampled_from(["block", "supersede", "raise"]),
    )
    def begin(self, depths: tuple[int, int], concurrent: int, overflow: str) -> None:
        self.lanes = [lane(depth, concurrent=concurrent, overflow=overflow) for depth in depths]

    # -- the program

    @rule(which=st.integers(0, 1), key=KEYS, nbytes=st.integers(0, 6))
    def save(self, which: int, key: str, nbytes: int) -> None:
        self._add(self.lanes[which], Kind.SAVE, key, nbytes=nbytes)

    @rule(which=st.integers(0, 1), key=KEYS)
    def remove(self, which: int, key: str) -> None:
        self._add(self.lanes[which], Kind.REMOVE, key)

    @rule(which=st.integers(0, 1), key=KEYS, to=KEYS)
    def link(self, which: int, key: str, to: str) -> None:
        if key != to:
            self._add(self.lanes[which], Kind.LINK, key, target=to)

    @rule(which=st.integers(0, 1), key=KEYS)
    def load(self, which: int, key: str) -> None:
        self._add(self.lanes[which], Kind.LOAD, key)

    # -- the environment

    @precondition(lambda self: self._in(Phase.STAGING))
    @rule(data=st.data())
    def stage(self, data: st.DataObject) -> None:
        self.play.stage(data.draw(st.sampled_from(self._in(Phase.STAGING))))

    @precondition(lambda self: self._in(Phase.RUNNING))
    @rule(data=st.data(), ok=st.booleans())
    def end(self, data: st.DataObject, ok: bool) -> None:
        self._end(data.draw(st.sampled_from(self._in(Phase.RUNNING))), ok)

    @precondition(lambda self: self._in(Phase.WAITING, Phase.STAGING))
    @rule(data=st.data())
    def interrupt(self, data: st.DataObject) -> None:
        op = data.draw(st.sampled_from(self._in(Phase.WAITING, Phase.STAGING)))
        self.fates[op.id].outcome = "withdrawn"
        self.play.withdraw(op)

    # -- what holds at any moment

    @invariant()
    def depth_is_kept(self) -> None:
        """Never more than queue_depth saves of a service are accepted (B1)."""
        for of in self.lanes:
            accepted = [op for op in self._in(*set(Phase) - {Phase.WAITING}, kind=Kind.SAVE) if op.lane is of]
            assert len(accepted) <= of.queue_depth

    @invariant()
    def memory_is_kept(self) -> None:
        """Accepted saves fit the limit, or one is held alone (B1)."""
        accepted = self._in(*set(Phase) - {Phase.WAITING}, kind=Kind.SAVE)
        for of in self.lanes:
            held = [op.nbytes for op in accepted if op.lane is of and op.nbytes]
            assert sum(held) <= LIMIT or len(held) == 1

    @invariant()
    def something_can_go_on(self) -> None:
        """Whatever waits, waits for something that is running or staging: there is no deadlock."""
        if len(self.play.queue):
            assert self._in(Phase.RUNNING, Phase.STAGING)

    @invariant()
    def nobody_gives_way_to_one_who_waits(self) -> None:
        """A save that superseded another has been admitted: what waits for it never waits for memory (D4)."""
        heirs = [fate.heir for fate in self.fates.values() if fate.heir is not None]
        assert not [heir for heir in heirs if heir.phase is Phase.WAITING]

    @invariant()
    def one_location_runs_one_operation(self) -> None:
        """Two operations of one location never run at the same time, but for loads (O1)."""
        running = self._in(Phase.RUNNING)
        keys = [op.key for op in running if op.kind is not Kind.LOAD]
        assert len(keys) == len(set(keys))
        assert not {op.key for op in running if op.kind is Kind.LOAD} & set(keys)

    @invariant()
    def loads_wait_for_no_loads(self) -> None:
        """A load that waits, waits for an earlier operation that is none (O2)."""
        for load in self._in(Phase.QUEUED, kind=Kind.LOAD):
            accepted = self._in(*set(Phase) - {Phase.WAITING})
            others = [op for op in accepted if op.key == load.key and op.kind is not Kind.LOAD]
            assert [op for op in others if op.id < load.id]

    def teardown(self) -> None:
        """Everything ends once the running work ends."""
        while len(self.play.queue):
            staging, running = self._in(Phase.STAGING), self._in(Phase.RUNNING)
            assert staging or running, "a deadlock"
            for op in staging:
                self.play.stage(op)
            if running:
                self._end(running[0], True)

    # -- the model

    def _in(self, *phases: Phase, kind: Kind | None = None) -> list[Op]:
        live = [fate.op for fate in self.fates.values() if fate.outcome == "live"]
        return [op for op in live if op.phase in phases and kind in (None, op.kind)]

    def _add(self, of: Lane, kind: Kind, key: str, nbytes: int = 0, target: str | None = None) -> Op:
        before = [
            fate.op
            for fate in self.fates.values()
            if fate.op.lane is of and fate.op.kind in (Kind.SAVE, Kind.LINK) and self._was_accepted(fate)
        ]
        if kind is Kind.LINK:
            removed = [
                f.op.id for f in self.fates.values() if f.op.kind is Kind.REMOVE and f.op.key == target
            ]
            since = max(removed, default=0)  # else the program itself has made it lead nowhere
            before = [op for op in before if op.kind is Kind.SAVE and op.key == target and op.id > since][-1:]
        return self.play.add_watched(
            lambda op: self.fates.setdefault(op.id, Fate(op, saves_before=before)),
            of,
            kind,
            key,
            nbytes=nbytes,
            target=target,
        )

    def _was_accepted(self, fate: Fate) -> bool:
        if fate.outcome in ("refused", "withdrawn"):
            return False
        return fate.outcome != "live" or fate.op.phase is not Phase.WAITING

    def _end(self, op: Op, ok: bool) -> None:
        if op.kind is Kind.LOAD:
            self.fates[op.id].outcome = "done"
            self.play.withdraw(op)
            return
        self.fates[op.id].outcome = "done" if ok else "failed"
        if ok:
            if op.kind is Kind.SAVE:
                self.world[op.key] = op.id
            elif op.kind is Kind.REMOVE:
                self.world.pop(op.key, None)
        self.play.end(op, ok=ok)

    def _see(self, action: Action) -> None:
        """Check each decision as it is taken."""
        fate = self.fates[action.op.id]
        match action:
            case Start(op):
                self._check_order(op)
                if op.kind is Kind.REMOVE:
                    self._check_removal(fate)
                if op.kind is Kind.LINK:
                    assert all(self._end_of(save, set()) == "done" for save in fate.saves_before)
            case Supersede(op, by) | Cancel(op, by):
                assert op.phase is Phase.QUEUED
                assert op.key == by.key
                fate.outcome, fate.heir = "replaced", by
            case Drop():
                fate.outcome = "dropped"
            case _ if type(action).__name__ == "Refuse":
                fate.outcome = "refused"

    def _check_order(self, op: Op) -> None:
        """What was accepted before on the location has ended (O1)."""
        accepted = self._in(*set(Phase) - {Phase.WAITING})
        before = [other for other in accepted if other.key == op.key and other.id < op.id]
        assert not [other for other in before if not (op.kind is other.kind is Kind.LOAD)]

    def _check_removal(self, removal: Fate) -> None:
        """Every save and link before it took effect, or was made needless by one that did, or is made up for (D3)."""
        for save in removal.saves_before:
            end = self._end_of(save, set())
            assert end != "live", (removal.op, save)
            if end != "done":
                assert self._made_up_for(save, removal), (removal.op, save, end)

    def _end_of(self, save: Op, seen: set[int]) -> str:
        """Return how a save ended, or what took its place, over any number of replacements."""
        fate = self.fates[save.id]
        if fate.outcome != "replaced":
            return fate.outcome
        assert fate.heir is not None
        if fate.heir.kind is Kind.SAVE:
            return self._end_of(fate.heir, seen)
        return "done"  # the program itself asked for it to be gone

    def _made_up_for(self, save: Op, removal: Fate) -> bool:
        newer = [
            fate.op
            for fate in self.fates.values()
            if fate.op.kind in (Kind.SAVE, save.kind) and fate.outcome == "done" and fate.op.id > save.id
        ]
        asked_to_remove = any(
            fate.op.kind is Kind.REMOVE and fate.op.key == save.key and save.id < fate.op.id < removal.op.id
            for fate in self.fates.values()
        )
        return asked_to_remove or any(
            op.key == save.key or (op.kind is Kind.SAVE and op.key != removal.op.key) for op in newer
        )


class _Watched(Play):
    """A play whose decisions are seen before they are carried out."""

    def __init__(self, limit: int, see: object) -> None:
        super().__init__(limit)
        self._see = see

    def add_watched(self, note: object, of: Lane, kind: Kind, key: str, **more: Any) -> Op:
        self._note = note
        return self.add(of, kind, key, **more)

    def arrived(self, op: Op) -> None:
        self._note(op)  # type: ignore[operator]

    def carry_out(self, action: Action) -> None:
        self._see(action)  # type: ignore[operator]
        super().carry_out(action)


class LastGoodCheckpoint(Programs):
    """A program on one service that always keeps one save unremoved, while any saves fail."""

    @rule(which=st.just(0), key=KEYS, nbytes=st.integers(0, 6))
    def save(self, which: int, key: str, nbytes: int) -> None:
        super().save(which, key, nbytes)

    @rule(which=st.just(0), key=KEYS)
    def load(self, which: int, key: str) -> None:
        super().load(which, key)

    @rule(which=st.just(0), key=KEYS, to=KEYS)
    def link(self, which: int, key: str, to: str) -> None:
        super().link(which, key, to)

    @rule(which=st.just(0), key=KEYS)
    def remove(self, which: int, key: str) -> None:
        if self._kept() - {key}:
            super().remove(which, key)

    @invariant()
    def a_checkpoint_is_left(self) -> None:
        """If ever one was durable, one can be loaded (D3)."""
        saved = any(fate.op.kind is Kind.SAVE and fate.outcome == "done" for fate in self.fates.values())
        assert self.world or not saved

    def _kept(self) -> set[str]:
        """Return the locations that the program counts on: it saved them, was not refused, and never removed them."""
        kept: set[str] = set()
        for fate in self.fates.values():
            if fate.op.kind is Kind.SAVE and self._was_accepted(fate):
                kept.add(fate.op.key)
            elif fate.op.kind is Kind.REMOVE:
                kept.discard(fate.op.key)
        return kept


TestPrograms = Programs.TestCase
TestLastGoodCheckpoint = LastGoodCheckpoint.TestCase
