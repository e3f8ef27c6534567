"""Gathers ranges of tensors from the chunks of a sharded checkpoint.

Guarantees: of each chunk that is involved in a range, one run of bytes is fetched. No byte is fetched twice, except for
items of up to 64 KiB that two ranges share. Memory beside the ranges is bounded, except for an item that was not saved
row after row: it is loaded as a whole and kept until all of it has been used (B2). Each item is verified by its
checksum, with the last of its runs at the latest. Threads may gather at the same time.

What does not belong here: which ranges are wanted (`content`), how bytes are fetched (`reading.fetching`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from async_ckpt.format.checksum import crc32
from async_ckpt.sharded.consolidating.tensors import Chunk, Tensor
from async_ckpt.sharded.reading.fetching import BLOCK_BYTES, Fetcher, Segment, plan_requests
from async_ckpt.sharded.reading.filling import compare, whole_tensor
from async_ckpt.sharded.reading.items import LONGEST_HEAD_BYTES, Damaged, Unusual, corrupt_item

__all__ = ["Gatherer", "Range"]

_SMALL_BYTES = 64 << 10
_HEAD, _TAIL, _WHOLE, _RUN = "head", "tail", "whole", "run"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Range:
    """A part of a tensor that is wanted.

    Attributes:
        tensor: the tensor.
        start: its first byte.
        stop: its end, exclusive.
        memory: where the bytes go.
    """

    tensor: Tensor
    start: int
    stop: int
    memory: memoryview


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Run:
    """The bytes *start* to *stop* of a chunk, which belong to a range."""

    chunk: Chunk
    start: int
    stop: int
    range: Range

    @property
    def is_all(self) -> bool:
        """Whether it is the whole chunk."""
        return self.stop - self.start == self.chunk.nbytes

    def copy(self, start: int, data: torch.Tensor) -> None:
        """Copy bytes of the chunk, from *start* on, to their places in the range."""
        self.chunk.copy(start, data, self.range.memory, self.range.start)


class Gatherer:
    """Gathers ranges.

    Args:
        fetcher: fetches from the directory.
        url: the location of the directory, for messages.
    """

    def __init__(self, fetcher: Fetcher, url: str) -> None:
        self._fetcher = fetcher
        self._url = url

    def gather(self, ranges: Iterable[Range]) -> None:
        """Fill the memory of *ranges*, and note their checksums; blocks.

        Raises:
            CorruptCheckpointError: a chunk is damaged, or its file is missing or too short.
            StoreError: a file cannot be read.
        """
        runs_of = {each: list(_runs_of(each)) for each in ranges}
        runs = [run for found in runs_of.values() for run in found]
        whole = [run for run in runs if _is_read_whole(run)]
        others = [run for run in runs if not _is_read_whole(run)]
        self._find_data({run.chunk for run in others if run.chunk.item.data < 0 and not run.chunk.is_unusual})
        for run in others:
            if run.chunk.is_unusual:
                self._use_unusual(run)
        usual = [run for run in others if not run.chunk.is_unusual]
        segments = [
            _segment(run, run.chunk.item.start, run.chunk.item.stop, _WHOLE, alone=False) for run in whole
        ]
        for run in usual:
            segments += _segments_of(run)
        self._fetch(segments)
        for run in usual:
            self._check(run.chunk)
        for each, found in runs_of.items():
            _note_checksum(each, found)

    def _find_data(self, chunks: Iterable[Chunk]) -> None:
        """Find out where the bytes of *chunks* begin."""
        heads = []
        for chunk in chunks:
            nbytes = min(LONGEST_HEAD_BYTES, chunk.item.stop - chunk.item.start)
            heads.append(Segment(path=chunk.item.path, start=chunk.item.start, nbytes=nbytes, owner=chunk))
        for segment in self._segments(heads):
            chunk = segment.owner
            assert segment.memory is not None
            try:
                found = chunk.item.find_data(bytes(segment.memory))
                if found + chunk.nbytes > chunk.item.stop:
                    raise corrupt_item(self._url, chunk.name, "it is truncated")
                chunk.item.move(found)
            except Unusual:
                chunk.is_unusual = True

    def _fetch(self, segments: Iterable[Segment]) -> None:
        for segment in self._segments(list(segments)):
            run, memory = segment.owner, segment.memory
            assert memory is not None
            chunk: Chunk = run.chunk
            try:
                if segment.what is _WHOLE:
                    run.copy(run.start, _flat(whole_tensor(chunk.item, memory))[run.start : run.stop])
                elif segment.what is _TAIL:
                    chunk.checksum = _checksum_in(chunk, bytes(memory))
                else:
                    start = segment.start - chunk.item.data
                    chunk.sums.add(start, start + segment.nbytes, crc32(memory, 0))
                    if segment.what is not _RUN:
                        run.copy(start, torch.frombuffer(memory, dtype=torch.uint8))
            except Damaged as error:
                raise self._corrupt(chunk, error) from error

    def _segments(self, segments: list[Segment]) -> Iterator[Segment]:
        """Fetch segments, and yield them as they arrive."""
        at_a_time = self._fetcher.at_a_time
        for request in self._fetcher.fetch(plan_requests(segments, at_a_time=at_a_time)):
            yield from request.segments

    def _use_unusual(self, run: _Run) -> None:
        chunk = run.chunk
        with chunk.lock:
            if chunk.flat is None:
                item = chunk.item
                for segment in self._segments([_segment(run, item.start, item.stop, _WHOLE, alone=True)]):
                    assert segment.memory is not None
                    try:
                        chunk.flat = _flat(whole_tensor(item, segment.memory, is_unusual=True))
                    except Damaged as error:
                        raise self._corrupt(chunk, error) from error
                chunk.left_nbytes = chunk.nbytes
            assert chunk.flat is not None
            run.copy(run.start, chunk.flat[run.start : run.stop])
            chunk.left_nbytes -= run.stop - run.start
            if chunk.left_nbytes <= 0:
                chunk.flat = None

    def _check(self, chunk: Chunk) -> None:
        """Verify the checksum of a chunk if all of it has been fetched."""
        if chunk.checksum is None or (found := chunk.sums.total(0, chunk.nbytes)) is None:
            return
        try:
            compare(chunk.checksum, found)
        except Damaged as error:
            raise self._corrupt(chunk, error) from error

    def _corrupt(self, chunk: Chunk, error: Damaged) -> Exception:
        return corrupt_item(self._url, chunk.name, f"{error} (in {chunk.item.path!r})")


def _runs_of(each: Range) -> Iterator[_Run]:
    for chunk in each.tensor.chunks:
        start, stop = chunk.count_before(each.start), chunk.count_before(each.stop)
        if start < stop:
            yield _Run(chunk=chunk, start=start, stop=stop, range=each)


def _is_read_whole(run: _Run) -> bool:
    """Return whether the whole item is fetched at once; then it needs no request to find out where the bytes begin."""
    nbytes = run.chunk.item.stop - run.chunk.item.start
    return nbytes <= (BLOCK_BYTES if run.is_all else _SMALL_BYTES)


def _segments_of(run: _Run) -> Iterator[Segment]:
    chunk, data = run.chunk, run.chunk.item.data
    if chunk.is_together(run.start, run.stop):
        first = chunk.place_of(run.start) - run.range.start
        memory = run.range.memory[first : first + run.stop - run.start]
        yield _segment(run, data + run.start, data + run.stop, _RUN, memory=memory)
    else:
        for start in range(run.start, run.stop, BLOCK_BYTES):
            yield _segment(run, data + start, data + min(run.stop, start + BLOCK_BYTES), None)
    if run.stop == chunk.nbytes:
        yield _segment(run, data + run.stop, chunk.item.stop, _TAIL)


def _segment(
    run: _Run,
    start: int,
    stop: int,
    what: str | None,
    *,
    memory: memoryview | None = None,
    alone: bool = False,
) -> Segment:
    return Segment(
        path=run.chunk.item.path,
        start=start,
        nbytes=stop - start,
        memory=memory,
        alone=alone,
        owner=run,
        what=what,
    )


def _checksum_in(chunk: Chunk, tail: bytes) -> int | None:
    try:
        return chunk.item.checksum(tail)
    except Unusual:  # its storage holds more than these bytes
        return None


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8)


def _note_checksum(each: Range, runs: list[_Run]) -> None:
    """Note the checksum of a range. If the range is a single long run, it was computed as the run arrived."""
    value: int | None = None
    if len(runs) == 1 and runs[0].stop - runs[0].start == each.stop - each.start:
        value = runs[0].chunk.sums.total(runs[0].start, runs[0].stop)
    each.tensor.sums.add(each.start, each.stop, crc32(each.memory, 0) if value is None else value)
