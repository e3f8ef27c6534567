"""Google Cloud Storage: ``store`` is the way in, ``upload`` and ``source`` move the bytes."""

from async_ckpt.stores.gcs.store import GCSStore

__all__ = ["GCSStore"]
