"""The process group of a service, and a connection to its store.

Guarantees: ``torch.distributed`` is used only if the program has imported it, or passes a group or a store. Private
names of torch are optional: if one is missing, the error says what to pass instead.

What does not belong here: what is sent through the store.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from typing import Any
from weakref import WeakKeyDictionary, ref

from async_ckpt.errors import OptionError

__all__ = ["ALONE", "Group", "find_group"]

ALONE = object()
"""As a process group: only this process, whatever group it is in."""

_CONNECT_SECONDS = 5.0
_ANSWER_SECONDS = 1.0
"""The time limit of a wait for a key; we never wait for one on purpose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Who takes part.

    Attributes:
        rank: of this process in the group.
        world_size: how many there are.
        connect: opens a connection to the store under a prefix of our own; ``None`` in a world of one.
    """

    rank: int
    world_size: int
    connect: Callable[[], Any] | None


_opened: WeakKeyDictionary[Any, Counter[str]] = WeakKeyDictionary()
"""How many services of each group have been made, by the store. All ranks make the same ones, in the same order."""


def find_group(process_group: Any = None, store: Any = None) -> Group:
    """Return who takes part in the saves of a service.

    Args:
        process_group: torch's; ``None`` is the default group, or this process alone where there is none; ``ALONE``.
        store: through which they talk; ``None`` is the one through which the ranks found each other. Without a
            process group, RANK and WORLD_SIZE in the environment say who this is.

    Raises:
        OptionError: there is a group, and no store is to be had; or a store, and no group.
    """
    if process_group is ALONE:
        return Group(rank=0, world_size=1, connect=None)
    distributed: Any = sys.modules.get("torch.distributed")
    is_there = distributed is not None and distributed.is_available() and distributed.is_initialized()
    if process_group is not None and not is_there:
        raise OptionError(
            f"process_group=<{type(process_group).__name__}>: torch.distributed is not initialized"
        )
    if is_there:
        rank = distributed.get_rank(process_group)
        world_size = distributed.get_world_size(process_group)
        name = _name(distributed, process_group)
        if rank < 0:
            raise OptionError(
                "process_group: this process is none of its ranks; make the service on those alone"
            )
    elif store is not None:
        try:
            rank, world_size, name = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), "env"
        except (KeyError, ValueError) as missing:
            raise OptionError(
                f"store=<{type(store).__name__}>: initialize torch.distributed, or set RANK and WORLD_SIZE"
            ) from missing
    else:
        return Group(rank=0, world_size=1, connect=None)
    if world_size == 1:
        return Group(rank=0, world_size=1, connect=None)
    is_borrowed = store is None
    if store is None:
        store = _default_store(distributed)
    if store is None:
        raise OptionError(
            "store=None: the process group has no store (MPI has none); hand one over, as a TCPStore"
        )
    prefix = f"async_ckpt/sharded/{name}/{_number(store, name)}"
    # Weakly where it is torch's own, lest rank 0 go on to host it when the group has ended.
    held: Callable[[], Any] = ref(store) if is_borrowed else lambda: store
    return Group(rank=rank, world_size=world_size, connect=_Connect(held, prefix))


def _default_store(distributed: Any) -> Any:
    try:
        return distributed.distributed_c10d._get_default_store()
    except Exception:
        return None


def _name(distributed: Any, process_group: Any) -> str:
    """Return a name that is unique among the groups of this store."""
    if process_group is None:
        return "world"
    try:
        ranks = distributed.get_process_group_ranks(process_group)
    except Exception:
        ranks = []
    name = getattr(process_group, "group_name", "")
    return hashlib.sha256(f"{name}:{ranks}".encode()).hexdigest()[:16]


def _number(store: Any, name: str) -> int:
    try:
        counts = _opened.setdefault(store, Counter())
    except TypeError:  # a store of the user's own that cannot be referred to weakly
        return 0
    counts[name] += 1
    return counts[name]


_connections: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
"""The connection of this process to each store. All services share it: torch takes seconds for some, as it asks for the
name of the host's address, and a host serves only so many."""

os.register_at_fork(after_in_child=_connections.clear)


class _Connect:
    """Connects to a store, within a prefix; anew each time it is called by the same service.

    Args:
        held: returns the store, or ``None`` where the process group has ended.
        prefix: that of the keys.
    """

    def __init__(self, held: Callable[[], Any], prefix: str) -> None:
        self._held = held
        self._prefix = prefix
        self._last: Any = None  # which has failed, or hangs, if there is another call

    def __call__(self) -> Any:
        store = self._held()
        if store is None:
            raise ConnectionError("the process group has ended")
        own = self._last = self._shared(store)
        return _torch_distributed().PrefixStore(self._prefix, own)

    def _shared(self, store: Any) -> Any:
        try:
            known = _connections.get(store)
        except TypeError:  # a store of the user's own that cannot be referred to weakly
            return _connection_to(store)
        if known is None or known is self._last:
            known = _connection_to(store)
            if known is not store:
                _connections[store] = known
        return known


def _connection_to(store: Any) -> Any:
    """Return a connection of our own to *store*, if possible: a blocked call blocks all others on its connection."""
    distributed = _torch_distributed()
    prefixes, bottom = [], store
    while isinstance(bottom, distributed.PrefixStore) and hasattr(bottom, "underlying_store"):
        prefixes.append(getattr(bottom, "prefix", None))
        bottom = bottom.underlying_store
    own = _cloned(store)
    if own is None and None not in prefixes:
        own = _dialed(bottom)
        for each in reversed(prefixes) if own is not None else ():
            own = distributed.PrefixStore(each, own)
    return store if own is None else own


def _cloned(store: Any) -> Any:
    """Return a clone of *store*, or ``None`` if torch, or this kind of store, does not support that."""
    try:
        return _impatient(store.clone())
    except (AttributeError, NotImplementedError):
        return None


def _dialed(store: Any) -> Any:
    """Return a new connection to *store*'s host, or ``None`` if it has none."""
    host, port = getattr(store, "host", None), getattr(store, "port", None)
    if host is None or port is None:
        return None
    timeout = timedelta(seconds=_CONNECT_SECONDS)
    return _impatient(_torch_distributed().TCPStore(host, port, None, False, timeout, wait_for_workers=False))


def _impatient(store: Any) -> Any:
    """Set a short time limit for waits on *store*, if nothing else uses the connection."""
    bottom = store
    while hasattr(bottom, "underlying_store"):
        bottom = bottom.underlying_store
    if isinstance(bottom, _torch_distributed().TCPStore):
        bottom.set_timeout(timedelta(seconds=_ANSWER_SECONDS))
    return store


def _torch_distributed() -> Any:
    return import_module("torch.distributed")
