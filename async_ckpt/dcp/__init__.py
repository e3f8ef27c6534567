"""In place of ``torch.distributed.checkpoint``: ``import async_ckpt.dcp as dcp``.

Guarantees: the same arguments as torch's, and no fewer; what cannot be honoured is refused by a sentence that says what
to do instead, never passed over. What a save promises is what `CheckpointService.save_sharded` promises: no collective
operation, one commit, one verdict.

``StorageWriter``, ``StorageReader`` and ``Stager`` are for programs that go on calling torch's own functions. Beside
these, there are torch's own planners, metadata and errors, so that one import does.

What does not belong here: how a checkpoint is made (`sharded`).
"""

from __future__ import annotations

from torch.distributed.checkpoint import state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
)

from async_ckpt.dcp.functions import async_save, close, configure, load, save
from async_ckpt.dcp.future import SaveFuture
from async_ckpt.dcp.stager import Stager
from async_ckpt.dcp.storage_reader import StorageReader
from async_ckpt.dcp.storage_writer import StorageWriter

__all__ = [
    "BytesStorageMetadata",
    "CheckpointException",
    "ChunkStorageMetadata",
    "DefaultLoadPlanner",
    "DefaultSavePlanner",
    "FileSystemReader",
    "FileSystemWriter",
    "LoadPlan",
    "LoadPlanner",
    "Metadata",
    "ReadItem",
    "SaveFuture",
    "SavePlan",
    "SavePlanner",
    "Stager",
    "StorageReader",
    "StorageWriter",
    "TensorStorageMetadata",
    "WriteItem",
    "async_save",
    "close",
    "configure",
    "load",
    "save",
    "state_dict",
]
