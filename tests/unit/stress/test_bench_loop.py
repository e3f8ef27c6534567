"""What the benchmarks of the whole loop and of memory make of what they measured."""

from __future__ import annotations

import pytest

from stress.bench.loop import costs_of
from stress.bench.memory import corners


def idle(step_seconds: float) -> dict[str, object]:
    """Return a stretch without saves; a step costs two CPUs, and nothing else runs."""
    cpu = 2 * step_seconds
    return {"steps": [step_seconds], "step_seconds": step_seconds, "cpu": cpu, "machine": cpu, "others": 0.0}


def test_what_a_save_loses_is_all_that_its_steps_do_not_explain() -> None:
    """Of a stretch's time, what as many steps take beside it is training's; the rest is the saves', calls included."""
    steps = [0.2] * 6 + [0.35] * 3 + [0.2]  # two saves, whose work slows three steps; one step after the last
    stretch = {
        "seconds": sum(steps) + 2 * 0.05,
        "steps": steps,
        "stalls": [0.05, 0.05],
        "cpu": 6.0,
        "machine": 6.4,
    }
    found = costs_of(stretch, idle(0.19), idle(0.21), every=4, saves=2)
    assert found["lost_seconds"] == pytest.approx((3 * 0.15 + 2 * 0.05) / 2)
    assert found["ratio"] == pytest.approx(1 + found["lost_seconds"] / (4 * 0.2))
    assert found["stall_seconds"] == 0.05
    assert found["cpu_seconds"] == pytest.approx((6.0 - 10 * 0.4) / 2)
    assert found["machine_cpu_seconds"] == pytest.approx((6.4 - 10 * 0.4) / 2)


def test_no_saves_lose_nothing() -> None:
    """Where nothing is saved, what remains is how much the steps of the stretch differ from those beside it."""
    stretch = {"seconds": 0.8, "steps": [0.2] * 4, "stalls": [0.0], "cpu": 1.6, "machine": 1.6}
    assert costs_of(stretch, idle(0.2), idle(0.2), every=4, saves=1)["ratio"] == pytest.approx(1.0)


def test_a_flat_line_is_its_ends() -> None:
    """Of points in a row at one height, the first and the last are kept: the line through them is the same."""
    line = [(0.0, 0), (0.1, 0), (0.2, 0), (0.3, 5), (0.4, 5), (0.5, 5), (0.6, 0)]
    assert corners(line) == [(0.0, 0), (0.2, 0), (0.3, 5), (0.5, 5), (0.6, 0)]
