"""What a call and its request cost does not depend on how much is pending: counted in lines, on both threads."""

from __future__ import annotations

import sys
import threading
from types import FrameType
from typing import Any

import pytest

from stress.bench.pending import PROGRAMS, Program, held_up


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_cost_grows_with_the_number_of_operations_and_no_faster(program: Program) -> None:
    """Four times as many pending operations take no more than about four times the work, calls included."""
    few, many = (_lines(program, number) for number in (150, 600))
    assert many < 4.3 * few, (few, many, many / few)


class _Lines:
    """Counts the lines of the package that run, on the threads of one service and its caller."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        if "async_ckpt/" not in frame.f_code.co_filename:
            return None
        self.number += event == "line"
        return self

    def __enter__(self) -> _Lines:
        self._before = sys.gettrace()
        threading.settrace(self)  # for the service's thread, which is yet to start
        sys.settrace(self)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)
        threading.settrace(self._before)  # type: ignore[arg-type]


def _lines(program: Program, number: int) -> int:
    with _Lines() as lines, held_up(number) as (service, gate):
        program(service, number)
        gate.open()
        service.wait()
    return lines.number
