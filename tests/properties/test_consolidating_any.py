"""A tensor of any size, cut into chunks in any way, read by ranges of any length (pure)."""

from __future__ import annotations

import itertools
import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from async_ckpt.sharded.consolidating.geometry import boxes_of, count_before, place_of


@st.composite
def cut_tensors(draw: st.DrawFn) -> tuple[list[int], list[tuple[tuple[int, ...], tuple[int, ...]]]]:
    """Draw the sizes of a tensor, and the offsets and lengths of the chunks of a grid."""
    sizes = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    edges = [sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=3))}) for size in sizes]
    ranges = [list(itertools.pairwise(each)) for each in edges]
    chunks = [
        (tuple(start for start, _ in cell), tuple(stop - start for start, stop in cell))
        for cell in itertools.product(*ranges)
    ]
    return sizes, draw(st.permutations(chunks))


@given(cut_tensors(), st.data())
def test_ranges_put_together_are_the_tensor(
    tensor: tuple[list[int], list[tuple[tuple[int, ...], tuple[int, ...]]]], data: st.DataObject
) -> None:
    """Each range is made of one run of each chunk; no element comes twice, and none is missing."""
    sizes, chunks = tensor
    total = math.prod(sizes)
    whole = torch.arange(total).view(sizes)
    cuts = sorted({0, total, *data.draw(st.lists(st.integers(0, total), max_size=4))})
    read = [0] * len(chunks)
    for start, stop in itertools.pairwise(cuts):
        made = torch.full((stop - start,), -1)
        for number, (offsets, lengths) in enumerate(chunks):
            part = whole[tuple(slice(a, a + n) for a, n in zip(offsets, lengths, strict=True))].reshape(-1)
            first, end = (count_before(sizes, offsets, lengths, at) for at in (start, stop))
            assert first == read[number]  # where the range before has ended
            read[number] = end
            boxes = list(boxes_of(sizes, offsets, lengths, first, end))
            assert sum(math.prod(box.shape) for box in boxes) == end - first
            assert len(boxes) <= 2 * len(sizes)
            for box in boxes:
                place = torch.as_strided(made, box.shape, box.strides, box.place - start)
                assert (place == -1).all()
                place.copy_(part[box.start : box.start + math.prod(box.shape)].view(box.shape))
            for at in range(first, end):
                assert place_of(sizes, offsets, lengths, at) == part[at]
        assert made.tolist() == list(range(start, stop))
    assert read == [math.prod(lengths) for _, lengths in chunks]
