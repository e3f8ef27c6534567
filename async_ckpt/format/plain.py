"""Whether a pickle rebuilds its tensors without a look at what is in them.

Guarantees: nothing that the pickle names is imported or called. The answer is yes only where every class and
function that it names is known to treat the contents of a tensor as something to be kept, not read.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch

__all__ = ["is_plain"]

_NAMES = {
    "_codecs": {"encode"},
    "argparse": {"Namespace"},
    "collections": {"Counter", "OrderedDict", "defaultdict", "deque"},
    "copy_reg": {"_reconstructor"},
    "copyreg": {"_reconstructor"},
    "datetime": {"date", "datetime", "timedelta", "timezone"},
    "lightning.fabric.utilities.data": {"AttributeDict"},
    "lightning_fabric.utilities.data": {"AttributeDict"},
    "numpy": {"dtype", "ndarray"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "torch": {"Size", "device"},
    "torch._utils": {"_rebuild_parameter", "_rebuild_parameter_with_state", "_rebuild_tensor_v2"},
    "torch.serialization": {"_get_layout"},
    "torch.storage": {"TypedStorage", "UntypedStorage"},
}
_BUILTINS = {
    "bytearray",
    "complex",
    "dict",
    "frozenset",
    "int",
    "list",
    "object",
    "range",
    "set",
    "slice",
    "tuple",
}


def is_plain(pickled: bytes) -> bool:
    """Tell whether *pickled*, the pickle of a checkpoint, rebuilds tensors whatever their contents are."""
    reader = _Reader(io.BytesIO(pickled), encoding="latin1")
    try:
        reader.load()
    except Exception:  # torch.load will say what is wrong with it
        return False
    return reader.plain


class _Inert:
    """Stands for whatever a pickle makes."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Take anything."""

    def __setstate__(self, _: Any) -> None:
        """Take anything."""

    def __setitem__(self, _: Any, __: Any) -> None:
        """Take anything."""

    def append(self, _: Any) -> None:
        """Take anything."""

    def extend(self, _: Any) -> None:
        """Take anything."""

    def add(self, _: Any) -> None:
        """Take anything."""


class _Reader(pickle.Unpickler):
    """Goes through a pickle and makes nothing of it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.plain = True

    def find_class(self, module: str, name: str, /) -> Any:
        """Note a name."""
        self.plain = self.plain and _is_known(module, name)
        return _Inert

    def persistent_load(self, _: Any, /) -> Any:
        """Leave storages out."""
        return None


def _is_known(module: str, name: str) -> bool:
    if module in ("builtins", "__builtin__"):
        return name in _BUILTINS
    if module == "torch" and (
        name.endswith("Storage") or isinstance(getattr(torch, name, None), torch.dtype)
    ):
        return True
    return name in _NAMES.get(module, ())
