"""The pickle in a checkpoint: fills the holes of a skeleton with the bytes that torch's pickler would write.

Guarantees: it looks at no object of the state, looks up nothing by name and does not recurse, so it may run on any
thread at any time. Whether torch pickles tensors and storages in this format is checked elsewhere (`torch_format`).

Pickle refers to an object that occurs again by its memo number, and memo numbers are assigned in the order of the file.
So everything after a hole is renumbered: the skeleton is read opcode by opcode, in runs of opcodes that neither set nor
use a memo number.
"""

from __future__ import annotations

import codecs
import pickle
import re
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from struct import Struct
from typing import Any, NamedTuple

import torch

from async_ckpt.snapshot.columns import Entries
from async_ckpt.snapshot.entries import SharedEntry, StorageEntry, TensorEntry

__all__ = ["Filled", "Reduction", "Runs", "Skeleton", "fill"]

# As text: `re` compiles it when the first file is made.
# Every opcode of protocol 2 that pickle writes in binary. A number followed by BINPERSID is a hole.
_NEXT = (
    rb"(?s)(?:[()\].01NRabetsu}\x81\x85-\x89]|G.{8}|c[^\n]*\n[^\n]*\n"
    rb"|K.(?!Q)|M..(?!Q)|J.{4}(?!Q)|\x80.|\x82.|\x83..|\x84.{4}){0,500}"
    rb"(?:X(.{4})|K(.)Q|M(..)Q|J(.{4})Q|q(.)|r(.{4})|h(.)|j(.{4})|\x8a(.)|\x8b(.{4}))?"
)
_TEXT, _HOLES, _SHORT_PUT, _LONG_PUT, _GETS = 1, (2, 3, 4), 5, 6, (7, 8)

_UINT32 = Struct("<I")
_SHORT = 256  # numbers below it take one byte


def _reference(number: int) -> bytes:
    """Return the opcode that gets a memo entry."""
    return b"h%c" % number if number < _SHORT else b"j" + _UINT32.pack(number)


class Reduction(NamedTuple):
    """How torch pickles the tensors of a dtype.

    Attributes:
        rebuild: the function that rebuilds them.
        storage_type: the class that stands for their storages.
        itemsize: the unit of the storages' length, in bytes.
        dtypes: further arguments after the usual ones.
        rebuild_parameter: the function that rebuilds parameters from them.
    """

    rebuild: Any
    storage_type: type
    itemsize: int
    dtypes: tuple[torch.dtype, ...]
    rebuild_parameter: Any


class Skeleton(NamedTuple):
    """A pickle with holes.

    Attributes:
        pickle: the output of a ``FilePickler``.
        entries: the content of the holes, by number.
        sizes: the storages' sizes in bytes.
        locations: the storages' locations.
        reductions: for the dtypes of the tensors among the entries.
        global_names: the pickled names of objects that are pickled by name, by their identity.
    """

    pickle: bytes
    entries: Entries
    sizes: Sequence[int]
    locations: Sequence[str]
    reductions: Mapping[torch.dtype, Reduction | None]
    global_names: Mapping[int, bytes]


class Runs(NamedTuple):
    """The bytes of a skeleton that are in the filled pickle as they are, memo numbers apart: run after run.

    Attributes:
        begins: where each begins in the skeleton; always an opcode.
        ends: where it ends there.
        places: where it begins in the pickle.
    """

    begins: Sequence[int]
    ends: Sequence[int]
    places: Sequence[int]


class Filled(NamedTuple):
    """A pickle without holes.

    Attributes:
        pickle: the pickle.
        keys: the storages' names in the file, by number, in the order of their occurrence.
        runs: what of it is from the skeleton.
    """

    pickle: bytes
    keys: Mapping[int, str]
    runs: Runs


def fill(skeleton: Skeleton, bytes_at: Callable[[int, int], memoryview]) -> Filled:
    """Fill the holes of *skeleton*.

    Args:
        skeleton: made at the time of the save.
        bytes_at: returns the bytes of an array, given its region and length.
    """
    return _Filler(skeleton, bytes_at).fill()


class _Filler:
    def __init__(self, skeleton: Skeleton, bytes_at: Callable[[int, int], memoryview]) -> None:
        self.keys: dict[int, str] = {}
        self._skeleton = skeleton
        self._entries = skeleton.entries.listed()
        self._bytes_at = bytes_at
        self._count = 0  # of numbers given
        self._memo: dict[int, int] = {}  # the number of what was pickled, by its identity
        self._tensors: dict[int, int] = {}  # the same, by the number of their entry
        self._forms: dict[Any, _Form] = {}
        self._out: list[bytes | memoryview] = []
        self._runs: list[tuple[int, int]] = []  # the place in that list, and the beginning in the skeleton

    def fill(self) -> Filled:
        """Return the pickle, and what became of its parts."""
        source = bytearray(self._skeleton.pickle)  # numbers that keep their length are overwritten
        view, out, runs, match, to_number = (
            memoryview(source),
            self._out,
            self._runs,
            re.compile(_NEXT).match,
            _UINT32.unpack_from,
        )
        numbers: list[int] = []  # those in the file, by those in the skeleton
        kept = at = 0
        while at < len(source):
            found = match(source, at)
            assert found is not None
            group, at = found.lastindex, found.end()
            if group == _TEXT:
                at += to_number(source, at - 4)[0]
                if source[at] != 114:  # what follows is its number, in all but the shortest files
                    continue
                at += 5
                group = _LONG_PUT
            elif group is None:
                assert at > found.start(), (
                    f"opcode {source[at]} is unknown in a pickle of protocol {source[1]}"
                )
                continue
            if group == _LONG_PUT:
                number = self._count
                if number != len(numbers):
                    _UINT32.pack_into(source, at - 4, number)
                numbers.append(number)
                self._count = number + 1
                continue
            if group > _GETS[1]:  # a long integer
                at += int.from_bytes(found[group], "little")
                continue
            number = int.from_bytes(found[group], "little")
            begin = found.start(group) - 1
            if group == _SHORT_PUT:
                numbers.append(self._count)
                written = self._put()
            elif group in _GETS:
                written = _reference(numbers[number])
            else:
                runs.append((len(out), kept))
                out.append(view[kept:begin])
                self._hole(number)
                kept = at
                continue
            if len(written) == at - begin:
                source[begin:at] = written
            else:
                runs.append((len(out), kept))
                out += view[kept:begin], written
                kept = at
        runs.append((len(out), kept))
        out.append(view[kept:])
        places = list(accumulate(map(len, out), initial=0))
        return Filled(
            b"".join(out),
            self.keys,
            Runs(
                array("Q", [begin for _, begin in runs]),
                array("Q", [begin + len(out[piece]) for piece, begin in runs]),
                array("Q", [places[piece] for piece, _ in runs]),
            ),
        )

    def _put(self) -> bytes:
        """Assign the next memo number to the object just pickled."""
        number = self._count
        self._count = number + 1
        return b"q%c" % number if number < _SHORT else b"r" + _UINT32.pack(number)

    def _hole(self, number: int) -> None:
        entry = self._entries[number]
        if isinstance(entry, TensorEntry):
            known = self._tensors.get(number)
            if known is not None:
                self._out.append(_reference(known))
                return
            self._tensor(entry)
            self._tensors[number] = self._count - 1
        elif isinstance(entry, StorageEntry):
            self._write(self._storage(entry.storage, entry.kind, entry.length))
        elif isinstance(entry, SharedEntry):
            self._out.append(self._shared(entry.value))
        else:
            self._out.append(self._binary(self._bytes_at(entry.region, entry.nbytes)))

    def _write(self, pieces: Iterable[bytes | None]) -> None:
        """Write pieces of a pickle; each ``None`` stands for the memo number of the piece before it."""
        self._out += [self._put() if piece is None else piece for piece in pieces]

    def _shared(self, value: Any) -> bytes:
        """Pickle an object that may occur again, or refer to it."""
        known = self._memo.get(id(value))
        if known is not None:
            return _reference(known)
        if isinstance(value, bytes):
            written = self._binary(value)
        elif isinstance(value, str):
            written = _text(value) + self._put()
        else:
            written = self._skeleton.global_names[id(value)] + self._put()
        self._memo[id(value)] = self._count - 1
        return written

    def _binary(self, value: bytes | memoryview) -> bytes:
        """Pickle bytes as protocol 2 does, which has no bytes: as text to be encoded."""
        return b"".join(
            (
                self._shared(codecs.encode),
                _text(str(value, "latin1")),
                self._put(),
                self._shared("latin1"),
                b"\x86",
                self._put(),
                b"R",
                self._put(),
            )
        )

    def _key(self, index: int) -> bytes:
        """Pickle the name of a storage, or refer to it."""
        key = self.keys.get(index)
        if key is None:
            key = self.keys[index] = str(len(self.keys))
        return self._shared(key)

    def _storage(
        self, index: int, kind: type, count: int, *, key: bytes | None = None
    ) -> Iterator[bytes | None]:
        """Pickle what ``torch.save`` gives pickle as the persistent id of a storage."""
        location = self._skeleton.locations[index]
        yield b"("
        yield self._shared("storage")
        yield self._shared(kind)
        if key is None:
            yield self._key(index)
        else:
            yield key
            yield None
        if ":" in location:  # torch makes such a name anew each time, so that pickle writes it each time
            yield _text(location)
            yield None
        else:
            yield self._shared(location)
        yield _integer(count) + b"t"
        yield None
        yield b"Q"

    def _tensor(self, entry: TensorEntry) -> None:
        """Pickle a tensor; after the first of a form, further ones differ only in their numbers."""
        index = entry.storage
        key = str(len(self.keys))
        if index in self.keys or len(key) < 2 or self._count < _SHORT:
            self._write(self._pieces(entry))
            return
        kind = entry[1:], self._skeleton.sizes[index], self._skeleton.locations[index], len(key)
        form = self._forms.get(kind)
        if form is None:
            self._write(self._pieces(entry))
            self._forms[kind] = _form(
                self._pieces(entry, _KEY), len(key)
            )  # what it refers to is numbered now
            return
        writer, constants, count, key_number = form
        number = self._count
        values = constants[:]
        values[1] = key.encode()
        values[3::2] = range(number, number + count)
        self._out.append(writer.pack(*values))
        self.keys[index] = key
        self._memo[id(key)] = number + key_number
        self._count = number + count

    def _pieces(self, entry: TensorEntry, key: bytes | None = None) -> Iterator[bytes | None]:
        """Pickle the reductions of a Tensor or a Parameter; *key* has no memo number yet."""
        index, dtype, offset, size, stride, requires_grad, is_parameter = entry
        reduction = self._skeleton.reductions[dtype]
        assert reduction is not None
        flag = b"\x88" if requires_grad else b"\x89"
        if is_parameter:
            yield self._shared(reduction.rebuild_parameter)
        yield self._shared(reduction.rebuild) + b"("
        count = self._skeleton.sizes[index] // reduction.itemsize
        yield from self._storage(index, reduction.storage_type, count, key=key)
        yield _integer(offset)
        yield from _integers(size)
        yield from _integers(stride)
        yield b"\x89" if is_parameter else flag
        yield self._shared(OrderedDict) + b")R"
        yield None
        for each in reduction.dtypes:
            yield self._shared(each)
        yield b"t"
        yield None
        yield b"R"
        yield None
        if is_parameter:
            yield flag + self._shared(OrderedDict) + b")R"
            yield None
            yield b"\x87"
            yield None
            yield b"R"
            yield None


class _Form(NamedTuple):
    """The common form of tensors that differ only in numbers above 255 and in the name of their storage.

    Attributes:
        writer: joins the constants, with the name in second place and the numbers.
        constants: the bytes in between, with gaps for the name and the numbers.
        numbers: how many numbers there are.
        key_number: which of them is the name's memo number.
    """

    writer: Struct
    constants: list[Any]
    numbers: int
    key_number: int


def _form(pieces: Iterable[bytes | None], key_length: int) -> _Form:
    layout, constant, key_number = "<", b"", 0
    constants: list[Any] = []
    for piece in pieces:
        if piece is None:
            layout += f"{len(constant) + 1}sI"
            constants += constant + b"r", 0
            constant = b""
        elif piece is _KEY:
            layout += f"{len(constant) + 5}s{key_length}s"
            key_number = len(constants) // 2
            constants += constant + b"X" + _UINT32.pack(key_length), b""
            constant = b""
        else:
            constant += piece
    return _Form(Struct(layout), constants, len(constants) // 2 - 1, key_number)


_KEY = bytes(bytearray(b"key"))  # this very object stands for the name of a storage


def _integers(values: tuple[int, ...]) -> Iterator[bytes | None]:
    encoded = b"".join(map(_integer, values))
    if len(values) > 3:
        yield b"(" + encoded + b"t"
    else:
        yield encoded + (b")", b"\x85", b"\x86", b"\x87")[len(values)]
    if values:
        yield None


def _text(value: str) -> bytes:
    encoded = value.encode("utf-8", "surrogatepass")
    return b"X" + _UINT32.pack(len(encoded)) + encoded


def _integer(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]
