"""Any other file system that fsspec knows: the entry point is ``store``."""

from async_ckpt.stores.generic.store import GenericStore

__all__ = ["GenericStore"]
