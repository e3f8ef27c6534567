"""Patches of Lightning's own faults with checkpoints in object storage, applied once the plugin is used.

Guarantees: each distribution is patched once; results for local disks do not change, nor do those of a Lightning
version that has fixed the fault itself.

What does not belong here: anything that a callback can do for a single Trainer. See decision 0017.
"""

from __future__ import annotations

import functools
import posixpath
import re
import sys
from typing import Any

__all__ = ["keep_protocol", "patch_lightning", "resumable"]

_MODULES = ("pytorch_lightning.callbacks.model_checkpoint", "lightning.pytorch.callbacks.model_checkpoint")
_LOCAL = {"file", "local"}
_MARKER = ".metadata"


def patch_lightning() -> None:
    """Make ``ckpt_path="last"`` find what is in object storage (Lightning issue 18261), and skip incomplete ones."""
    for name in _MODULES:
        checkpoint = getattr(sys.modules.get(name), "ModelCheckpoint", None)
        find = getattr(checkpoint, "_find_last_checkpoints", None)
        if find is not None and not getattr(find, "_async_ckpt", False):
            checkpoint._find_last_checkpoints = _patched(find)  # type: ignore[union-attr]


def _patched(find: Any) -> Any:
    @functools.wraps(find)
    def find_last_checkpoints(self: Any, trainer: Any) -> set[str]:
        _use_own_file_system(self, trainer)
        found = (resumable(path, self._fs) for path in find(self, trainer))
        return {path for path in found if path is not None}

    find_last_checkpoints._async_ckpt = True  # type: ignore[attr-defined]
    return find_last_checkpoints


def _use_own_file_system(checkpoint: Any, trainer: Any) -> None:
    """Choose the file system that ``setup`` will choose; without ``dirpath``, it is the local one until then."""
    resolve = getattr(checkpoint, "_ModelCheckpoint__resolve_ckpt_dir", None)
    if checkpoint.dirpath is None and resolve is not None:
        import fsspec

        checkpoint._fs = fsspec.url_to_fs(str(resolve(trainer)))[0]


def resumable(path: str, file_system: Any) -> str | None:
    """Return *path* as Lightning can resume from it; ``None`` for a sharded checkpoint without its marker.

    Lightning asks for the modification time, which directories in object storage do not have. There, it is the path of
    the marker.
    """
    if not file_system.isdir(path):
        return keep_protocol(path, file_system)
    names = {posixpath.basename(each.rstrip("/")) for each in file_system.ls(path, detail=False)}
    if _MARKER in names:
        is_local = keep_protocol(path, file_system) == path
        return path if is_local else f"{keep_protocol(path, file_system)}/{_MARKER}"
    is_incomplete = all(name.endswith(".distcp") or name.startswith(".async_ckpt") for name in names)
    return None if is_incomplete else keep_protocol(path, file_system)


def keep_protocol(path: str, file_system: Any) -> str:
    """Return the URL of a *path* that *file_system* listed; a local path is returned unchanged."""
    protocol = getattr(file_system, "protocol", "file")
    if _LOCAL.intersection([protocol] if isinstance(protocol, str) else protocol):
        return path
    # normpath has removed a slash, too
    return str(file_system.unstrip_protocol(re.sub(r"^([A-Za-z][\w+.\-]*):/(?!/)", r"\1://", path)))
