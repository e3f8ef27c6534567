"""Finds the storages that a part of a state needs.

Guarantees: none is missed. An object that cannot be searched, such as a tensor of several storages, is an error.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch

__all__ = ["storages_in"]


def storages_in(value: Any) -> set[int]:
    """Return the storages of all tensors in *value*, by their ``_cdata``.

    Raises:
        Exception: something in *value* cannot be searched.
    """
    finder = _Finder(_Nowhere(), protocol=pickle.HIGHEST_PROTOCOL)
    finder.dump(value)
    return finder.found


class _Nowhere(io.RawIOBase):
    def write(self, data: Any, /) -> int:
        return len(data)


class _Finder(pickle.Pickler):
    """A pickler that follows all references."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.found: set[int] = set()

    def persistent_id(self, value: Any) -> Any:
        """Note a tensor's or a storage's memory, and do not descend."""
        if isinstance(value, torch.Tensor):
            simple = type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout is torch.strided
            if not simple or value.is_quantized or value.is_nested or vars(value):
                raise ValueError(f"a tensor that is not simple: {type(value).__name__}, {value.layout}")
            self.found.add(value.untyped_storage()._cdata)
            return "tensor"
        if isinstance(value, (torch.storage.TypedStorage, torch.UntypedStorage)):
            untyped = value._untyped_storage if isinstance(value, torch.storage.TypedStorage) else value
            self.found.add(untyped._cdata)
            return "storage"
        return None
