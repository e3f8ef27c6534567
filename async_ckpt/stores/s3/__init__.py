"""Amazon S3 and what speaks its language: ``store`` is the way in, ``upload`` and ``source`` move the bytes."""

from async_ckpt.stores.s3.store import S3Store

__all__ = ["S3Store"]
