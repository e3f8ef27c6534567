"""Which storages of a state may be copied after the call: those that surely only an optimizer's step changes.

Guarantees: a storage is chosen only if it is the whole memory of exactly one parameter, or one tensor in the state, of
one optimizer, whose last step called our hooks (`optimizers`); if that tensor's version can be read; if the memory is
torch's own and this process's, so not that of an array or a file that became a tensor, nor shared; and if nobody else
owns it, such as a numpy array, another view, or a ``.data`` that somebody keeps. All else is copied in the call.

What does not belong here: the copy.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import torch

from async_ckpt.snapshot.extraction import Extracted, is_lazy_clone
from async_ckpt.snapshot.lazy.deferred import Item
from async_ckpt.snapshot.lazy.optimizers import Stepper, steppers
from async_ckpt.snapshot.sources import without_modes_if_any

__all__ = ["LEAST_BYTES", "choose"]

LEAST_BYTES = 64 << 10
"""Of a storage that is copied after the call: a smaller one costs more to look after than to copy."""

_OWN = 3  # owners of a storage, without the tensors of the state
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_identity = attrgetter("_cdata")


def choose(extracted: Extracted, starts: list[int]) -> dict[Stepper, list[Item]]:
    """Choose among the storages of *extracted*, which are to be copied to the offsets *starts*.

    Returns:
        What is to be copied, by the optimizer that changes it.
    """
    chosen: defaultdict[Stepper, list[Item]] = defaultdict(list)
    sources = extracted.sources
    owned = _owned_storages()
    count_owners = getattr(torch._C, "_storage_Use_Count", None)
    if not owned or sources.begins or count_owners is None:
        return chosen
    identities = list(map(_identity, sources.owners))
    numbers = [
        number
        for number, (nbytes, identity) in enumerate(zip(sources.sizes, identities, strict=True))
        if nbytes >= LEAST_BYTES and owned.get(identity) is not None
    ]
    tensors, found = [], []
    for number in numbers:
        tensor, stepper = owned[identities[number]]  # type: ignore[misc]  # those that are not None
        tensors.append(tensor)
        found.append(stepper)
    counts = map(count_owners, map(identities.__getitem__, numbers))
    addresses, captured = sources.addresses(), _captured_tensors(extracted)
    for number, tensor, stepper, count, is_clone in zip(
        numbers, tensors, found, counts, map(is_lazy_clone, tensors), strict=True
    ):
        # The tensor, the storage's Python object, the capture's alias, and what the state has. In a state, a parameter
        # is mostly another tensor, detached, and what belongs to the optimizer is the tensor itself.
        views = captured.get(number, ())
        explained = _OWN + len(views) - (len(views) > 0 and type(tensor) is torch.Tensor)
        if count > explained or is_clone or not _is_of_torch(sources.owners[number]):
            continue
        try:
            version, shown = tensor._version, [(view, view._version) for view in views]
        except RuntimeError:  # of inference mode: they have none
            continue
        chosen[stepper].append(
            Item(
                number,
                tensor,
                sources.owners[number],
                sources.aliases[number],
                sources.skips[number],
                sources.sizes[number],
                starts[number],
                version,
                addresses[number],
                shown,
            )
        )
    return chosen


def _owned_storages() -> dict[int, tuple[torch.Tensor, Stepper] | None]:
    """Return whose each storage is that an optimizer changes, by the storage's identity; ``None`` where in doubt."""
    owned: dict[int, tuple[torch.Tensor, Stepper] | None] = {}
    for stepper in steppers():
        optimizer = stepper.optimizer()
        if optimizer is None:
            continue
        try:
            is_steady = stepper.is_between_steps
            tensors = [
                each
                for each in _tensors_of(optimizer)
                if type(each) in _PLAIN and each.is_cpu and each.layout is torch.strided
            ]
            with without_modes_if_any():
                keys = list(map(_identity, map(torch.Tensor.untyped_storage, tensors)))
            for tensor, key in zip(tensors, keys, strict=True):
                owned[key] = (tensor, stepper) if is_steady and key not in owned else None
        except (
            Exception
        ):  # it is stepped by another thread just now, or unlike torch's: whose is what it has?
            return {}
    return owned


def _tensors_of(optimizer: torch.optim.Optimizer) -> Iterator[Any]:
    for group in optimizer.param_groups:
        yield from group["params"]
    for values in optimizer.state.values():
        if isinstance(values, dict):
            yield from values.values()


def _is_of_torch(storage: torch.UntypedStorage) -> bool:
    """Return whether no array, file or other process has the memory, too: none of them is an owner that is counted."""
    return storage.resizable() and not storage.is_shared()


def _captured_tensors(extracted: Extracted) -> dict[int, list[torch.Tensor]]:
    """Return the tensors of the state that view each storage, without parameters, which are the optimizer's."""
    captured: dict[int, list[torch.Tensor]] = {}
    columns = extracted.tensors
    for storage, kind, tensor in zip(columns.storages, columns.kinds, extracted.originals, strict=True):
        if kind is torch.Tensor:
            captured.setdefault(storage, []).append(tensor)
    return captured
