"""Amazon S3 and compatible servers: the entry point is ``store``; ``upload`` and ``source`` transfer the bytes."""

from async_ckpt.stores.s3.store import S3Store

__all__ = ["S3Store"]
