"""The header of a safetensors file: what is taken from it, and that nothing is believed that the file cannot hold."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
import torch

from async_ckpt.format.reading.safetensors import device_of, header_length, is_named_so, parse_header, runs_of


def header(**tensors: Any) -> bytes:
    """Return a header as text."""
    return json.dumps(tensors).encode()


def described(dtype: str = "F32", shape: Any = (2, 3), offsets: Any = (0, 24)) -> dict[str, Any]:
    """Return what a header says of a tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def parsed(data: bytes, behind: int) -> Any:
    """Parse a header with so many bytes behind it."""
    return parse_header(data, 8 + len(data) + behind)


def test_tensors_in_the_order_of_the_file() -> None:
    """Each is where its offsets say, counted from the header's end; what is said of the file is passed over."""
    data = header(
        b=described("I64", [2], [24, 40]),
        a=described(),
        e=described("U8", [0, 3], [24, 24]),
        __metadata__={"x": "y"},
    )
    first = 8 + len(data)
    assert [
        (each.name, each.dtype, each.shape, each.start - first, each.nbytes) for each in parsed(data, 40)
    ] == [
        ("a", torch.float32, (2, 3), 0, 24),
        ("e", torch.uint8, (0, 3), 24, 0),
        ("b", torch.int64, (2,), 24, 16),
    ]
    assert parsed(b"{}  ", 0) == []


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"3",
        b'{"a": 1}',
        b"\xff{}",
        b'{"a":' * 100_000,
        b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 24]}}',
        header(a=described("F4")),
        header(a=described("__doc__")),
        header(a=described(shape=[2, 2])),
        header(a=described(shape=[-2, -3])),
        header(a=described(shape=[2.0, 3])),
        header(a=described(shape=[True, 6])),
        header(a=described(shape=[2**62, 2**62])),
        header(a=described(shape="23")),
        header(a=described(offsets=[24, 48])),
        header(a=described(offsets=[24, 0])),
        header(a=described(offsets=[0, 24, 24])),
        header(a=described(), b=described()),
        header(a=described(), b=described(offsets=[12, 36])),
        header(a=described(), b=described("U8", [1], [25, 26])),
        header(a={"dtype": "F32"}),
    ],
    ids=repr,
)
def test_what_is_no_header(data: bytes) -> None:
    """What is not as the format has it, overlaps, leaves a hole, or does not fill the file is refused."""
    with pytest.raises(ValueError, match=r"\w"):
        parsed(data, 24)


@pytest.mark.parametrize("behind", [0, 23, 25, 1 << 40])
def test_a_file_of_another_length(behind: int) -> None:
    """The tensors fill what follows the header."""
    assert parsed(header(a=described()), 24)
    with pytest.raises(ValueError, match="instead of"):
        parsed(header(a=described()), behind)


@pytest.mark.parametrize(("said", "nbytes"), [(0, 100), (93, 100), (2**64 - 1, 100), (100_000_001, 1 << 40)])
def test_a_header_that_is_too_long(said: int, nbytes: int) -> None:
    """No header is read that the file has no room for, or the format."""
    with pytest.raises(ValueError, match="length"):
        header_length(struct.pack("<Q", said), nbytes)
    with pytest.raises(ValueError, match="short"):
        header_length(b"1234567", 7)
    assert header_length(struct.pack("<Q", 92), 100) == 92


def test_runs() -> None:
    """Tensors that follow each other are read together."""
    data = header(a=described(), b=described(offsets=[24, 48]), c=described(offsets=[48, 72]))
    a, b, c = parsed(data, 72)
    memory = [memoryview(bytearray(24)) for _ in range(3)]
    assert runs_of([a, b, c], memory) == [(a.start, memory)]
    assert runs_of([a, c], memory[:2]) == [(a.start, memory[:1]), (c.start, memory[1:2])]


@pytest.mark.parametrize(
    "url", ["a.safetensors", "s3://b/a.safetensors", "https://h/a.safetensors?sig=x", "a?.safetensors"]
)
def test_names(url: str) -> None:
    """The name tells, as it does to torch.load; what a URL asks for is no part of it."""
    assert is_named_so(url)
    assert not is_named_so(url.replace(".safetensors", ".ckpt"))


def test_devices() -> None:
    """A device is one by name; what would have to be asked for each tensor is refused in torch's words."""
    assert [device_of(each) for each in (None, "meta", torch.device("meta"), 0)] == [
        "cpu",
        "meta",
        "meta",
        "cpu",
    ]
    for each in ({"cpu": "meta"}, lambda *_: None):
        with pytest.raises(RuntimeError, match="map_location is not supported"):
            device_of(each)
