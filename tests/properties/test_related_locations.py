"""Random programs on a tree of names leave what they would leave if each call were done at once (O1)."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from async_ckpt.engine.queue import Action, Cancel, Kind, Lane, Op, Phase, Start, Supersede
from async_ckpt.engine.queue.names import lies_in
from tests.support import Play, lane

KEYS = st.sampled_from(["f:/a", "f:/a/b", "f:/a/b/c", "f:/a/d", "f:/ab", "f:/e"])


class Tree(RuleBasedStateMachine):
    """Saves, removals of files and of whole directories, and loads, on two services; everything succeeds.

    A name may hold a file and have others below it, as in object storage; on a disk, the store would refuse that.
    """

    def __init__(self) -> None:
        super().__init__()
        self.play = _Seen(self._carried_out)
        self.at_once: dict[str, int] = {}
        self.tree: dict[str, int] = {}
        self.expected: dict[int, int | None] = {}  # what a load should find
        self.running: list[Op] = []

    @initialize(concurrent=st.integers(1, 3), overflow=st.sampled_from(["block", "supersede"]))
    def begin(self, concurrent: int, overflow: str) -> None:
        self.lanes = [lane(50, concurrent=concurrent, overflow=overflow) for _ in range(2)]

    @rule(which=st.integers(0, 1), key=KEYS)
    def save(self, which: int, key: str) -> None:
        op = self.play.save(self.lanes[which], key)
        assert op.phase is not Phase.WAITING
        self.at_once[key] = op.id

    @rule(which=st.integers(0, 1), key=KEYS)
    def remove(self, which: int, key: str) -> None:
        self.at_once = {name: value for name, value in self.at_once.items() if not lies_in(name, key)}
        self.play.remove(self.lanes[which], key)

    @rule(which=st.integers(0, 1), key=KEYS)
    def load(self, which: int, key: str) -> None:
        self._load(self.lanes[which], key, ())

    @rule(which=st.integers(0, 1), key=KEYS, link=KEYS)
    def load_through(self, which: int, key: str, link: str) -> None:
        """A load that passes another name on its way."""
        self._load(self.lanes[which], key, (link,))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self._end(data.draw(st.sampled_from(self.running)))

    @invariant()
    def related_locations_run_one_operation(self) -> None:
        """Nothing runs in what is being removed or written, nor on a link that is (O1)."""
        for one in self.running:
            for other in self.running:
                if one is other or one.kind is other.kind is Kind.LOAD:
                    continue
                assert not any(lies_in(key, than) for key in one.keys for than in other.keys), (one, other)

    def teardown(self) -> None:
        """What is left is what the program would have left."""
        while len(self.play.queue):
            assert self.running, "a deadlock"
            self._end(self.running[0])
        assert self.tree == self.at_once

    def _load(self, of: Lane, key: str, through: tuple[str, ...]) -> None:
        found = self.at_once.get(key)
        op = self.play.load(of, key, through=through)
        self.expected[op.id] = found
        if op in self.running:
            self._check_load(op)

    def _check_load(self, op: Op) -> None:
        if op.id in self.expected:
            assert self.tree.get(op.key) == self.expected[op.id], "it found what the program had not left"

    def _end(self, op: Op) -> None:
        self.running.remove(op)
        if op.kind is Kind.LOAD:
            self._check_load(op)  # nothing changed beneath it
            self.play.withdraw(op)
            return
        if op.kind is Kind.SAVE:
            self.tree[op.key] = op.id
        else:
            self.tree = {name: value for name, value in self.tree.items() if not lies_in(name, op.key)}
        self.play.end(op)

    def _carried_out(self, action: Action) -> None:
        match action:
            case Start(op):
                self.running.append(op)
                self._check_load(op)
            case Cancel(op, by) | Supersede(op, by):
                assert op.key == by.key
            case _:
                assert type(action).__name__ == "Admit", "nothing fails, so nothing is refused or dropped"


class _Seen(Play):
    """A play that tells of each decision that it has carried out."""

    def __init__(self, told: object) -> None:
        super().__init__()
        self._told = told

    def carry_out(self, action: Action) -> None:
        super().carry_out(action)
        self._told(action)  # type: ignore[operator]


TestTree = Tree.TestCase
