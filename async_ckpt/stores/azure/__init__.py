"""Azure Blob Storage: ``store`` is the way in, ``upload`` and ``source`` move the bytes."""

from async_ckpt.stores.azure.store import AzureStore

__all__ = ["AzureStore"]
