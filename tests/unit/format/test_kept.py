"""A file is laid out like the one before it only where torch would lay it out so (S1)."""

from __future__ import annotations

import tracemalloc
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch

from async_ckpt.format import Layout, lay_out
from async_ckpt.snapshot import HostBuffer, Snapshot, capture

Take = Callable[[Any], Snapshot]
Saved = Callable[[Any], bytes]
Whole = Callable[[Layout], bytes]


def _both(before: Any, after: Any, take: Take, saved: Saved, whole: Whole) -> bool:
    """Return whether the second file was laid out like the first; both are torch.save's."""
    first = lay_out(take(before))
    assert whole(first) == saved(before)
    second = lay_out(take(after), first.kept)
    assert whole(second) == saved(after)
    return second.kept is not None and second.kept is first.kept


def _tensors(**more: Any) -> dict[str, Any]:
    return {"small": torch.rand(9), "large": torch.rand(900), "none": torch.empty(0), **more}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (1, 2),
        (256, 65_535),
        (65_536, -1),
        (1 << 40, 1 << 39),
        (1 << 2100, 3 << 2099),
        (0.5, float("nan")),
        (True, False),
        (0x88, 0x4B),
        ("epoch=1", "epoch=2"),
        ("K\x01Q", "q\x00."),
        ("é", "ë"),
        (b"ab", b"cd"),
        (OrderedDict(a=1, b="x"), OrderedDict(a=2, b="y")),
        ([1, True, 2.0, "no"], [7, False, 3.0, "ja"]),
    ],
)
def test_other_values_of_one_length_keep_the_layout(
    before: Any, after: Any, take: Take, saved: Saved, whole: Whole
) -> None:
    """Numbers, truth values and text that take as many bytes as before are put in their places."""
    assert _both(_tensors(value=before), _tensors(value=after), take, saved, whole)


def _over(base: torch.Tensor) -> torch.Tensor:
    return base[1:4]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (255, 256),
        (None, True),
        (True, None),
        (1.5, "12345678"),
        ((1,), [1]),
        ("cpu", "mps"),
        ("cpu", "".join(["c", "pu"])),
        ("7", "8"),
        (torch.float32, torch.float64),
        (torch.float8_e5m2, torch.float8_e4m3fn),
        (torch.FloatStorage, torch.DoubleStorage),
        (_over(torch.ones(5)), _over(torch.ones(6))),
        (torch.ones(4), torch.ones(4).requires_grad_()),
        (torch.ones(4), torch.nn.Parameter(torch.ones(4), requires_grad=False)),
        (torch.ones(4), torch.ones(4, dtype=torch.int32)),
        (torch.ones(2, 3), torch.ones(3, 2)),
        (torch.ones(2, 2), torch.ones(2, 2).t()),
        (torch.ones(4).untyped_storage(), torch.ones(2, 2)),
        (torch.storage.TypedStorage([1.0]), torch.storage.TypedStorage([1], dtype=torch.int32)),
    ],
)
def test_another_build_is_laid_out_anew(
    before: Any, after: Any, take: Take, saved: Saved, whole: Whole
) -> None:
    """Other lengths, kinds of values, constants, or ways to see a tensor: nothing of the old file is used."""
    assert not _both(_tensors(value=before), _tensors(value=after), take, saved, whole)


def test_ties_that_are_made_or_cut_are_seen(take: Take, saved: Saved, whole: Whole) -> None:
    """Where a tensor gets or loses memory of its own, a file is laid out anew."""
    one, other = torch.ones(9), torch.ones(9)
    byte = torch.ones(9, dtype=torch.uint8)
    for before, after in (
        ([one, other], [one, one]),
        ([one, one[:]], [one, other]),
        ([one, other, one], [one, other, other]),
        ([byte, "cpu"], [byte, byte.untyped_storage()]),
    ):
        assert not _both(before, after, take, saved, whole)
        assert not _both(after, before, take, saved, whole)


def test_tensors_that_change_places(take: Take, saved: Saved, whole: Whole) -> None:
    """Each record has the bytes of its own tensor, whatever they are called and in whatever order they come."""
    one, other, view = torch.rand(9), torch.rand(9), torch.rand(900)
    assert _both({"a": one, "b": other, "c": view}, {"b": other, "a": one, "c": view * 2}, take, saved, whole)
    assert _both([view, one], [view + 1, other], take, saved, whole)


def test_a_storage_that_moves_to_another_device(
    take: Take, saved: Saved, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device of a storage is in the file: another one of as many letters is seen."""
    place = ["cuda:0"]
    monkeypatch.setattr(
        torch.serialization, "_package_registry", [(0, lambda storage: place[0][:5] + place[0][5:], None)]
    )
    state, kept = _tensors(), None
    for place[0] in ("cuda:0", "cuda:1", "cuda:1"):
        layout = lay_out(take(state), kept)
        assert whole(layout) == saved(state)
        before, kept = kept, layout.kept
    assert kept is before  # for it was the same place again


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (list(range(300, 10_300)), list(range(307, 10_307))),
        ([*range(256, 40_000), 1], [*range(256, 40_000), 2]),
        ([[None] * 30_000, 1], [[None] * 30_000, 2]),
    ],
    ids=["very many", "after many others", "after many constants"],
)
def test_values_that_are_many_or_far_are_not_searched_for(
    before: Any, after: Any, take: Take, saved: Saved, whole: Whole
) -> None:
    """Where it would take longer to find the values than to lay out the file anew, that is done."""
    assert not _both(_tensors(value=before), _tensors(value=after), take, saved, whole)


class _Writer:
    """torch's writer, as it was when it could not skip bytes."""

    def __init__(self, file: Any, *options: Any) -> None:
        writer = _WRITER(file, *options)
        self.write_record, self.write_end_of_file = writer.write_record, writer.write_end_of_file


_WRITER: Any = torch._C.PyTorchFileWriter


def test_a_torch_that_cannot_skip(
    take: Take, saved: Saved, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layout that older versions of torch make is kept, too."""
    before, after = _tensors(value=1), _tensors(value=2)
    expected = [saved(before), saved(after)]
    with monkeypatch.context() as patch:
        patch.setattr(torch._C, "PyTorchFileWriter", _Writer)
        first = lay_out(take(before))
    assert first.kept is not None
    second = lay_out(take(after), first.kept)
    assert second.kept is first.kept
    assert [whole(first), whole(second)] == expected


def test_another_alignment(take: Take, saved: Saved, whole: Whole) -> None:
    """Once torch is told to align storages otherwise, a file is laid out anew."""
    alignments = pytest.importorskip("torch.utils.serialization").config
    before = lay_out(take(_tensors()))
    with alignments.patch("save.storage_alignment", 4096):
        state = _tensors()
        after = lay_out(take(state), before.kept)
        assert whole(after) == saved(state)
    assert after.kept is not before.kept


@pytest.mark.parametrize("bulk", [numpy.arange(900), b"x" * 70_000, "x" * 70_000])
def test_bulk_data_in_the_pickle_is_not_kept(bulk: Any, take: Take) -> None:
    """Nothing large of the user's stays in memory with a layout."""
    assert lay_out(take(_tensors(bulk=bulk))).kept is None


def test_files_of_one_layout_do_not_share_their_bytes(take: Take, saved: Saved, whole: Whole) -> None:
    """Several files that are laid out like one before, at once and read in turns, are each their own."""
    kept = lay_out(take(_tensors(value=1))).kept
    states = [_tensors(value=value) for value in (2, 3)]
    layouts = [lay_out(take(state), kept) for state in states]
    assert [whole(layout) for layout in layouts] == [saved(state) for state in states]
    assert [whole(layout) for layout in layouts] == [saved(state) for state in states]


def _kept(state: Any) -> Any:
    captured = capture(state)
    snapshot = captured.stage(HostBuffer(captured.nbytes))
    kept = lay_out(snapshot).kept
    snapshot.close()
    return kept


@pytest.mark.parametrize("numel", [64, 2000])
def test_what_a_layout_takes_is_said(numel: int) -> None:
    """The memory that a kept layout is said to take is what it takes, within a half (B1)."""
    state = {f"layer.{index}.weight": torch.ones(numel, 3, 2)[:, 1] for index in range(1000)}
    _kept(state)
    tracemalloc.start()
    try:
        kept = _kept(state)
        said, before = kept.nbytes, tracemalloc.get_traced_memory()[0]
        del kept
        freed = before - tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert said / 1.5 <= freed <= said * 1.5


def test_many_small_storages_are_cut_into_segments(take: Take, saved: Saved, whole: Whole) -> None:
    """Thousands of small records, more than a segment holds, come out right, at once and byte range by byte range."""
    states = [[torch.full((200,), float(index + step)) for index in range(3000)] for step in range(2)]
    kept = lay_out(take(states[0])).kept
    layout = lay_out(take(states[1]), kept)
    assert layout.kept is kept
    expected = saved(states[1])
    step = 100_001
    parts = [
        b"".join(layout.read(start, min(start + step, layout.nbytes)))
        for start in reversed(range(0, layout.nbytes, step))
    ]
    assert b"".join(reversed(parts)) == expected
    assert len(layout.segments) > 1
