"""Checkpoints made to do harm: pickles and archives that say what is not so."""

from __future__ import annotations

import io
import pickletools
import random
import struct
import zipfile
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch

from async_ckpt.format.central_directory import find_directory
from tests.archives import entries_of, written

__all__ = ["archive", "hostile_archives", "hostile_files", "hostile_pickles"]

NUMEL = 600_000  # enough bytes for their storages to be left out at first
PROTO, STOP, MARK = b"\x80\x02", b".", b"("


def archive(pickled: bytes, storages: int = 2, **records: bytes) -> bytes:
    """Return a file as torch lays it out, with any pickle."""
    file: Any = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(file)
    content = {"data.pkl": pickled, "byteorder": b"little", **records}
    content |= {f"data/{key}": bytes([65 + key]) * NUMEL for key in range(storages)}
    for name, data in content.items():
        writer.write_record(name, data, len(data))
    writer.write_end_of_file()
    return bytes(file.getvalue())


def hostile_files(mutated: int) -> Iterator[tuple[str, bytes]]:
    """Yield files by what is wrong with them, an honest one first; so many were changed at random."""
    for what, pickled in hostile_pickles().items():
        yield f"pickle: {what}", archive(pickled)
    for number_, pickled in enumerate(_mutated_pickles(mutated)):
        yield f"mutated: {number_}", archive(pickled)
    for what, data in hostile_archives().items():
        yield f"archive: {what}", data


def text(value: str) -> bytes:
    """Return the ops that push a text."""
    return b"X" + struct.pack("<L", len(value)) + value.encode()


def number(value: int) -> bytes:
    """Return the ops that push a number."""
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def name(module: str, attribute: str) -> bytes:
    """Return the ops that look up a name."""
    return f"c{module}\n{attribute}\n".encode()


def called(function: bytes, *arguments: bytes) -> bytes:
    """Return the ops of a call."""
    return function + MARK + b"".join(arguments) + b"tR"


def storage(key: str = "0", numel: bytes = number(NUMEL), kind: str = "ByteStorage") -> bytes:
    """Return the ops that refer to a storage."""
    return MARK + text("storage") + name("torch", kind) + text(key) + text("cpu") + numel + b"tQ"


def tensor(
    key: str = "0",
    *,
    of: bytes | None = None,
    offset: bytes = number(0),
    size: bytes = number(3),
    stride: bytes = number(1),
    grad: bytes = b"\x89",
) -> bytes:
    """Return the ops that make a tensor."""
    hooks = called(name("collections", "OrderedDict"))
    rebuild = name("torch._utils", "_rebuild_tensor_v2")
    of = storage(key) if of is None else of
    return called(rebuild, of, offset, MARK + size + b"t", MARK + stride + b"t", grad, hooks)


def listed(*values: bytes) -> bytes:
    """Return a whole pickle of a list."""
    return PROTO + b"](" + b"".join(values) + b"e" + STOP


def _laughs(depth: int, kind: bytes) -> bytes:
    """Return the ops of containers that hold the next one twice, and so on."""
    made = b"]" + struct.pack("<BB", ord("q"), 0)
    for level in range(1, depth):
        made += kind + struct.pack("<BB", ord("h"), level - 1) * 2 + (b"e" if kind == b"](" else b"t")
        made += struct.pack("<BB", ord("q"), level)
    return made


def hostile_pickles() -> dict[str, bytes]:
    """Return pickles by what they do; those whose names begin with "numel" make memory that is not there."""
    pair = tensor("0") + tensor("1")
    one = scalar()
    parameter = name("torch._utils", "_rebuild_parameter")
    cases = {
        "honest": listed(pair),
        "usual": _usual(),
        "dup bomb": listed(pair, b"}" + b"2" * 100_000),
        "mark bomb": listed(pair) [:-2] + MARK * 100_000 + b"e" + STOP,
        "build bomb": listed(called(name("collections", "OrderedDict")) + (b"}" + b"b") * 100_000),
        "pop beyond": PROTO + b"0" * 1000 + STOP,
        "no stop": PROTO + pair,
        "nothing": b"",
        "deep lists": listed(pair, b"]" * 60_000 + b"a" * 59_999),
        "deep tuples": listed(pair, b")" + b"\x85" * 60_000),
        "laughing lists": listed(pair, _laughs(60, b"](")),
        "laughing tuples": listed(pair, _laughs(60, b"(")),
        "frames": PROTO + b"\x95" + struct.pack("<Q", 1 << 60) + listed(pair)[2:],
        "inst": listed(b"(ios\nsystem\n"),
        "system": listed(pair, called(name("os", "system"), text("exit 3"))),
        "stack global": listed(text("os"), text("system"), b"\x93"),
        "extension": listed(b"\x82\x01"),
        "unicode name": listed("cos\nsyst\u00e9m\n".encode()),
        "other protocols": b"\x80\x05" + listed(pair)[2:],
        "a tensor as an attribute": listed(called(name("collections", "OrderedDict")) + one + b"b"),
        "a call of a storage": listed(called(name("torch.storage", "UntypedStorage"), number(1 << 42))),
        "a call of a type": listed(called(name("torch", "FloatTensor"), number(1 << 42))),
        "numel large": listed(tensor(of=storage(numel=number(1 << 42)))),
        "numel larger": listed(tensor(of=storage(numel=number((1 << 63) - 1)))),
        "numel small": listed(tensor(of=storage(numel=number(10)))),
        "numel negative": listed(tensor(of=storage(numel=number(-5)))),
        "numel fraction": listed(tensor(of=storage(numel=b"G" + struct.pack(">d", 1e300)))),
        "numel of wide items": listed(tensor(of=storage(kind="DoubleStorage"))),
        "no such storage": listed(pair, tensor("77")),
        "another record": listed(tensor("../data.pkl"), tensor("../byteorder")),
        "size large": listed(tensor(size=number(1 << 42))),
        "size negative": listed(tensor(size=number(-1))),
        "stride negative": listed(tensor(stride=number(-1))),
        "offset large": listed(tensor(offset=number(1 << 62))),
    }  # fmt: skip
    for place in (1 << 27, 1 << 28, 1 << 31, (1 << 32) - 1):
        cases[f"memo {place}"] = listed(b"N" + b"r" + struct.pack("<L", place), pair)
        cases[f"memo text {place}"] = listed(b"Np" + str(place).encode() + b"\n", pair)
        cases[f"memo get {place}"] = listed(b"j" + struct.pack("<L", place), pair)
    for op, form in (
        (b"X", "<L"),
        (b"B", "<L"),
        (b"T", "<l"),
        (b"\x8b", "<l"),
        *((bytes([c]), "<Q") for c in b"\x8d\x8e\x96"),
    ):
        for length in (-1, 1 << 30, (1 << 31) - 1, 1 << 40, (1 << 63) - 1):
            try:
                cases[f"length {op!r} {length}"] = listed(pair, op + struct.pack(form, length) + b"x" * 100)
            except struct.error:
                continue
    # What is in a tensor decides: before it has come, that would be whatever the memory held.
    reading = {
        "bytearray": called(name("builtins", "bytearray"), tensor()),
        "size of one": called(name("torch", "Size"), MARK + one + b"t"),
        "size of many": called(name("torch", "Size"), tensor()),
        "complex": called(name("builtins", "complex"), one),
        "device": called(name("torch", "device"), text("cuda"), one),
        "numel": tensor(of=storage("1", numel=one)),
        "offset": tensor("1", offset=one),
        "size": tensor("1", size=one),
        "stride": tensor("1", stride=one),
        "grad": tensor("1", grad=one),
        "grad of a parameter": called(
            parameter, tensor("1"), one, called(name("collections", "OrderedDict"))
        ),
        "key": storage(key="1")[: -len(number(NUMEL)) - 2] + one + b"tQ",
        "set": called(name("builtins", "set"), tensor(size=number(1))),
        "ordered": called(name("collections", "OrderedDict"), b"](" + tensor() + tensor("1") + b"e"),
        "counter": called(name("collections", "Counter"), tensor()),
    }
    return cases | {f"reading: {what}": listed(pair, ops) for what, ops in reading.items()}


def _mutated_pickles(count: int, seed: int = 0) -> Iterator[bytes]:
    """Yield pickles in which a few ops were left out, put in, or replaced by others that push a value."""
    draw = random.Random(seed)
    cases = hostile_pickles()
    originals = [_ops(cases["usual"])] * 20 + [_ops(cases["honest"])] * 5
    originals += [_ops(each) for what, each in cases.items() if what.startswith("reading")]
    values = [
        number(1),
        number(0),
        text("0"),
        text("cpu"),
        b"N",
        b")",
        b"}",
        b"]",
        tensor(),
        tensor("1"),
        scalar(),
    ]
    for _ in range(count):
        ops = list(draw.choice(originals))
        for _ in range(draw.choice((1, 1, 1, 2, 3))):
            at = draw.randrange(1, len(ops))
            what = draw.randrange(6)
            if what < 3 and ops[at][:1] in b"\x8aXN)]}\x88\x89":
                ops[at] = draw.choice(values)
            elif what == 3:
                del ops[at]
            elif what == 4:
                ops.insert(
                    at, draw.choice([*values, b"2", b"0", b"R", b"\x85", b"\x86", b"(", b"b", b"a", b"\x81"])
                )
            else:
                other = draw.choice(originals)
                start = draw.randrange(len(other))
                ops[at:at] = other[start : start + draw.randrange(8)]
        yield b"".join(ops)


def _usual() -> bytes:
    """Return what torch.save writes of tensors, some tied, some views of one storage."""
    first, second = (torch.empty(NUMEL, dtype=torch.uint8) for _ in range(2))
    state = {
        "a": first,
        "v": first[3:],
        "p": torch.nn.Parameter(second, False),
        "s": second[:8].view(2, 2, 2, 1),
        "e": first[1],
    }
    with zipfile.ZipFile(io.BytesIO(written({**state, "again": first}))) as made:
        return made.read("archive/data.pkl")


def scalar() -> bytes:
    """Return the ops that make a tensor of one number."""
    return tensor(size=b"", stride=b"")


def _ops(pickled: bytes) -> list[bytes]:
    places = [place for _, _, place in pickletools.genops(pickled)]
    return [pickled[start:stop] for start, stop in pairwise([*places, len(pickled)])]  # type: ignore[arg-type]


def hostile_archives() -> dict[str, bytes]:
    """Return files whose archive lies, by what it lies about."""
    data = archive(listed(tensor("0"), tensor("1")))
    start, stop = find_directory(data, len(data))
    directory, end = data[start:stop], data[stop:]
    entries = entries_of(data)
    first, second = entries["data/0"], entries["data/1"]

    def with_field(entry: Any, offset: int, form: str, value: int) -> bytes:
        changed = bytearray(data)
        struct.pack_into(form, changed, start + entry.at + offset, value)
        return bytes(changed)

    def without_checksum(data: bytes, entry: Any) -> bytes:
        changed = bytearray(data)
        struct.pack_into("<L", changed, start + entry.at + 16, 0)
        return bytes(changed)

    def with_end(offset: int, form: str, value: int) -> bytes:
        changed = bytearray(data)
        struct.pack_into(form, changed, stop + offset, value)
        return bytes(changed)

    def twice(count: int) -> bytes:
        """Many records over the same bytes."""
        entry = directory[second.at : directory.index(b"PK\x01\x02", second.at + 4)]
        more = b"".join(entry.replace(b"data/1", f"data/{n}".encode()) for n in range(2, 10)) * (count // 8)
        return (
            data[:start]
            + directory
            + more
            + ended(len(directory) + len(more), 8 * (count // 8) + len(entries))
        )

    def ended(length: int, count: int, at: int = start) -> bytes:
        return struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count & 0xFFFF, count & 0xFFFF, length, at, 0)

    eocd = end[-22:]
    cases = {
        "honest": data,
        "longer record": with_field(first, 24, "<L", 0x7FFFFFFF),
        "longer packed record": with_field(first, 20, "<L", 0x7FFFFFFF),
        "record nearly the file": with_field(first, 24, "<L", len(data) - 10_000),
        "header beyond the end": with_field(second, 42, "<L", 0x7FFFFFFF),
        "two records at one place": without_checksum(with_field(second, 42, "<L", first.header), second),
        "record inside another": with_field(second, 42, "<L", first.header + 64),
        "long name": with_field(second, 28, "<H", 0xFFFF),
        "long extra": with_field(second, 30, "<H", 0xFFFF),
        "long comment": with_field(second, 32, "<H", 0xFFFF),
        "encrypted": with_field(second, 8, "<H", 1),
        "zip64 directory size": with_end(40, "<Q", 1 << 62),
        "zip64 directory offset": with_end(48, "<Q", 1 << 62),
        "zip64 directory of all": with_end(48, "<Q", 0),
        "zip64 count": with_end(24, "<Q", 1 << 62),
        "zip64 elsewhere": with_end(56 + 8, "<Q", 1 << 62),
        "zip64 at the beginning": with_end(56 + 8, "<Q", 0),
        "zip64 only in its locator": data[:-22] + ended(0, 0, 0),
        "another directory beside zip64's": data[:-22] + ended(len(directory), len(entries), start - 64),
        "count": data[:-22] + struct.pack("<4s4H", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF) + eocd[12:],
        "comment": data[:-2] + struct.pack("<H", 300) + b"x" * 300,
        "comment with an end in it": data[:-2] + struct.pack("<H", 22) + eocd,
        "comment with a false end": data[:-2] + struct.pack("<H", 22) + ended(0, 0, 0),
        "comment that is not there": data[:-2] + struct.pack("<H", 300),
        "end in the pickle": archive(listed(tensor(), text("PK\x05\x06" * 20))),
        "many records of the same bytes": twice(4000),
        "no directory": data[:start],
        "only an end": eocd,
        "only the ends": end,
        "alignment": archive(listed(tensor("0"), tensor("1")), **{".storage_alignment": b"600000"}),
        "alignment of many digits": archive(listed(tensor()), **{".storage_alignment": b"9" * 100_000}),
        "no order": archive(listed(tensor()), byteorder=b"x" * 100_000),
        "old format": written([torch.ones(9)], _use_new_zipfile_serialization=False),
    }  # fmt: skip
    wide = bytearray(data)  # a length in zip64's extra field
    struct.pack_into("<L", wide, start + second.at + 24, 0xFFFFFFFF)
    cases["zip64 length without a field"] = bytes(wide)
    old = cases["old format"]
    for at in (2, 20, 60, 100, 200):
        for hostile in (
            b"B\xff\xff\xff\x7f",
            b"\x8e" + b"\xff" * 7 + b"\x0f",
            b"X\xff\xff\xff\xff",
            b"r\xff\xff\xff\x1f",
        ):
            cases[f"old format, {hostile[:1]!r} at {at}"] = old[:at] + hostile + old[at:]
    return cases
