"""Keeps plans from save to save, so that each plan is sent only once.

Guarantees: a plan is identified by a number, never as "the last one", so overlapping saves may receive theirs in any
order. The number of plans that are kept is bounded (B3).

What does not belong here: how a plan is made (`plan`), how it is sent (`agreement`).
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from async_ckpt.errors import AsyncCheckpointError
from async_ckpt.sharded.writing.flatten import Flattened, ItemSpec
from async_ckpt.sharded.writing.plan import GlobalPlan, LocalPlan, make_global_plan
from async_ckpt.system.garbage import collector_held_back

__all__ = ["Plans", "Structure"]

K = TypeVar("K")
V = TypeVar("V")

_KEPT = 8
_NUMBER_BYTES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """The items of a rank, without their bytes.

    Attributes:
        number: identifies the structure to the coordinator; it stays the same until the structure changes.
        specs: of the items.
        mappings: by name, the path to the item in the nested state.
        local: the rank's plan.
        positions: for each item, its index among the tensors, or among the pickled values.
    """

    number: bytes
    specs: Sequence[ItemSpec]
    mappings: Mapping[str, tuple[str | int, ...]]
    local: LocalPlan
    positions: Sequence[int]


@dataclass(slots=True)
class _Known:
    """A plan of the coordinator; *is_known* says whether it was sent to every rank."""

    number: bytes
    plan: GlobalPlan
    is_known: bool = False


@dataclass(slots=True)
class Plans:
    """The plans that one rank knows. Several saves may call its methods at the same time, in workers."""

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
                if known.specs == flattened.specs and known.mappings == flattened.mappings:
                    return known
            number = self._next()
            return _keep(self._structures, number, _structure(number, flattened))

    def work(self, message: bytes) -> array[int]:
        """Return the numbers of the items to write.

        Args:
            message: of the coordinator: the number of a plan, and the items unless they were sent before.

        Raises:
            AsyncCheckpointError: they were not sent before.
        """
        number, items = message[:_NUMBER_BYTES], message[_NUMBER_BYTES:]
        with self._lock:
            if len(message) > _NUMBER_BYTES:
                _keep(self._work, number, array("I", items[1:]))
            if number not in self._work:
                raise AsyncCheckpointError(
                    "the first rank refers to a plan that this rank has not received; please report it"
                )
            return self._work[number]

    # -- only on the coordinator

    @collector_held_back()
    def decide(self, plans: Sequence[tuple[bytes, bytes]]) -> list[bytes]:
        """Return the message for each rank, given the number of its structure and its plan.

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
            # With a byte in between, because a rank may have nothing to write.
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
    positions, tensors, blobs = [], 0, 0
    for spec in flattened.specs:
        if spec.dtype is None:
            positions.append(blobs)
            blobs += 1
        else:
            positions.append(tensors)
            tensors += 1
    local = LocalPlan.of(flattened.specs, flattened.mappings)
    return Structure(
        number=number,
        specs=flattened.specs,
        mappings=flattened.mappings,
        local=local,
        positions=positions,
    )


def _keep(known: dict[K, V], key: K, value: V) -> V:
    """Add *value*, and remove the oldest value if there are too many."""
    while len(known) >= _KEPT:
        del known[next(iter(known))]
    known[key] = value
    return value
