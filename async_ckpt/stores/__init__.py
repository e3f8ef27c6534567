"""Stores: the choice of a store by URL, and a package for each kind of storage.

``locate`` returns a location, and ``open_store`` makes the store for it, by the protocol in ``base``.

What does not belong here: when to write, and what.
"""

from __future__ import annotations

from async_ckpt.stores.locate import (
    LOCAL_GROUP,
    Given,
    check_target,
    is_given,
    is_local,
    locate,
    locate_local,
    open_store,
    refuse_mangled,
    relocate,
)

__all__ = [
    "LOCAL_GROUP",
    "Given",
    "check_target",
    "is_given",
    "is_local",
    "locate",
    "locate_local",
    "open_store",
    "refuse_mangled",
    "relocate",
]
