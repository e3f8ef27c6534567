"""States that are saved where the program has changed what torch's functions do, or what memory is (S1)."""

from __future__ import annotations

import copyreg
import io
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from async_ckpt import CheckpointService, UnpicklableStateError


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


class ClonesResults(TorchDispatchMode):
    """Gives out a copy of whatever torch returns."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return tree_map(_cloned, function(*args, **(kwargs or {})))


class DoublesResults(TorchFunctionMode):
    """Gives out everything with more precision."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        return result.double() if type(result) is torch.Tensor and result.dtype.is_floating_point else result


@pytest.mark.parametrize("mode", [ClonesResults, DoublesResults])
def test_modes_of_the_program(mode: type[AbstractContextManager[Any]], tmp_path: Path) -> None:
    """What is copied is the state, not what a mode makes of it, in small and in large tensors."""
    state = {"small": torch.arange(1.0, 5.0), "large": torch.arange(100_000.0)}
    with CheckpointService(durability="process") as service:
        with mode():
            service.save(state, tmp_path / "a.ckpt")
    loaded = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_memory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """A tensor whose storage only pretends to have memory is refused at the call, as by torch.save."""
    state = {"x": torch._to_functional_tensor(torch.arange(4.0))}
    with CheckpointService() as service, pytest.raises(UnpicklableStateError):
        service.save(state, tmp_path / "a.ckpt")


def test_one_memory_as_two_types_is_refused(tmp_path: Path) -> None:
    """Two storages over one memory with different types are refused at the call, as by torch.save."""
    array = numpy.arange(6, dtype="f4")
    state = [torch.from_numpy(array), torch.from_numpy(array.view("i4"))]
    with pytest.raises(RuntimeError, match="different types"):
        torch.save(state, io.BytesIO())
    with CheckpointService() as service, pytest.raises(UnpicklableStateError, match="different types"):
        service.save(state, tmp_path / "a.ckpt")


@pytest.fixture
def _tensors_are_ones() -> Iterator[None]:
    copyreg.pickle(torch.Tensor, lambda tensor: (int, (1,)))  # type: ignore[arg-type, return-value]
    yield
    del copyreg.dispatch_table[torch.Tensor]


@pytest.mark.usefixtures("_tensors_are_ones")
def test_a_reducer_for_tensors_is_asked_for_the_data_of_parameters(tmp_path: Path) -> None:
    """A parameter is pickled with a tensor, which somebody else may say how to pickle."""
    state = {"x": torch.ones(3), "p": torch.nn.Parameter(torch.ones(2))}
    expected = io.BytesIO()
    torch.save(state, expected)
    with CheckpointService(durability="process") as service:
        service.save(state, tmp_path / "archive")
    assert (tmp_path / "archive").read_bytes() == expected.getvalue()
