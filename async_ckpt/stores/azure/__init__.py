"""Azure Blob Storage: the entry point is ``store``; ``upload`` and ``source`` transfer the bytes."""

from async_ckpt.stores.azure.store import AzureStore

__all__ = ["AzureStore"]
