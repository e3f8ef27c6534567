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
    """The ranks that take part.

    Attributes:
        rank: the rank of this process in the group.
        world_size: the number of ranks.
        connect: opens a connection to the store, under a prefix of our own; ``None`` if there is only one rank.
    """

    rank: int
    world_size: int
    connect: Callable[[], Any] | None


_service_counts: WeakKeyDictionary[Any, Counter[str]] = WeakKeyDictionary()
"""By store: how many services each group has. All ranks make the same services, in the same order."""


def find_group(process_group: Any = None, store: Any = None) -> Group:
    """Return the ranks that take part in the saves of a service.

    Args:
        process_group: a group of torch; ``ALONE``; or ``None``, which means the default group or, without one, this
            process alone.
        store: through which the ranks communicate; ``None`` means the store that the group was initialized with.
            Without a process group, RANK and WORLD_SIZE in the environment identify this process.

    Raises:
        OptionError: there is a group but no store, or a store but no group.
    """
    if process_group is ALONE:
        return Group(rank=0, world_size=1, connect=None)
    distributed: Any = sys.modules.get("torch.distributed")
    is_there = distributed is not None and distributed.is_available() and distributed.is_initialized()
    if process_group is not None and not is_there:
        raise OptionError(
            f"process_group=<{type(process_group).__name__}>: torch.distributed is not initialized; "
            "call init_process_group first"
        )
    if is_there:
        rank = distributed.get_rank(process_group)
        world_size = distributed.get_world_size(process_group)
        name = _name(distributed, process_group)
        if rank < 0:
            raise OptionError(
                "process_group: this process is not one of its ranks; make the service only on its ranks"
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
    is_torchs_own = store is None
    if store is None:
        store = _default_store(distributed)
    if store is None:
        raise OptionError(
            "store=None: the process group has no store (with MPI, none has); pass one, such as a TCPStore"
        )
    prefix = f"async_ckpt/sharded/{name}/{_number(store, name)}"
    # A weak reference to torch's own store: otherwise rank 0 would host it even after the group has ended.
    get_store: Callable[[], Any] = ref(store) if is_torchs_own else lambda: store
    return Group(rank=rank, world_size=world_size, connect=_Connect(get_store, prefix))


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
        counts = _service_counts.setdefault(store, Counter())
    except TypeError:  # the user's own store, which does not support weak references
        return 0
    counts[name] += 1
    return counts[name]


_connections: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
"""The connection of this process to each store, which all services share: opening one can take torch seconds, because
it looks up the host's name, and a host serves a limited number of them."""

os.register_at_fork(after_in_child=_connections.clear)


class _Connect:
    """Connects one service to a store; each call makes a new connection.

    Args:
        get_store: returns the store, or ``None`` if the process group has ended.
        prefix: the prefix of the keys.
    """

    def __init__(self, get_store: Callable[[], Any], prefix: str) -> None:
        self._get_store = get_store
        self._prefix = prefix
        self._previous: Any = None  # it has failed or hangs, if there is another call

    def __call__(self) -> Any:
        store = self._get_store()
        if store is None:
            raise ConnectionError("the process group has ended")
        connection = self._previous = self._shared(store)
        return _torch_distributed().PrefixStore(self._prefix, connection)

    def _shared(self, store: Any) -> Any:
        try:
            known = _connections.get(store)
        except TypeError:  # the user's own store, which does not support weak references
            return _connection_to(store)
        if known is None or known is self._previous:
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
    connection = _clone(store)
    if connection is None and None not in prefixes:
        connection = _reconnected(bottom)
        for each in reversed(prefixes) if connection is not None else ():
            connection = distributed.PrefixStore(each, connection)
    return store if connection is None else connection


def _clone(store: Any) -> Any:
    """Return a clone of *store*, or ``None`` if torch, or this kind of store, does not support that."""
    try:
        return _with_short_timeout(store.clone())
    except (AttributeError, NotImplementedError):
        return None


def _reconnected(store: Any) -> Any:
    """Return a new connection to *store*'s host, or ``None`` if it has none."""
    host, port = getattr(store, "host", None), getattr(store, "port", None)
    if host is None or port is None:
        return None
    timeout = timedelta(seconds=_CONNECT_SECONDS)
    return _with_short_timeout(
        _torch_distributed().TCPStore(host, port, None, False, timeout, wait_for_workers=False)
    )


def _with_short_timeout(store: Any) -> Any:
    """Set a short time limit for waits on *store*, if nothing else uses the connection."""
    bottom = store
    while hasattr(bottom, "underlying_store"):
        bottom = bottom.underlying_store
    if isinstance(bottom, _torch_distributed().TCPStore):
        bottom.set_timeout(timedelta(seconds=_ANSWER_SECONDS))
    return store


def _torch_distributed() -> Any:
    return import_module("torch.distributed")
