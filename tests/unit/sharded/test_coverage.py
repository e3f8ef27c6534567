"""Whether chunks make a tensor up, compared with counting each element."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_ckpt.sharded.reading.coverage import fault_of

Box = tuple[tuple[int, ...], tuple[int, ...]]


def is_made_up(size: tuple[int, ...], boxes: list[Box]) -> bool:
    """Count how often each element is there."""
    elements = [
        element
        for offsets, sizes in set(boxes)
        for element in itertools.product(
            *(range(offset, offset + length) for offset, length in zip(offsets, sizes, strict=True))
        )
    ]
    return sorted(elements) == list(itertools.product(*map(range, size)))


@st.composite
def cut(draw: Any) -> tuple[tuple[int, ...], list[Box]]:
    """A tensor, and chunks that may make it up: cut in two again and again, and one of them perhaps moved."""
    size = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    boxes: list[Box] = [((0,) * len(size), size)]
    for _ in range(draw(st.integers(0, 5))):
        offsets, sizes = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dimension = draw(st.integers(0, len(size) - 1))
        at = draw(st.integers(0, sizes[dimension]))
        one = (*sizes[:dimension], at, *sizes[dimension + 1 :])
        other = (*sizes[:dimension], sizes[dimension] - at, *sizes[dimension + 1 :])
        later = (*offsets[:dimension], offsets[dimension] + at, *offsets[dimension + 1 :])
        boxes += [(offsets, one), (later, other)]
    if draw(st.booleans()):
        number = draw(st.integers(0, len(boxes) - 1))
        _, sizes = boxes[number]
        moved = tuple(draw(st.integers(0, whole - length)) for whole, length in zip(size, sizes, strict=True))
        boxes[number] = moved, sizes
    if draw(st.booleans()):
        boxes.append(boxes[0])  # of copies on several ranks
    return size, boxes


@given(cut())
def test_as_by_counting(given_: tuple[tuple[int, ...], list[Box]]) -> None:
    """For each way to cut, and to get it wrong."""
    size, boxes = given_
    full = [box for box in boxes if math.prod(box[1])]
    assert (fault_of(size, boxes) is None) == is_made_up(size, full)


@pytest.mark.parametrize(
    ("size", "boxes", "told"),
    [
        ((10,), [((0,), (5,)), ((4,), (5,))], "overlap"),
        ((10,), [((0,), (5,)), ((5,), (4,))], "9 elements, but it has 10"),
        ((4, 4), [((0, 0), (2, 2)), ((0, 2), (2, 2)), ((2, 0), (2, 2)), ((1, 2), (2, 2))], "overlap"),
        ((3,), [], "0 elements"),
    ],
)
def test_what_is_told(size: tuple[int, ...], boxes: list[Box], told: str) -> None:
    """Gaps, and elements that are there twice."""
    assert told in str(fault_of(size, boxes))


@pytest.mark.parametrize("size", [(), (0,), (3, 0)])
def test_without_dimensions_or_elements(size: tuple[int, ...]) -> None:
    """One element, or none."""
    boxes = [((), ())] if size == () else []
    assert fault_of(size, boxes) is None
