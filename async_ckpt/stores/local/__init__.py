"""Local disks and mounted file systems: the entry point is ``store``."""

from async_ckpt.stores.local.store import LocalStore

__all__ = ["LocalStore"]
