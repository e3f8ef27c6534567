"""What two files over one memory have in common, and how a file is cut for copying."""

from __future__ import annotations

import io
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from async_ckpt.format.writing.layout import Layout, lay_out
from async_ckpt.format.writing.overlap import Overlap, Piece, find_overlap, plan_copies
from async_ckpt.snapshot import HostBuffer, capture

MEMORY = bytes(range(256)) * 4

references = st.integers(0, 15).map(lambda number: (64 * number, 64))
glue = st.binary(min_size=1, max_size=3)
files = st.lists(st.one_of(references, glue), max_size=12)


def materialized(pieces: list[Piece]) -> bytes:
    """Return a file's bytes."""
    return b"".join(
        MEMORY[piece[0] : piece[0] + piece[1]] if isinstance(piece, tuple) else bytes(piece)
        for piece in pieces
    )


@given(pieces=files, others=files)
def test_an_overlap_is_equal_in_both(pieces: list[Piece], others: list[Piece]) -> None:
    """What is said to be in common is the same bytes in both files."""
    overlap = find_overlap(pieces, others)
    if overlap is not None:
        length = overlap.stop - overlap.start
        there = materialized(others)[overlap.other_start :][:length]
        assert length > 0
        assert materialized(pieces)[overlap.start : overlap.stop] == there


@given(
    bulk=st.lists(st.tuples(references, glue), min_size=1, max_size=9, unique_by=lambda pair: pair[0]),
    ends=st.lists(glue, min_size=4, max_size=4),
)
def test_all_between_other_ends_is_in_common(bulk: list[tuple[Piece, bytes]], ends: list[bytes]) -> None:
    """Files that differ before the first and behind the last of their storages have all the rest in common."""
    middle = [piece for pair in bulk for piece in pair][:-1]
    pieces, others = [ends[0], *middle, ends[1]], [ends[2], *middle, ends[3]]
    overlap = find_overlap(pieces, others)
    stop = len(materialized(pieces)) - len(ends[1])
    assert overlap == Overlap(start=len(ends[0]), stop=stop, other_start=len(ends[2]))


@given(
    start=st.integers(0, 300),
    length=st.integers(1, 3000),
    tail=st.integers(0, 300),
    other_start=st.integers(0, 300),
    part_size=st.integers(50, 700),
)
def test_parts_for_copying_cover_the_file(
    start: int, length: int, tail: int, other_start: int, part_size: int
) -> None:
    """The parts lie side by side, none but the last is too short, and what is copied lies within the overlap."""
    least, nbytes = 50, start + length + tail
    overlap = Overlap(start=start, stop=start + length, other_start=other_start)
    parts, copies = plan_copies(nbytes, overlap, part_size=part_size, least=least)
    assert bool(parts) == bool(copies)
    if not parts:
        assert length < 2 * least
        return
    assert [part.index for part in parts] == list(range(len(parts)))
    assert [0, *(part.stop for part in parts)] == [*(part.start for part in parts), nbytes]
    assert all(least <= part.nbytes < 2 * part_size for part in parts[:-1])
    for index, other in copies.items():
        assert overlap.start <= parts[index].start
        assert parts[index].stop <= overlap.stop
        assert other - overlap.other_start == parts[index].start - overlap.start
    sent = sum(part.nbytes for part in parts if part.index not in copies)
    assert sent == max(start, least) + tail


def _layouts(*states: Any) -> list[Layout]:
    buffer = HostBuffer(capture(states[0]).nbytes)
    snapshots = [capture(states[0]).stage(buffer), *(capture(state).share(buffer) for state in states[1:])]
    return [lay_out(snapshot) for snapshot in snapshots]


def test_the_bulk_of_two_checkpoints_is_in_common() -> None:
    """Two of torch's files with other metadata share all but their beginnings and their ends."""
    bulk = {f"w{number}": torch.randn(2000 + number) for number in range(50)}
    bulk |= {f"s{number}": torch.tensor(float(number)) for number in range(50)}
    states = [{"path": path, **bulk} for path in ("", "s3://bucket/a/long/path/" * 20)]
    old, new = _layouts(*states)
    overlap = find_overlap(new.pieces(), old.pieces())
    assert overlap is not None
    expected = []
    for state in states:
        torch.save(state, file := io.BytesIO())
        expected.append(file.getvalue())
    length = overlap.stop - overlap.start
    assert length > 50 * 2000 * 4
    assert expected[0][overlap.other_start :][:length] == expected[1][overlap.start : overlap.stop]


def test_what_was_written_is_known_without_the_memory() -> None:
    """The pieces of a file that was read to its end are to be had after its snapshot was closed."""
    (layout,) = _layouts({"w": torch.randn(5000)})
    pieces = layout.pieces()
    layout._snapshot.close()
    assert layout.pieces() == pieces
