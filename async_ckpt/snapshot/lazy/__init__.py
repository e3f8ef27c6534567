"""Bulk data that is copied after the call, while nothing may change it: what only an optimizer's step changes.

``choose`` finds the storages of a state that surely belong to an optimizer that the program steps in the ordinary way
(`choice`, `optimizers`). A ``DeferredCopy`` copies them in workers, and the optimizer's next step waits for, and helps
with, what is left (`deferred`). What changes them in any other way, and is counted by torch, fails the save (S1).

What does not belong here: everything that is copied in the call, the threads that copy later.
"""

from __future__ import annotations

from async_ckpt.snapshot.lazy.choice import choose
from async_ckpt.snapshot.lazy.deferred import DeferredCopy, Item
from async_ckpt.snapshot.lazy.optimizers import pass_all, watch
from async_ckpt.snapshot.lazy.switch import Switch

__all__ = ["DeferredCopy", "Item", "Switch", "choose", "pass_all", "watch"]
