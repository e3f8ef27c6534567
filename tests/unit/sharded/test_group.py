"""One connection of a process to a group's store, for all its services."""

from __future__ import annotations

import gc
from datetime import timedelta
from typing import Any
from weakref import ref

import torch.distributed as dist

from async_ckpt.sharded.agreement import group
from async_ckpt.sharded.agreement.group import _Connect


def a_store() -> Any:
    """Host one."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def test_services_share_it_until_it_fails() -> None:
    """Who calls again has seen it fail: it gets another, and so do those who call again later."""
    store = a_store()
    one, other = _Connect(lambda: store, "one"), _Connect(lambda: store, "other")
    first, second = one(), other()
    assert first.underlying_store is second.underlying_store is not store
    first.set("key", "a")
    second.set("key", "b")
    assert (first.get("key"), second.get("key")) == (b"a", b"b")
    anew = one()
    assert anew.underlying_store is not first.underlying_store
    assert anew.get("key") == b"a"
    assert other().underlying_store is anew.underlying_store


def test_it_ends_with_the_store() -> None:
    """It does not keep the host of a group alive, or the group's place in the table."""
    store = a_store()
    _Connect(ref(store), "one")()
    assert store in group._connections
    before = len(group._connections)
    del store
    gc.collect()
    assert len(group._connections) == before - 1


def test_store_without_connections() -> None:
    """One within this process is used as it is, and not kept."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=1))
    before = len(group._connections)
    found = _Connect(lambda: store, "one")()
    found.set("key", "a")
    assert store.get("one/key") == b"a"
    assert len(group._connections) == before
