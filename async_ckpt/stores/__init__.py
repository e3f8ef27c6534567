"""Where checkpoints are kept: the choice of a store by URL, and one package for each kind of store.

``locate`` names a place, ``open_store`` makes the store that serves it, by the protocol in ``base``.

What does not belong here: when anything is written, and what is written.
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
