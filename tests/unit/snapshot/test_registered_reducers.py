"""Reducers, methods and picklers that other code has put in: called during the save, as torch.save calls them."""

from __future__ import annotations

import collections
import copyreg
import enum
import functools
import operator
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch

from async_ckpt.errors import UnpicklableStateError
from async_ckpt.snapshot import capture
from tests.unit.snapshot.saving import Colour, file_of, file_of_torch, weights


@pytest.fixture
def calls() -> list[str]:
    """What of the user's was called."""
    return []


@pytest.fixture
def reducers() -> Iterator[Callable[..., None]]:
    """Register reducers with ``copyreg``, for one test."""
    before = dict(copyreg.dispatch_table)
    yield copyreg.pickle
    copyreg.dispatch_table.clear()
    copyreg.dispatch_table.update(before)


def _as_array(calls: list[str]) -> Callable[[torch.Tensor], Any]:
    def reduce(tensor: torch.Tensor) -> Any:
        calls.append("reduce")
        return torch.from_numpy, (tensor.detach().numpy().copy(),)

    return reduce


def _as_list(calls: list[str]) -> Callable[[torch.Tensor], Any]:
    def reduce(tensor: torch.Tensor) -> Any:
        calls.append("reduce")
        return torch.tensor, (tensor.tolist(),)

    return reduce


@pytest.mark.parametrize("make", [_as_array, _as_list])
@pytest.mark.parametrize(
    "kinds", [(torch.Tensor,), (torch.nn.Parameter,), (torch.Tensor, torch.nn.Parameter)]
)
def test_registered_reducers_are_asked_at_the_call(
    make: Any, kinds: Any, reducers: Any, calls: list[str]
) -> None:
    """With reducers for tensors or parameters, the file is torch.save's; they are called by the save, not after it."""
    for kind in kinds:
        reducers(kind, make(calls))
    state = weights()
    expected = file_of_torch(state)
    captured = capture(state)
    asked = len(calls)
    assert asked > 0
    for kind in kinds:
        del copyreg.dispatch_table[kind]
    written = file_of(captured)
    assert written == expected
    assert len(calls) == asked


@pytest.mark.parametrize("kind", [torch.Tensor, torch.nn.Parameter, collections.OrderedDict, type])
def test_what_is_registered_after_the_call_is_not_asked(kind: Any, reducers: Any, calls: list[str]) -> None:
    """A reducer that comes between the save and the writing changes nothing."""
    state = weights()
    expected = file_of_torch(state)
    captured = capture(state)
    reducers(kind, _as_array(calls))
    assert file_of(captured) == expected
    assert calls == []


class Registers:
    """Registers a reducer for tensors as it is pickled."""

    def __reduce__(self) -> Any:
        copyreg.pickle(torch.Tensor, _as_list([]))
        return Registers, ()


def test_what_registers_a_reducer_while_it_is_pickled_is_obeyed(reducers: Any) -> None:
    """What follows it in the state is pickled as torch.save would pickle it."""
    state = [torch.ones(3), Registers(), torch.zeros(3)]
    written = file_of(capture(state))
    assert written == file_of_torch(state)  # by now it is registered for what comes before it, too
    assert copyreg.dispatch_table[torch.Tensor]


@pytest.mark.parametrize("kind", [torch.UntypedStorage, torch.TypedStorage, numpy.ndarray, numpy.dtype])
def test_other_registered_reducers(kind: Any, reducers: Any) -> None:
    """torch.save does not ask reducers for storages, and asks those for arrays: so does a save."""
    reducers(kind, lambda value: (operator.itemgetter, ("replaced",)))
    state = [torch.arange(4.0), torch.arange(3).untyped_storage(), numpy.arange(900.0)]
    assert file_of(capture(state)) == file_of_torch(state)


@pytest.mark.parametrize("kind", [collections.OrderedDict, torch.dtype, type(len), type(torch.FloatStorage)])
def test_reducers_of_what_tensors_are_pickled_with(kind: Any, reducers: Any, calls: list[str]) -> None:
    """They are asked as torch.save asks them, for each tensor, and at the call."""
    state = [weights()["b"], torch.arange(3).to(torch.float8_e5m2), b"x" * 70_000, numpy.arange(9.0)]

    def reduce(value: Any) -> Any:
        calls.append("reduce")
        return str, ("replaced",)

    reducers(kind, reduce)
    expected = file_of_torch(state)
    captured = capture(state)
    asked = len(calls)
    assert asked > 0
    del copyreg.dispatch_table[kind]
    assert file_of(captured) == expected
    assert len(calls) == asked


def test_another_pickler_is_used_as_torch_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the pickler that torch.save takes has been replaced, it writes the file, too."""

    class Other(pickle.Pickler):
        def reducer_override(self, obj: Any) -> Any:
            return (str, ("replaced",)) if isinstance(obj, enum.Enum) else NotImplemented

    monkeypatch.setattr(pickle, "Pickler", Other)
    state = [Colour.RED, torch.ones(3)]
    expected = file_of_torch(state)
    captured = capture(state)
    monkeypatch.undo()
    assert b"replaced" in expected
    assert file_of(captured) == expected


def _doubled(original: Any, calls: list[str]) -> Any:
    def replaced(self: torch.Tensor, protocol: Any) -> Any:
        calls.append("reduce")
        return torch.from_numpy, (self.detach().numpy() * 2,)

    return replaced


def _passing(original: Any, calls: list[str]) -> Any:
    @functools.wraps(original)
    def replaced(self: torch.Tensor, protocol: Any) -> Any:
        calls.append("reduce")
        if self.numel() > 1000:  # what it does with small ones tells nothing of what it does with these
            return torch.from_numpy, (self.detach().numpy() * 2,)
        return original(self, protocol)

    return replaced


@pytest.mark.parametrize("make", [_doubled, _passing])
@pytest.mark.parametrize("kind", [torch.Tensor, torch.nn.Parameter])
@pytest.mark.parametrize("method", ["__reduce_ex__", "_reduce_ex_internal"])
def test_replaced_methods_are_asked_at_the_call(make: Any, kind: Any, method: str, calls: list[str]) -> None:
    """Where a method by which tensors are pickled was replaced, by one that differs only now and then, it is obeyed."""
    state = weights()
    plain = file_of_torch(state)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, method, make(getattr(kind, method), calls))
        expected = file_of_torch(state)
        captured = capture(state)
        asked = len(calls)
    assert file_of(captured) == expected
    assert len(calls) == asked
    assert file_of(capture(state)) == plain  # and afterwards torch is what it was


def test_a_method_that_is_replaced_after_the_call_is_not_asked(
    monkeypatch: pytest.MonkeyPatch, calls: list[str]
) -> None:
    """Nor are functions of torch by which tensors are pickled and rebuilt, which may be gone by then."""
    state = weights()
    expected = file_of_torch(state)
    captured = capture(state)
    for kind in (torch.Tensor, torch.nn.Parameter):
        monkeypatch.setattr(kind, "__reduce_ex__", _doubled(None, calls))
    monkeypatch.setattr(torch.serialization, "_save", None)
    monkeypatch.setattr(torch._utils, "_rebuild_parameter", None)
    monkeypatch.setattr(torch._utils, "_rebuild_tensor_v2", None)
    assert file_of(captured) == expected
    assert calls == []


def test_a_state_of_tensors_that_somebody_adds_is_in_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ``__getstate__`` that tensors were given is asked, as torch.save asks it."""
    monkeypatch.setattr(torch.Tensor, "__getstate__", lambda self: {"note": "added"}, raising=False)
    state = weights()
    assert file_of(capture(state)) == file_of_torch(state)


class Tagged(torch.Tensor):
    """A subclass that says how it is pickled."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _tagged, (self.as_subclass(torch.Tensor) + 1, "tag")


class Watching(torch.Tensor):
    """A subclass that is asked by every function of torch, its own way of being pickled among them."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__reduce_ex__:
            return _tagged, (args[0].as_subclass(torch.Tensor) * 3, "watched")
        parent: Any = super()
        return parent.__torch_function__(func, types, args, kwargs or {})


def _tagged(tensor: torch.Tensor, tag: str) -> torch.Tensor:
    return tensor


class Impostor:
    """Says that it is a storage."""

    __class__ = property(lambda self: torch.UntypedStorage)  # type: ignore[assignment]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Impostor, ()


class Persistent:
    """Has what picklers have."""

    def persistent_id(self, obj: Any) -> Any:
        return "mine"

    def reducer_override(self, obj: Any) -> Any:
        raise AssertionError("nobody's business")


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.arange(9.0).as_subclass(Tagged),
        lambda: torch.nn.Parameter(torch.arange(9.0).as_subclass(Tagged)),
        lambda: torch.arange(9.0).as_subclass(Watching),
        lambda: [Persistent(), torch.ones(2)],
        lambda: Impostor(),
        lambda: (torch.arange(4, dtype=torch.int8)).view(torch.qint8),
        lambda: [
            torch.arange(8, dtype=torch.uint8).view(torch.quint8),
            torch.arange(8).to(torch.int32).view(torch.qint32),
        ],
    ],
)
def test_odd_kinds_are_what_torch_save_writes(make: Callable[[], Any]) -> None:
    """Or they are refused at the call where torch.save refuses them."""
    state = [make(), torch.ones(2)]
    try:
        expected = file_of_torch(state)
    except Exception:
        with pytest.raises(UnpicklableStateError, match=r"state\[0\]"):
            capture(state)
    else:
        assert file_of(capture(state)) == expected


def test_a_name_that_pickle_knows_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where names are registered by number, of what tensors are pickled with or of others, the file is torch.save's."""
    for number, name in (
        (240, ("collections", "OrderedDict")),
        (241, ("torch._utils", "_rebuild_tensor_v2")),
    ):
        copyreg.add_extension(*name, number)
        try:
            state = [weights(), collections.OrderedDict]
            assert file_of(capture(state)) == file_of_torch(state)
        finally:
            copyreg.remove_extension(*name, number)
    state = [weights(), collections.OrderedDict]
    assert file_of(capture(state)) == file_of_torch(state)
