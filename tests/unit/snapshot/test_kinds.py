"""States of rare kinds: the file is torch.save's, whatever becomes of the state (S1, S2).

The common kinds are in ``tests/unit/format/test_fidelity.py``.
"""

from __future__ import annotations

import array
import collections
import copyreg
import dataclasses
import enum
import io
import pickle
import random
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch.utils._pytree import tree_map

from async_ckpt.format import lay_out
from async_ckpt.snapshot import Capture, HostBuffer, Snapshot, capture, capture_objects

pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
    pytest.mark.filterwarnings("ignore:Sparse (BSR|invariant)"),
    pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants"),
]


class Wrapper(torch.Tensor):
    """A tensor without memory of its own, that stands for another one."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapper:
        made: Any = torch.Tensor._make_wrapper_subclass(cls, inner.size(), dtype=inner.dtype)
        made.held = inner
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        out = func(*tree_map(_unwrap, args), **tree_map(_unwrap, kwargs or {}))
        return tree_map(lambda value: Wrapper(value) if isinstance(value, torch.Tensor) else value, out)


def _unwrap(value: Any) -> Any:
    return value.held if isinstance(value, Wrapper) else value


class Watcher(torch.Tensor):
    """A tensor that sees every function that it is given to."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        parent: Any = super()
        return parent.__torch_function__(func, types, args, kwargs or {})


class Special(torch.nn.Parameter):
    """A parameter of a user's own."""


class Text(str):
    """A string of a user's own."""

    __slots__ = ()


class Queue(collections.deque[Any]):
    """A deque with attributes."""


class Counts(collections.Counter[str]):
    """A Counter of a user's own."""


class Flags(enum.IntFlag):
    """Values that can be combined."""

    A = 1
    B = 2


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    """A dataclass that cannot be changed."""

    weight: Any
    note: Any = None


class Kind(type):
    """A metaclass."""


class Made(metaclass=Kind):
    """Is made from arguments that it names itself."""

    arguments: Any

    def __new__(cls, *arguments: Any, **named: Any) -> Made:
        made = super().__new__(cls)
        made.arguments = arguments, named
        return made

    def __getnewargs_ex__(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.arange(3),), {"named": torch.arange(2.0)}


class Registered:
    """Is told by ``copyreg`` how to be pickled."""

    def __init__(self, value: Any) -> None:
        self.value = value


copyreg.pickle(Registered, lambda made: (Registered, (made.value,)))


class Counting:
    """Changes each time that it is asked for its state."""

    asked = 0

    def __getstate__(self) -> dict[str, Any]:
        self.asked += 1
        return {"asked": torch.full((3,), float(self.asked))}


class Passing(list[Any]):
    """Makes its items when it is pickled; nobody else keeps them."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Passing, (), None, (torch.full((3,), float(number)) for number in range(20))


class Falsy:
    """Has a state that is no dict, and false."""

    def __getstate__(self) -> Any:
        return ()

    def __bool__(self) -> bool:
        raise RuntimeError("whether it is true is nobody's business")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("what equals it is nobody's business")

    __hash__ = None  # type: ignore[assignment]


def _inference() -> torch.Tensor:
    with torch.inference_mode():
        return torch.ones(3)


def _set() -> torch.Tensor:
    return torch.empty(0).set_(torch.arange(10.0).untyped_storage(), 2, (3,), (2,))


def _swapped() -> list[torch.Tensor]:
    pair = [torch.ones(3), torch.nn.Parameter(torch.zeros(4)).detach()]
    torch.utils.swap_tensors(*pair)
    return pair


def _resized() -> list[torch.Tensor]:
    shorter, longer = torch.arange(10.0).resize_(3), torch.zeros(4)
    longer.untyped_storage().resize_(64)
    torch.empty(0).set_(longer.untyped_storage()).zero_()
    return [shorter, longer]


def _mapped(folder: Path) -> Any:
    torch.save({"a": torch.arange(1000.0), "b": torch.arange(3)}, folder / "mapped")
    return torch.load(folder / "mapped", mmap=True, weights_only=True)


def _memmap(folder: Path) -> Any:
    mapped = numpy.memmap(folder / "array", "f4", "w+", shape=(10,))
    return [mapped, torch.from_numpy(numpy.asarray(mapped))]


def _foreign() -> list[Any]:
    owner = numpy.arange(6.0)
    return [torch.from_numpy(owner), torch.from_numpy(owner[2:]), owner]


def _sparse() -> list[torch.Tensor]:
    values = torch.ones(2)
    twice = torch.sparse_coo_tensor(torch.tensor([[0, 0], [1, 1]]), values, (2, 2))
    return [
        values,
        twice,
        twice.coalesce(),
        torch.ones(3, 4, 2).to_sparse(1),
        torch.eye(4).to_sparse_bsr((2, 2)),
    ]


def _optimizer() -> Any:
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return [optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 10).state_dict()]


def _hooked() -> torch.nn.Module:
    model = torch.nn.Linear(3, 3)
    model.register_forward_hook(_module_hook)
    return model


def _module_hook(*_: Any) -> None:
    """Do nothing."""


STATES: dict[str, Callable[[], Any]] = {
    "wrapper subclass": lambda: [t := torch.arange(4.0), w := Wrapper(t), w, Wrapper(t[1:])],
    "function subclass": lambda: torch.ones(2).as_subclass(Watcher),
    "parameter subclass": lambda: [
        Special(torch.ones(2)),
        torch.nn.Parameter(torch.ones(2).as_subclass(Watcher)),
    ],
    "uninitialized": lambda: [torch.nn.UninitializedParameter(), torch.nn.UninitializedBuffer()],
    "inference": _inference,
    "set_": _set,
    "swapped": _swapped,
    "resized": _resized,
    "expanded": lambda: [
        torch.ones(1).expand(1000),
        torch.empty(0).expand(5, 0),
        torch.ones(3).expand(2, 3)[:, 0],
    ],
    "shared memory": lambda: torch.arange(10.0).share_memory_(),
    "foreign memory": _foreign,
    "sparse": _sparse,
    "quantized, four and two bits": lambda: [
        torch.quantize_per_tensor(torch.arange(8.0), 0.1, 1, dtype)
        for dtype in (torch.quint4x2, torch.quint2x4)
    ],
    "complex halves": lambda: torch.ones(3, dtype=torch.complex32),
    "legacy storages": lambda: [torch.FloatStorage([1.0, 2.0]), torch.BoolStorage(2).fill_(True)],
    "packed sequence": lambda: torch.nn.utils.rnn.pack_sequence([torch.ones(3, 2), torch.zeros(2, 2)]),
    "optimizer": _optimizer,
    "hooked module": _hooked,
    "scaler": lambda: torch.amp.GradScaler("cpu").state_dict(),
    "torch's words": lambda: [torch.Size([1, 2]), torch.float16, torch.device("cuda:1"), torch.sparse_coo],
    "generators": lambda: [random.Random(3), numpy.random.default_rng(1)],
    "tiny": lambda: {f"k{n}": torch.tensor(float(n)) for n in range(5000)},
    "big numbers": lambda: [1 << 100_000, -(1 << 4000), 2**31, -(2**31) - 1, float("nan"), -0.0],
    "odd strings": lambda: ["\udc80abc", "\U0001f600", "a\nb\\", "\udc80" * 70_000, "cpu", "storage", "0"],
    "lengths": lambda: ["xy" * n for n in (1, 128, 40_000)] + [b"xy" * n for n in (0, 1, 128, 40_000)],
    "mutable bytes": lambda: [bytearray(b"xy" * 100), array.array("d", [1.0]), io.BytesIO(b"abc")],
    "frozen dataclasses": lambda: Frozen(torch.ones(1), Frozen(1)),
    "subclasses of builtins": lambda: [
        Text("ab"),
        Text("xy" * 40_000),
        Queue([1], 3),
        Counts(aa=1),
        Flags.A | Flags.B,
    ],
    "keys": lambda: {Text("k1"): 1, None: 2, 1.5: 3, (): 4, b"by": 5, frozenset([7]): 6},
    "made anew": lambda: [Made(), Registered(torch.ones(2)), types.SimpleNamespace(aa=torch.ones(1))],
    "items made on the way": Passing,
    "a false state": lambda: [Falsy(), Falsy()],
    "nested lists": lambda: _nested(sys.getrecursionlimit() // 3),
    "read-only and broadcast arrays": lambda: [_read_only(), numpy.broadcast_to(numpy.arange(3), (4, 3))],
    "array scalars": lambda: [
        numpy.float64(2),
        numpy.str_("xy"),
        numpy.longdouble(1),
        numpy.datetime64("2020"),
    ],
    "odd arrays": lambda: [numpy.zeros(3, "V5"), numpy.zeros((3, 0)), numpy.arange(4).astype(">i4")[::-1]],
}
ON_DISK: dict[str, Callable[[Path], Any]] = {"mapped checkpoint": _mapped, "memory-mapped array": _memmap}


def _nested(depth: int) -> Any:
    state: Any = torch.ones(1)
    for _ in range(depth):
        state = [state]
    return state


def _read_only() -> Any:
    made = numpy.arange(24.0).reshape(2, 3, 4)
    made.flags.writeable = False
    return made


class _Overwriter(pickle.Pickler):
    """Overwrites every storage, array and run of bytes that pickling a state comes upon."""

    def persistent_id(self, obj: Any) -> int | None:
        storage: Any = getattr(obj, "_untyped_storage", obj)
        if isinstance(storage, torch.UntypedStorage):
            torch.empty(0, dtype=torch.uint8).set_(storage).fill_(171)
            return 0
        if isinstance(obj, numpy.ndarray) and obj.flags.writeable and not obj.dtype.hasobject:
            obj[...] = numpy.zeros((), obj.dtype)
        elif isinstance(obj, bytearray):
            obj[:] = b"z"
        return None


def _loads(file: bytes) -> str:
    """Tell whether *file* loads with ``weights_only=True``, and if not, why."""
    try:
        torch.load(io.BytesIO(file), weights_only=True)
    except pickle.UnpicklingError as error:
        return str(error)
    return "yes"


def _check(state: Any) -> None:
    torch.save(state, expected := io.BytesIO())
    captured = capture(state)
    snapshot: Snapshot = captured.stage(HostBuffer(captured.nbytes))
    _Overwriter(io.BytesIO(), 2).dump(state)
    layout = lay_out(snapshot)
    file = b"".join(layout.read(0, layout.nbytes))
    snapshot.close()
    assert file == expected.getvalue()
    assert _loads(file) == _loads(expected.getvalue())


@pytest.mark.parametrize("name", STATES)
def test_a_rare_state_is_written_as_it_was(name: str) -> None:
    """The file equals torch.save's, byte for byte, though all that can be was overwritten."""
    _check(STATES[name]())


@pytest.mark.parametrize("name", ON_DISK)
def test_what_lies_on_disk_is_written_as_it_was(name: str, tmp_path: Path) -> None:
    """Tensors and arrays over files are copied too, for files change."""
    _check(ON_DISK[name](tmp_path))


@pytest.mark.parametrize("take", [capture, capture_objects])
def test_a_state_is_asked_once(take: Callable[[Any], Capture]) -> None:
    """An object that changes when it is asked for its state is asked once, by the save, and not by the writer later."""
    state = Counting()
    captured = take(state)
    snapshot = captured.stage(HostBuffer(captured.nbytes))
    if take is capture:
        lay_out(snapshot)
    else:
        assert torch.equal(snapshot.state().asked, torch.ones(3))
    assert state.asked == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: [str(0), bytes([48]).decode(), "0", *map(str, range(2)), sys.intern(str(0))],
        lambda: [collections.Counter("aab"), *"aab", "a"],
        lambda: [numpy.ones(3), numpy.array([None])],
        lambda: torch.nn.ModuleList([torch.nn.ReLU(), torch.nn.ModuleDict({"0": torch.nn.ReLU()})]),
    ],
)
def test_identical_and_equal_are_told_apart(make: Callable[[], Any]) -> None:
    """Strings and bytes of length one are written once where they are one object, and only there (S1)."""
    _check(make())
