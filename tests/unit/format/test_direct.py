"""Reading storages after torch.load, straight into the memory that it made."""

from __future__ import annotations

import dataclasses
import io
import pickle
import tracemalloc
import zipfile
from collections import OrderedDict
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from async_ckpt.format.central_directory import Entry, data_start
from async_ckpt.format.reading.direct import Wanted, expected_start, overlap, plan_ranges
from async_ckpt.format.reading.plain_pickle import is_plain
from tests.archives import entries_of, written
from tests.hostile import hostile_pickles


def storages(data: bytes) -> list[Entry]:
    """Return the entries of all records of storages."""
    return [entry for name, entry in entries_of(data).items() if name.startswith("data/") and entry.nbytes]


def wanting(entry: Entry) -> Wanted:
    """Return a record with memory of its own."""
    return Wanted(entry=entry, target=memoryview(bytearray(entry.nbytes)), start=expected_start(entry, 64))


def pickle_of(data: bytes) -> bytes:
    """Return the checkpoint's pickle."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


@pytest.mark.parametrize("alignment", [64, 4096])
def test_where_torch_puts_records(alignment: int) -> None:
    """The bytes of every record that torch writes begin where they are expected, as torch was told to align them."""
    data = written({str(number): torch.randn(number + 1) for number in range(200)}, alignment=alignment)
    entries = storages(data)
    assert len(entries) == 200
    for entry in entries:
        assert expected_start(entry, alignment) == data_start(
            entry.header, data[entry.header : entry.header + 30]
        )


@pytest.mark.parametrize(
    ("header", "nbytes", "extra"), [(0, 1 << 33, 20), (1 << 33, 1 << 33, 28), (1 << 33, 5, 12), (64, 5, 0)]
)
def test_records_of_any_size(header: int, nbytes: int, extra: int) -> None:
    """What does not fit 32 bits takes a longer header."""
    entry = Entry(
        name="x/data/0",
        flags=8,
        method=0,
        checksum=0,
        nbytes=nbytes,
        packed_nbytes=nbytes,
        header=header,
        at=0,
    )
    start = expected_start(entry, 64)
    assert start % 64 == 0
    assert 0 <= start - (header + 30 + 8 + 4 + extra) < 64


@given(
    sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=20),
    left_out=st.sets(st.integers(0, 19)),
    longest=st.integers(1, 5000),
)
def test_ranges_cover_what_is_wanted(sizes: list[int], left_out: set[int], longest: int) -> None:
    """However records are cut into ranges, each is filled with its own bytes, and has its own checksum."""
    data = written([torch.randint(0, 99, (size,), dtype=torch.uint8) for size in sizes])
    entries = [entry for number, entry in enumerate(storages(data)) if number not in left_out]
    wanted = [wanting(entry) for entry in entries]
    ranges = plan_ranges(wanted, longest_bytes=longest)
    for each in ranges:
        at = each.start
        for target in each.targets:
            target[:] = data[at : at + target.nbytes]
            at += target.nbytes
        assert at == each.start + each.nbytes
        assert each.note()
    for record in wanted:
        assert record.target == data[record.start : record.start + record.entry.nbytes]
        assert record.checksum == record.entry.checksum


def test_a_record_elsewhere_is_noticed() -> None:
    """Where a record does not begin as expected, the range says so."""
    data = written([torch.arange(9)])
    (entry,) = storages(data)
    wanted = wanting(entry)
    (only,) = plan_ranges([wanted], longest_bytes=1000)
    moved = bytearray(data)
    moved[entry.header + 28] += 64  # the length of the extra field
    for shifted, expected in ((data, True), (bytes(moved), False), (b"x" * len(data), False)):
        at = only.start
        for target in only.targets:
            target[:] = shifted[at : at + target.nbytes]
            at += target.nbytes
        assert only.note() is expected


class Peeking:
    """Rebuilt by a look at a tensor."""

    def __reduce__(self) -> Any:
        return Peeking, (torch.ones(3),)


@pytest.mark.parametrize(
    "state",
    [
        {
            "a": torch.ones(3),
            "b": torch.nn.Parameter(torch.ones(3)),
            "n": 1,
            "t": (1, None, "x"),
            "s": {1, 2},
        },
        OrderedDict(a=torch.ones(3, dtype=torch.bfloat16), size=torch.Size([1]), dtype=torch.float16),
        torch.nn.Linear(3, 3).state_dict(),
        [torch.ones(2).storage().untyped(), torch.device("cpu"), b"bytes", 2j],
    ],
    ids=["values", "ordered", "module", "storage"],
)
def test_plain(state: Any) -> None:
    """States of tensors, containers and numbers rebuild whatever is in the tensors."""
    assert is_plain(pickle_of(written(state)))


@pytest.mark.parametrize(
    "state",
    [
        torch.ones(2, 2).to_sparse(),
        torch.quantize_per_channel(torch.ones(2, 2), torch.ones(2), torch.zeros(2), 0, torch.qint8),
        Peeking(),
        torch.nn.Linear(3, 3),
    ],
    ids=["sparse", "quantized", "class", "module"],
)
@pytest.mark.filterwarnings("ignore")
def test_not_plain(state: Any) -> None:
    """What is rebuilt by a look at tensors, or by code that is not known, is told."""
    assert not is_plain(pickle_of(written({"state": state})))


def test_plain_whatever_the_place() -> None:
    """Tensors on any device, tied and views among them, and hundreds of them, rebuild whatever is in them."""
    weights = [torch.ones(number % 5, 2, dtype=torch.uint8) for number in range(300)]
    views: list[Any] = [each[1:] for each in weights] + [torch.ones(1, 2, 3, 4, 5), torch.tensor(1)]
    pickled = pickle_of(written([weights, views, weights[7], torch.nn.Parameter(torch.ones(3))]))
    for place in (b"cpu", b"cuda:0", b"privateuseone:12", b"mps"):
        assert is_plain(pickled.replace(b"\x03\0\0\0cpu", len(place).to_bytes(4, "little") + place))


READING = {what: each for what, each in hostile_pickles().items() if what.startswith("reading: ")}
KEEPING = {"reading: set", "reading: ordered", "reading: counter"}


@pytest.mark.parametrize("what", READING)
def test_what_is_in_a_tensor_decides(what: str) -> None:
    """Names that are known do not make a pickle plain that calls them with a tensor, but where they only keep it."""
    assert is_plain(READING[what]) is (what in KEEPING)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_in_every_protocol(protocol: int) -> None:
    """What torch.save is told to use for pickles makes no difference."""
    deep: list[Any] = [torch.ones(1)]
    for _ in range(300):
        deep = [deep, (1, deep)]
    state = {
        "a": torch.nn.Parameter(torch.ones(3)),
        "s": "x" * 70_000,
        "b": b"x" * 300,
        "n": [1 << 80, 0.5, -1],
        "d": deep,
    }
    assert is_plain(pickle_of(written(state, pickle_protocol=protocol)))


@pytest.mark.parametrize("place", [1 << 27, (1 << 32) - 1])
def test_memory_for_what_a_pickle_says(place: int) -> None:
    """A number in a pickle is no reason to take memory: not where something is memorized, nor how long it is."""
    pickled = b"\x80\x02Nr" + place.to_bytes(4, "little") + b"X" + place.to_bytes(4, "little") + b"."
    tracemalloc.start()
    try:
        assert not is_plain(pickled)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_records_over_each_other() -> None:
    """Records that lie in each other are told; those that torch writes do not."""
    data = written([torch.arange(9), torch.arange(90)])
    first, second = map(wanting, storages(data))
    assert not overlap([second, first])
    first.entry = dataclasses.replace(first.entry, nbytes=second.start)
    assert overlap([second, first])


@pytest.mark.parametrize(
    "pickled", [b"", b"junk", pickle.dumps(print), b"\x80\x02cos\nsystem\n(S'exit 3'\ntR."]
)
def test_nothing_is_called(pickled: bytes) -> None:
    """A pickle that is damaged, or would do harm, does nothing and is not plain."""
    assert not is_plain(pickled)
