"""Once a save was called, nothing of the user's is run, looked up by its name or referred to for its file (S1).

What pickle would be told is asked at the call; the file is the one that ``torch.save`` would have written then.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch

from async_ckpt.errors import StateChangedError
from async_ckpt.format import lay_out
from async_ckpt.snapshot import HostBuffer, capture, capture_objects
from tests.unit.snapshot.saving import Colour, file_of, file_of_torch

# -- what is changed or gone when the file is written


class Holder:
    """Holds things, and has a method."""

    def __init__(self) -> None:
        self.value = [1]

    def method(self) -> Any:
        return self.value


def _rename(array: Any) -> None:
    array.dtype.names = tuple(f"secret{number}" for number in range(len(array.dtype.names)))


def _structured(length: int) -> Any:
    return numpy.zeros(length, [("a", "i4"), ("b", [("c", "f8")])])


def _dtypes() -> tuple[Any, Callable[[], None]]:
    small, large, inner = _structured(3), _structured(3000), _structured(1).dtype
    alone, kept = numpy.dtype([("x", "i1")]), {"unit": ["m"]}
    noted = numpy.dtype("f8", metadata=kept)

    def change() -> None:
        for each in (small, large, small["b"]):
            _rename(each)
        inner["b"].names = ("secret",)
        alone.names = ("secret",)
        kept["unit"].append("secret")

    return [small, large, small[::2], inner, alone, noted], change


def _bound() -> tuple[Any, Callable[[], None]]:
    holder, keywords, part = Holder(), {"base": [2]}, functools.partial(int, **{"base": 2})  # noqa: PIE804
    items: list[Any] = [1]
    space = types.SimpleNamespace(a=[1])

    def change() -> None:
        holder.value.append("secret")
        keywords["base"].append(3)
        part.keywords["secret"] = 3
        items.append("secret")
        space.a.append("secret")

    return [holder.method, keywords, part, items.append, space, Colour.RED], change


CHANGES: dict[str, Callable[[], tuple[Any, Callable[[], None]]]] = {"dtypes": _dtypes, "bound": _bound}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.filterwarnings("ignore:metadata on a dtype")
def test_nothing_is_shared_that_can_change(name: str) -> None:
    """Types of arrays, bound methods, partial functions and what they hold are in the file as they were."""
    state, change = CHANGES[name]()
    expected = file_of_torch(state)
    captured = capture(state)
    snapshot = captured.stage(HostBuffer(captured.nbytes))
    change()
    layout = lay_out(snapshot)
    written = b"".join(layout.read(0, layout.nbytes))
    assert written == expected
    assert b"secret" not in written


@pytest.mark.filterwarnings("ignore:metadata on a dtype")
def test_objects_share_no_dtype_that_can_change() -> None:
    """Nor are types of arrays shared with a state that a base CheckpointIO is given."""
    state, change = _dtypes()
    captured = capture_objects(state)
    snapshot = captured.stage(HostBuffer(captured.nbytes))
    change()
    rebuilt = snapshot.state()
    assert [array.dtype.names for array in rebuilt[:3]] == [("a", "b")] * 3
    assert rebuilt[3]["b"].names == ("c",)
    assert rebuilt[4].names == ("x",)
    assert rebuilt[0].dtype is rebuilt[2].dtype


@pytest.fixture
def module() -> Iterator[types.ModuleType]:
    """A module that goes away."""
    made = types.ModuleType("a_module_that_goes_away")
    sys.modules[made.__name__] = made
    exec(
        "import enum\n"
        "class Thing:\n    pass\n"
        "class Made(Thing):\n    def __reduce__(self):\n        return make, (1,)\n"
        "class Word(enum.Enum):\n    ONE = 1\n"
        "def make(x, kind=Made):\n    return kind()\n"
        "class Constant:\n    def __reduce__(self):\n        return 'CONSTANT'\n"
        "CONSTANT = Constant()\n",
        vars(made),
    )
    yield made
    sys.modules.pop(made.__name__, None)


def _things(module: Any) -> Any:
    thing = module.Thing()
    thing.weight = torch.arange(600.0)
    return [thing, module.Made(), module.Word.ONE, module.Thing, module.make, module.CONSTANT, thing]


def _deleted(module: Any) -> None:
    for name in ("Thing", "Made", "Word", "make", "CONSTANT"):
        delattr(module, name)


def _dropped(module: Any) -> None:
    del sys.modules[module.__name__]


def _made_again(module: Any) -> None:
    for name in ("Thing", "Made", "Word", "make"):
        setattr(module, name, type(name, (), {"__module__": module.__name__}))


def _renamed(module: Any) -> None:
    for name in ("Thing", "Made", "Word", "make"):
        getattr(module, name).__qualname__ = "Other"
    module.__name__ = "other"


GONE = [_deleted, _dropped, _made_again, _renamed]


@pytest.mark.parametrize("go", GONE)
def test_what_is_gone_after_the_call_is_in_the_file(go: Callable[[Any], None], module: Any) -> None:
    """Classes that are deleted, renamed or made again, and modules that are dropped, do not fail a save."""
    state = _things(module)
    expected = file_of_torch(state)
    captured = capture(state)
    go(module)
    assert file_of(captured) == expected


@pytest.mark.parametrize("go", GONE)
def test_what_is_gone_after_the_call_is_given_to_a_base(go: Callable[[Any], None], module: Any) -> None:
    """A base CheckpointIO is given objects of the classes that were there at the call."""
    state = _things(module)
    captured = capture_objects(state)
    snapshot = captured.stage(HostBuffer(captured.nbytes))
    go(module)
    rebuilt = snapshot.state()
    assert [type(each) for each in rebuilt] == [type(each) for each in state]
    assert rebuilt[2] is state[2]
    assert rebuilt[5] is state[5]
    assert rebuilt[0] is not state[0]
    assert torch.equal(rebuilt[0].weight, torch.arange(600.0))


def test_a_quantized_look_at_bytes_is_given_to_a_base() -> None:
    """A tensor that looks at bytes as a quantized type, which torch does not make by itself, is made again."""
    state = torch.arange(12, dtype=torch.int8)[2:].view(torch.qint8)
    captured = capture_objects(state)
    rebuilt = captured.stage(HostBuffer(captured.nbytes)).state()
    assert rebuilt.dtype is torch.qint8
    assert rebuilt.view(torch.int8).tolist() == list(range(2, 12))


# -- memory that is gone


@pytest.mark.parametrize(
    "go",
    [
        lambda state: state["large"].untyped_storage().resize_(0),
        lambda state: state["large"].untyped_storage().resize_(8 << 20),
        lambda state: state["small"].untyped_storage().resize_(0),
        lambda state: state["array"].resize((3,), refcheck=False),
        lambda state: state["array"].resize((0,), refcheck=False),
    ],
)
@pytest.mark.parametrize("take", [capture, capture_objects])
def test_memory_that_was_freed_is_not_read(take: Any, go: Callable[[Any], None]) -> None:
    """Where another thread frees or resizes memory before it is copied, the save fails with an ordinary error."""
    state = {"large": torch.ones(1 << 20), "small": torch.ones(10), "array": numpy.ones(900)}
    other = take(state).stage(HostBuffer(8 << 20))
    captured = take(state)
    assert captured.resembles(other)
    go(state)
    assert not captured.equals(HostBuffer(captured.nbytes))
    with pytest.raises(StateChangedError, match="freed or resized"):
        captured.stage(HostBuffer(captured.nbytes))


# -- tensors that change meanwhile


@pytest.mark.parametrize("take", [capture, capture_objects])
@pytest.mark.parametrize("numel", [3, 100_000])
def test_a_tensor_that_is_given_other_memory_is_saved_as_it_was(take: Any, numel: int) -> None:
    """What a tensor is made to refer to between the capture and the copy does not get into the save."""
    weights = torch.nn.Parameter(torch.ones(numel))
    before = weights.data
    captured = take({"weights": weights, "view": before[1:]})
    weights.data = torch.zeros(2, 2, dtype=torch.float16)
    snapshot = captured.stage(HostBuffer(captured.nbytes))
    assert bytes(snapshot.view(0)) == before.numpy().tobytes()


class Moves:
    """Has a tensor refer to other memory as it is pickled, and changes how it is seen."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __reduce__(self) -> Any:
        self.tensor.data = torch.zeros(4, 2, dtype=torch.float64)[:, 1]
        return Moves, (None,)


@pytest.mark.parametrize("kind", [torch.Tensor, torch.nn.Parameter])
def test_code_of_the_state_changes_what_was_pickled_before(kind: Any) -> None:
    """A tensor that an object changes as it is pickled is saved as it was when pickle came to it, as by torch.save."""
    files = []
    for save in (file_of_torch, lambda state: file_of(capture(state))):
        tensor = kind(torch.arange(6.0))
        files.append(save([torch.ones(2), tensor, Moves(tensor), torch.ones(3), tensor]))
    assert files[0] == files[1]
