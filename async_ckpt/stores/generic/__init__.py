"""Checkpoints on any other file system that fsspec knows: ``store`` is the way in."""

from async_ckpt.stores.generic.store import GenericStore

__all__ = ["GenericStore"]
