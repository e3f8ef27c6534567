"""Checkpoints on a local disk, and on whatever is mounted as one: ``store`` is the way in."""

from async_ckpt.stores.local.store import LocalStore

__all__ = ["LocalStore"]
