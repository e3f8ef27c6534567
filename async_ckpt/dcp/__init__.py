"""In place of ``torch.distributed.checkpoint``: ``import async_ckpt.dcp as dcp``.

Guarantees: the functions take all of torch's arguments. One that cannot be honoured raises an error that says what to
do instead; none is silently ignored. A save promises what `CheckpointService.save_sharded` promises: no collective
operation, one commit, one verdict.

``StorageWriter``, ``StorageReader`` and ``Stager`` are for programs that keep calling torch's own functions. torch's
planners, metadata and errors can be imported from here, too, so that one import is enough.

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
