"""Nothing of what a reused buffer held before is in a file, and every byte of an array is (S1)."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from async_ckpt import CheckpointService
from async_ckpt.format import lay_out
from async_ckpt.snapshot import HostPool, Snapshot, capture
from async_ckpt.snapshot.budget import Budget

POISONS = (b"\x00", b"\xa5", b"\xff")
PLAIN = ["b1", "i1", ">i2", "<f4", ">f8", "c8", "f2", "g", "G", "S3", "U2", ">U1", "V3", "M8[ns]", ">m8[s]"]


@st.composite
def kinds(draw: st.DrawFn, *, depth: int = 2) -> numpy.dtype[Any]:
    """Types of array elements, most of them with bytes that belong to no field."""
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        return numpy.dtype(draw(st.sampled_from(PLAIN)))
    inner = kinds(depth=depth - 1)
    fields = [
        (f"f{number}", draw(inner), draw(st.lists(st.integers(1, 3), max_size=2)))
        for number in range(draw(st.integers(0, 3)))
    ]
    if draw(st.booleans()):
        return numpy.dtype(
            [(name, kind, tuple(shape)) for name, kind, shape in fields], align=draw(st.booleans())
        )
    at, offsets, formats = draw(st.integers(0, 3)), [], []
    for _, kind, shape in fields:
        formats.append(numpy.dtype((kind, tuple(shape))))
        offsets.append(at)
        at += formats[-1].itemsize + draw(st.integers(0, 5))
    names = [name for name, _, _ in fields]
    return numpy.dtype(
        {"names": names, "formats": formats, "offsets": offsets, "itemsize": at + draw(st.integers(0, 7))}
    )


@st.composite
def arrays(draw: st.DrawFn) -> Any:
    """Arrays that look at memory full of bytes, in every order that numpy knows."""
    kind = draw(kinds())
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    count = int(numpy.prod(shape, dtype=int))
    memory = numpy.arange(1, 1 + count * kind.itemsize, dtype="u4").astype("u1") | 64
    array = numpy.ndarray(shape, kind, memory.tobytes(), order=draw(st.sampled_from("CF")))
    if array.ndim:
        array = array[draw(st.sampled_from([slice(None), slice(None, None, -1), slice(1, None, 2)]))]
        array = array.transpose(draw(st.permutations(range(array.ndim))))
    return numpy.broadcast_to(array, (2, *array.shape)) if draw(st.integers(0, 4)) == 0 else array


def saved(state: Any) -> bytes:
    """Return the bytes that ``torch.save`` writes."""
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def used_pool(nbytes: int, poison: bytes) -> HostPool:
    """Return a pool whose only buffer is full of what others left there."""
    pool = HostPool(Budget(1 << 30))
    buffer = pool.lease(nbytes)
    assert buffer is not None
    buffer.memory[:] = poison * buffer.nbytes
    buffer.is_fresh = False
    pool.release(buffer)
    return pool


def written_over(state: Any, poison: bytes) -> bytes:
    """Return the file of *state*, whose snapshot is taken into memory that was used before."""
    captured = capture(state)
    pool = used_pool(captured.nbytes, poison)
    idle_bytes = pool.idle_bytes
    buffer = pool.lease(captured.nbytes)
    assert buffer is not None
    assert pool.idle_bytes == 0 < idle_bytes
    snapshot: Snapshot = captured.stage(buffer)
    layout = lay_out(snapshot)
    file = b"".join(layout.read(0, layout.nbytes))
    snapshot.close()
    return file


def in_one_piece(array: Any) -> Any:
    """Return a scattered array as torch.save takes it: in C order.

    Here with the bytes between its fields, in whose place numpy writes whatever its own memory holds.
    """
    if array.flags.c_contiguous or array.flags.f_contiguous or not array.nbytes:
        return array
    raw = array.view(numpy.dtype((numpy.void, array.dtype.itemsize)))
    return numpy.ndarray(array.shape, array.dtype, raw.tobytes())


def check(state: Any, as_saved: Any = None) -> None:
    """Compare the file with torch.save's, whatever the memory held."""
    expected = saved(state if as_saved is None else as_saved)
    for poison in POISONS:
        is_same = written_over(state, poison) == expected
        assert is_same, poison


@given(st.lists(arrays(), max_size=4))
def test_arrays_are_written_byte_for_byte(state: list[Any]) -> None:
    """Every byte of an array is torch.save's: those between the fields, too, whatever the buffer held before (S1)."""
    check(state, [in_one_piece(array) for array in state])


def _tensors() -> list[Any]:
    packed = torch.arange(10, dtype=torch.uint8)
    return [
        *(
            torch.ones(n, dtype=torch.uint8)
            for n in (0, 1, 63, 64, 65, 1000, 16 << 10, (16 << 10) + 1, 70_001)
        ),
        torch.empty(3, 4, device="meta"),
        torch.empty(0, 3),
        torch.arange(100.0)[10:20],
        packed[3:7],
        torch.eye(4).to_sparse(),
        torch.eye(4).to_sparse_csr(),
        torch.sparse_coo_tensor(torch.empty(2, 0, dtype=torch.long), torch.empty(0), (3, 3)),
        torch.quantize_per_tensor(torch.arange(6.0), 0.1, 3, torch.qint8),
        torch.quantize_per_tensor(torch.arange(7.0), 0.1, 1, torch.quint4x2),
        torch.nested.nested_tensor([torch.arange(3.0), torch.arange(5.0)]),
        torch.arange(5, dtype=torch.uint8).untyped_storage(),
        torch.UntypedStorage(0),
    ]


STATES: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "tensors": _tensors,
    "one large tensor": lambda: torch.arange(300_001, dtype=torch.uint8),
    "bytes": lambda: [b"x" * n for n in (0, 1, 100, 70_000)] + ["y" * 70_000, bytearray(b"z" * 70_001)],
    "array subclasses": lambda: [
        numpy.ma.masked_array([1, 2], [0, 1]),
        numpy.rec.array([(1, 2.0)], dtype=numpy.dtype([("a", "i1"), ("b", "f8")], align=True)),
        numpy.zeros(3, numpy.dtype([("a", "i1"), ("b", "f8")], align=True))[1],
    ],
    "arrays of arrays": lambda: [numpy.zeros(3, [("a", "i1", (3, 2)), ("b", [("c", "f8"), ("d", "S3")])])],
    "mixed": lambda: {
        "a": numpy.zeros(7, "V7"),
        "t": torch.ones(3),
        "b": b"x" * 70_000,
        "c": numpy.ones((2, 3)).T,
    },
}


@pytest.mark.filterwarnings("ignore:Sparse", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", STATES)
def test_nothing_earlier_is_in_a_file(name: str) -> None:
    """Whatever a state consists of, its file does not depend on what the buffer held before."""
    check(STATES[name]())


def test_memory_mapped_arrays(tmp_path: Path) -> None:
    """An array over a file is written byte for byte."""
    kind = numpy.dtype([("a", "i1"), ("b", "f8")], align=True)
    (tmp_path / "array").write_bytes(bytes(range(100, 100 + 4 * kind.itemsize)))
    mapped = numpy.memmap(tmp_path / "array", kind, "r", shape=(4,))
    arrays = [numpy.asarray(mapped), numpy.asarray(mapped)[::-2]]
    check([mapped, *arrays], [mapped, *map(in_one_piece, arrays)])


def test_one_models_weights_are_not_in_anothers_file(tmp_path: Path) -> None:
    """A service that has saved one state writes none of it into the next file, whose bytes are not all fields."""
    secret = torch.frombuffer(bytearray(b"\xc3SECRET\xc3" * 20_000), dtype=torch.uint8)
    records = numpy.zeros(1000, numpy.dtype({"names": ["a"], "formats": ["i1"], "itemsize": 64}))
    with CheckpointService() as service:
        service.save({"w": secret}, tmp_path / "secret.ckpt").wait(20)
        service.save({"r": records[::-1], "more": records}, tmp_path / "open.ckpt").wait(20)
    assert b"SECRET" not in (tmp_path / "open.ckpt").read_bytes()
    loaded = torch.load(tmp_path / "open.ckpt", weights_only=False)
    assert loaded["more"].tobytes() == records.tobytes()
