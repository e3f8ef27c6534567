"""How ``torch.load`` is to read what is pickled: the caller's own arguments for it, and what torch makes of them.

Guarantees: whether they go together, torch itself decides, in its own words.

What does not belong here: where tensors go (`reader`), what the file is.
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
    """Arguments of ``torch.load``.

    Attributes:
        weights_only: whether nothing is made but tensors and what is known to be safe; ``None`` leaves it to torch.
        pickle_module: what unpickles in place of Python's own.
        arguments: for its unpickler, such as ``encoding``.
    """

    weights_only: bool | None = True
    pickle_module: Any = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_usual(self) -> bool:
        """Whether it is known what will be made of a pickle."""
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
        """Raise what torch.load does where the arguments do not go together, for a file that it does not unpickle."""
        self.load(io.BytesIO(_nothing()), "cpu")

    def refuse_tar(self) -> None:
        """Raise what torch.load does of a file of torch 0.1 that it may not read; no more of such a file is read."""
        with tempfile.TemporaryFile() as empty:
            empty.write(bytes(2 * _TAR_BLOCK_BYTES))
            empty.seek(0)
            try:
                self.load(empty, "cpu")
            except KeyError:  # it has looked into it
                return


@cache
def _nothing() -> bytes:
    file = io.BytesIO()
    torch.save(None, file)
    return file.getvalue()
