"""The caller's arguments for unpickling by ``torch.load``.

Guarantees: torch itself checks their combination, with its own messages.

What does not belong here: mapping tensors to devices (`reader`), the file.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

__all__ = ["Unpickling"]

_TAR_BLOCK_BYTES = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Unpickling:
    """Arguments of ``torch.load`` for unpickling.

    Attributes:
        weights_only: whether to allow only tensors and types that are known to be safe; ``None`` leaves it to torch.
        pickle_module: replaces Python's pickle module.
        arguments: further arguments for its unpickler, such as ``encoding``.
    """

    weights_only: bool | None = True
    pickle_module: Any = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_usual(self) -> bool:
        """Whether Python's own unpickler is used, with default arguments."""
        return self.pickle_module is None and not self.arguments

    def load(self, file: Any, map_location: Any) -> Any:
        """Call torch.load."""
        return torch.load(
            file,
            map_location=map_location,
            pickle_module=self.pickle_module,
            weights_only=self.weights_only,
            mmap=False,
            **self.arguments,
        )

    def check(self) -> None:
        """Raise torch.load's error for invalid combinations, for a file that is not unpickled."""
        self.load(io.BytesIO(_nothing()), "cpu")

    def refuse_tar(self) -> None:
        """Raise torch.load's error for a tar file of torch 0.1 that it may not read, without reading more of it."""
        with tempfile.TemporaryFile() as empty:
            empty.write(bytes(2 * _TAR_BLOCK_BYTES))
            empty.seek(0)
            try:
                self.load(empty, "cpu")
            except KeyError:  # torch.load has read its first bytes
                return


@cache
def _nothing() -> bytes:
    file = io.BytesIO()
    torch.save(None, file)
    return file.getvalue()
