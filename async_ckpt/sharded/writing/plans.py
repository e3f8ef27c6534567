"""What a rank remembers of plans from save to save, so that a plan is sent only once.

Guarantees: a plan is identified by a number, never as "the last one", so overlapping saves may learn of theirs in any
order. The number of plans that are kept is bounded (B3).

What does not belong here: how a plan is made (`plan`), who is told (`agreement`).
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from async_ckpt.errors import AsyncCheckpointError
from async_ckpt.sharded.writing.flatten import Flattened, Form
from async_ckpt.sharded.writing.plan import GlobalPlan, LocalPlan, make_global_plan
from async_ckpt.system.garbage import collector_held_back

__all__ = ["Plans", "Structure"]

K = TypeVar("K")
V = TypeVar("V")

_KEPT = 8
_NUMBER_BYTES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """The forms of a rank's items, and what follows from them.

    Attributes:
        number: told to the coordinator; the same as long as nothing changes.
        forms: of the items.
        local: the rank's plan.
        places: for each item, where it is among the tensors, or among the values that are pickled.
    """

    number: bytes
    forms: Sequence[Form]
    mappings: Mapping[str, tuple[str | int, ...]]
    local: LocalPlan
    places: Sequence[int]


@dataclass(slots=True)
class _Known:
    """A plan of the coordinator; *is_known* once it was sent to every rank."""

    number: bytes
    plan: GlobalPlan
    is_known: bool = False


@dataclass(slots=True)
class Plans:
    """The plans that one rank knows. Its methods are called in workers, by several saves at a time."""

    _lock: threading.Lock = field(default_factory=threading.Lock)
    _count: int = 0
    _structures: dict[bytes, Structure] = field(default_factory=dict)
    _work: dict[bytes, array[int]] = field(default_factory=dict)
    _global: dict[tuple[bytes, ...], _Known] = field(default_factory=dict)

    @collector_held_back()
    def structure(self, flattened: Flattened) -> Structure:
        """Return the structure of a state; that of an earlier save if nothing has changed."""
        with self._lock:
            for known in self._structures.values():
                if known.forms == flattened.forms and known.mappings == flattened.mappings:
                    return known
            number = self._next()
            return _keep(self._structures, number, _structure(number, flattened))

    def work(self, told: bytes) -> array[int]:
        """Return the numbers of the items to be written, as the coordinator has told them now or before.

        Raises:
            AsyncCheckpointError: it takes for known what was never told here.
        """
        number, items = told[:_NUMBER_BYTES], told[_NUMBER_BYTES:]
        with self._lock:
            if len(told) > _NUMBER_BYTES:
                _keep(self._work, number, array("I", items[1:]))
            if number not in self._work:
                raise AsyncCheckpointError("the first rank refers to a plan that this rank was not told")
            return self._work[number]

    # -- of the coordinator alone

    @collector_held_back()
    def decide(self, plans: Sequence[tuple[bytes, bytes]]) -> list[bytes]:
        """Return what each rank is told, from the number of its structure and its plan.

        Raises:
            ValueError: the parts of a tensor overlap, or do not make up the whole.
        """
        key = tuple(number for number, _ in plans)
        with self._lock:
            known = self._global.get(key)
            if known is None:
                made = make_global_plan([LocalPlan.from_bytes(sent) for _, sent in plans])
                known = _keep(self._global, key, _Known(self._next(), made))
            if known.is_known:
                return [known.number] * len(plans)
            # With a byte between: a rank may have nothing to write.
            return [known.number + b"\0" + items.tobytes() for items in known.plan.work]

    def decided(self, numbers: Sequence[bytes]) -> GlobalPlan:
        """Return the plan for ranks with these structures; it has been sent to every rank."""
        with self._lock:
            known = self._global[tuple(numbers)]
            known.is_known = True
            return known.plan

    def _next(self) -> bytes:
        self._count += 1
        return self._count.to_bytes(_NUMBER_BYTES, "big")


def _structure(number: bytes, flattened: Flattened) -> Structure:
    places, tensors, blobs = [], 0, 0
    for form in flattened.forms:
        if form.dtype is None:
            places.append(blobs)
            blobs += 1
        else:
            places.append(tensors)
            tensors += 1
    local = LocalPlan.of(flattened.forms, flattened.mappings)
    return Structure(
        number=number,
        forms=flattened.forms,
        mappings=flattened.mappings,
        local=local,
        places=places,
    )


def _keep(known: dict[K, V], key: K, value: V) -> V:
    """Add *value*, and remove the oldest value if there are too many."""
    while len(known) >= _KEPT:
        del known[next(iter(known))]
    known[key] = value
    return value
