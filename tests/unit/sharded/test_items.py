"""What a rank writes: each item is, byte for byte, what ``torch.save`` makes of it."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from async_ckpt.sharded.writing.archive import template
from async_ckpt.sharded.writing.shard import Item, Shard, TensorItem
from async_ckpt.snapshot import Snapshot
from async_ckpt.snapshot.host_pool import HostBuffer
from async_ckpt.snapshot.regions import as_dense, capture_regions

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
]
SIZES = [(), (0,), (1,), (3,), (4, 5), (0, 7), (257, 3), (2, 3, 4, 5)]


def filled(dtype: torch.dtype, sizes: tuple[int, ...]) -> torch.Tensor:
    """Return a tensor with bytes that are not all alike."""
    tensor = torch.zeros(sizes, dtype=dtype)
    if tensor.numel():
        raw = torch.arange(tensor.nbytes) % (2 if dtype is torch.bool else 251)
        tensor.untyped_storage().copy_(raw.to(torch.uint8).untyped_storage())
    return tensor


def saved(value: Any) -> bytes:
    """Return what ``torch.save`` writes of *value*."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def staged(tensors: list[torch.Tensor]) -> tuple[Snapshot, list[Item]]:
    """Return a snapshot of *tensors*, and their items."""
    dense = [as_dense(tensor) for tensor in tensors]
    capture, regions = capture_regions(dense, overhead=0)
    snapshot = capture.stage(HostBuffer(max(1, capture.nbytes)))
    templates = [template(tensor.dtype, tensor.shape, tensor.stride()) for tensor in dense]
    return snapshot, [TensorItem(*each) for each in zip(templates, regions, strict=True)]


def read(shard: Shard, start: int = 0, stop: int | None = None) -> bytes:
    """Return some bytes of *shard*."""
    return b"".join(map(bytes, shard.read(start, shard.nbytes if stop is None else stop)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_an_item_is_what_torch_saves(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    """Whatever its dtype and size, an item equals the file of the tensor alone."""
    tensor = filled(dtype, sizes)
    snapshot, items = staged([tensor])
    assert read(Shard(items, snapshot)) == saved(tensor)


def _views() -> Iterator[torch.Tensor]:
    whole = torch.randn(6, 8)
    yield whole.t()
    yield torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    yield whole[2:4]
    yield whole.flatten()[5:11]


def test_a_view_is_saved_as_it_lies_and_without_what_is_around_it() -> None:
    """An item has its tensor's strides, and of a storage no more than the tensor's own elements."""
    for tensor in _views():
        snapshot, items = staged([tensor])
        assert read(Shard(items, snapshot)) == saved(tensor.clone())


def test_what_does_not_lie_together_is_saved_together() -> None:
    """Of a tensor with gaps, or one that repeats itself, a contiguous copy is saved."""
    whole = torch.randn(6, 8)
    for tensor in (
        whole[:, 2:4],
        whole[::2],
        torch.randn(3, 1).expand(3, 5),
        torch.randn(2, dtype=torch.cfloat).conj(),
    ):
        snapshot, items = staged([tensor])
        expected = tensor.resolve_conj().contiguous()
        assert read(Shard(items, snapshot)) == saved(expected)


def test_what_tensors_share_is_copied_once() -> None:
    """Views that overlap, or touch, take the memory of what they cover; what nobody covers takes none."""
    whole = torch.randn(1000)
    capture, regions = capture_regions([whole[10:20], whole[15:40], whole[40:50], whole[900:910]], overhead=0)
    assert [storage.nbytes for storage in capture.storages] == [40 * 4, 10 * 4]
    assert [(region.storage, region.start) for region in regions] == [(0, 0), (0, 20), (0, 120), (1, 0)]


@given(st.data())
def test_an_object_can_be_read_in_any_pieces_and_order(data: st.DataObject) -> None:
    """Any range of the object has the bytes that the files of its items have there, and their checksum."""
    kinds = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=12))
    tensors = {
        0: torch.randn(3),
        1: torch.randn(9000),
        2: torch.empty(0),
        3: torch.tensor(1.5),
        4: torch.randn(70, 70),
    }
    chosen = [tensors[kind] for kind in kinds if kind in tensors]
    snapshot, items = staged(chosen)
    made: Iterator[Item] = iter(items)
    blob = saved({"step": 7})
    shard = Shard([next(made) if kind in tensors else blob for kind in kinds], snapshot)
    expected = b"".join(saved(tensors[kind]) if kind in tensors else blob for kind in kinds)
    cuts = sorted({0, shard.nbytes, *data.draw(st.lists(st.integers(0, shard.nbytes), max_size=6))})
    ranges = data.draw(st.permutations(list(pairwise(cuts))))
    for start, stop in ranges:
        if data.draw(st.booleans()):
            assert shard.crc32(start, stop) == zlib.crc32(expected[start:stop])
        assert read(shard, start, stop) == expected[start:stop]
        steps = shard.steps(start, stop, data.draw(st.integers(500, 40_000)))
        assert b"".join(piece for pieces in steps for piece in pieces) == expected[start:stop]


class _Watched:
    """The memory of tensors, with what of it is read."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.nbytes = 0
        self._snapshot = snapshot

    def view(self, index: int) -> _Watched:
        self._index = index
        return self

    def __getitem__(self, which: slice) -> memoryview:
        piece = self._snapshot.view(self._index)[which]
        self.nbytes += piece.nbytes
        return piece


def test_steps_read_a_tensor_for_its_checksum_and_for_the_file() -> None:
    """What is longer than a step is summed up by the step, while it is in the cache, and not again at its end."""
    snapshot, items = staged([torch.randn(30_000), torch.randn(50_000)])
    memory = _Watched(snapshot)
    shard = Shard(items, memory)
    for step in shard.steps(0, shard.nbytes, 16_000):
        del step
    assert memory.nbytes == 2 * 4 * 80_000


def test_thousands_of_small_items_are_not_thousands_of_pieces() -> None:
    """Small items are put together where they are read."""
    snapshot, items = staged([torch.randn(4) for _ in range(1000)])
    assert (
        len(
            Shard(items, snapshot).read(0, sum(item.nbytes for item in items if isinstance(item, TensorItem)))
        )
        == 1
    )


def test_a_template_takes_no_memory_for_its_tensor() -> None:
    """A template of a tensor of a terabyte is made without that terabyte."""
    assert template(torch.float32, (1 << 38,), (1,)).nbytes > 1 << 40
