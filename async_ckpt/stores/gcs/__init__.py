"""Google Cloud Storage: the entry point is ``store``; ``upload`` and ``source`` transfer the bytes."""

from async_ckpt.stores.gcs.store import GCSStore

__all__ = ["GCSStore"]
