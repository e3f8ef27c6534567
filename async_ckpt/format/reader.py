"""From a file back to a state: simple and correct, by ``torch.load`` itself."""

from __future__ import annotations

import os
from typing import Any, BinaryIO

import torch

__all__ = ["read_checkpoint"]


def read_checkpoint(
    file: BinaryIO | str | os.PathLike[str],
    *,
    map_location: Any = None,
    weights_only: bool | None = True,
    mmap: bool = False,
) -> Any:
    """Load a checkpoint.

    Args:
        file: an open, seekable file, or the path of a local one.
        map_location: as for ``torch.load``.
        weights_only: as for ``torch.load``, whose default ``None`` takes; ``False`` runs code from the
            file, so only for files you trust.
        mmap: map a local file into memory and read tensors when they are used.

    Returns:
        The state.

    Raises:
        ValueError: *mmap* for a file that is not given by its path.
    """
    if mmap and not isinstance(file, (str, os.PathLike)):
        raise ValueError("mmap=True needs the path of a local file")
    return torch.load(file, map_location=map_location, weights_only=weights_only, mmap=mmap or None)
