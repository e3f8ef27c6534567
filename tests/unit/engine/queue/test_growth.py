"""What a message costs does not depend on how much is pending: counted in lines, so that no machine's speed matters."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType

import pytest

from async_ckpt.engine.queue import Kind, Op, Phase, Start
from tests.support import Play, lane


def removals(play: Play, number: int) -> None:
    """Removals of different files behind one save."""
    of = lane()
    play.save(of, "f:/run/first")
    for index in range(number):
        play.remove(of, f"f:/run/{index}")


def removals_of_one(play: Play, number: int) -> None:
    """Removals of one file."""
    of = lane()
    play.save(of, "f:/run/first")
    for _ in range(number):
        play.remove(of, "f:/run/a")


def saves(play: Play, number: int) -> None:
    """A deep queue of saves."""
    of = lane(depth=number)
    for index in range(number):
        play.save(of, f"f:/run/{index}")


def best_of_one(play: Play, number: int) -> None:
    """Save the new one, remove the one before, which is queued still."""
    of = lane(depth=number)
    for index in range(number // 2):
        play.save(of, f"f:/run/{index}")
        play.remove(of, f"f:/run/{index - 1}")


def saves_then_removals(play: Play, number: int) -> None:
    """Many saves, all removed again before they have begun."""
    of = lane(depth=number)
    for index in range(number // 2):
        play.save(of, f"f:/run/{index}")
    for index in range(number // 2):
        play.remove(of, f"f:/run/{index}")


def a_few_names(play: Play, number: int) -> None:
    """Ten names, saved and removed in turn."""
    of = lane(depth=number)
    play.save(of, "f:/run/first")
    for index in range(number // 2):
        play.save(of, f"f:/run/{index % 10}")
        play.remove(of, f"f:/run/{(index + 5) % 10}")


def last_links(play: Play, number: int) -> None:
    """Saves, a link to each, and the removal of an older one."""
    of = lane(depth=number)
    for index in range(number // 3):
        play.save(of, f"f:/run/{index}")
        play.link(of, "f:/run/last", f"f:/run/{index}")
        play.remove(of, f"f:/run/{index - 3}")


def directories(play: Play, number: int) -> None:
    """Saves in a directory that is removed again and again."""
    of = lane(depth=number)
    for index in range(number // 2):
        play.save(of, f"f:/run/{index}")
        play.remove(of, f"f:/run/{index}" if index % 10 else "f:/run")


def loads(play: Play, number: int) -> None:
    """Loads of a file that is being saved."""
    of = lane()
    play.save(of, "f:/run/a")
    for _ in range(number):
        play.load(of, "f:/run/a")


def base(play: Play, number: int) -> None:
    """Saves of several services of which one runs at a time."""
    of = [lane(depth=number), lane(depth=number)]
    for index in range(number):
        play.save(of[index % 2], f"f:/run/{index}", group="base")


def waiting(play: Play, number: int) -> None:
    """Operations of many services."""
    for index in range(number):
        play.remove(lane(), f"f:/{index}/a")


PROGRAMS = [
    removals, removals_of_one, saves, best_of_one, saves_then_removals, a_few_names, last_links, directories, loads,
    base, waiting,
]  # fmt: skip


@pytest.mark.parametrize("ok", [True, False], ids=["durable", "failing"])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_cost_grows_with_the_number_of_operations_and_no_faster(
    program: Callable[[Play, int], None], ok: bool
) -> None:
    """Four times as many operations take no more than about four times the work, from arrival to end."""
    few, many = (_lines(lambda n=n: _play(program, n, ok)) for n in (100, 400))
    assert many < 6 * few, (few, many, many / few)


def _play(program: Callable[[Play, int], None], number: int, ok: bool) -> None:
    play = Play()
    program(play, number)
    seen = 0
    running: list[Op] = []
    while len(play.queue):
        running += [action.op for action in play.actions[seen:] if isinstance(action, Start)]
        seen = len(play.actions)
        op = running.pop()
        if op.phase is Phase.RUNNING:
            (play.withdraw if op.kind is Kind.LOAD else lambda op: play.end(op, ok=ok))(op)


def _lines(work: Callable[[], None]) -> int:
    """Return how many lines of the queue *work* runs through."""
    lines = 0

    def trace(frame: FrameType, event: str, argument: object) -> object:
        nonlocal lines
        if "/queue/" not in frame.f_code.co_filename:
            return None
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)  # type: ignore[arg-type]
    try:
        work()
    finally:
        sys.settrace(before)
    return lines
