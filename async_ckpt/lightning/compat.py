"""What Lightning gets wrong about checkpoints in object storage, put right where our plugin is used.

Guarantees: done once for each distribution; results that concern a local disk stay as they are, and so do those of a
Lightning that has been repaired itself.

What does not belong here: anything that can be done for one Trainer, from a callback. See decision 0017.
"""

from __future__ import annotations

import functools
import re
import sys
from typing import Any

__all__ = ["keep_protocol", "repair"]

_MODULES = ("pytorch_lightning.callbacks.model_checkpoint", "lightning.pytorch.callbacks.model_checkpoint")
_LOCAL = {"file", "local"}


def repair() -> None:
    """Have ``ckpt_path="last"`` find files in object storage (Lightning issue 18261)."""
    for name in _MODULES:
        checkpoint = getattr(sys.modules.get(name), "ModelCheckpoint", None)
        find = getattr(checkpoint, "_find_last_checkpoints", None)
        if find is not None and not getattr(find, "_async_ckpt", False):
            checkpoint._find_last_checkpoints = _repaired(find)  # type: ignore[union-attr]


def _repaired(find: Any) -> Any:
    @functools.wraps(find)
    def find_last_checkpoints(self: Any, trainer: Any) -> set[str]:
        _look_where_it_saves(self, trainer)
        return {keep_protocol(path, self._fs) for path in find(self, trainer)}

    find_last_checkpoints._async_ckpt = True  # type: ignore[attr-defined]
    return find_last_checkpoints


def _look_where_it_saves(checkpoint: Any, trainer: Any) -> None:
    """Choose the file system as ``setup`` will; before that, one without ``dirpath`` has the local one."""
    resolve = getattr(checkpoint, "_ModelCheckpoint__resolve_ckpt_dir", None)
    if checkpoint.dirpath is None and resolve is not None:
        import fsspec

        checkpoint._fs = fsspec.url_to_fs(str(resolve(trainer)))[0]


def keep_protocol(path: str, file_system: Any) -> str:
    """Return what *file_system* has listed as a URL that leads to it; a local path as it is."""
    protocol = getattr(file_system, "protocol", "file")
    if _LOCAL.intersection([protocol] if isinstance(protocol, str) else protocol):
        return path
    # normpath has been over it, too
    return str(file_system.unstrip_protocol(re.sub(r"^([A-Za-z][\w+.\-]*):/(?!/)", r"\1://", path)))
