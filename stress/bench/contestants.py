"""Who is measured: ways to get a state safe, and then durable, and the floors beneath them.

Guarantees: all write to the same directory, each save to a name of its own; nobody keeps a file open.
What does not belong here: clocks.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch

__all__ = ["CONTESTANTS", "Contestant", "State", "sync_tree"]

State: TypeAlias = "dict[str, torch.Tensor]"

_WRITERS = 4


class Contestant:
    """One way to save; the base does everything before it returns, in `save`.

    Attributes:
        is_background: something is left to do after `save`.
        writes: a file comes of it.
        syncs: `wait` returns only when the file would survive the loss of power.
    """

    is_background = False
    writes = True
    syncs = True

    def save(self, state: Any, path: Any) -> None:
        """Return once *state* may be changed; *path* is local, or a URL where a contestant knows them."""
        raise NotImplementedError

    def wait(self) -> None:
        """Return once the save is as durable as this contestant makes it."""

    def done(self) -> bool:
        """Return whether `wait` would return at once."""
        return True

    def step_guard(self) -> AbstractContextManager[Any]:
        """Return what a training must hold while its optimizer changes the weights."""
        return nullcontext()

    def close(self) -> None:
        """Free everything."""


class Memcpy(Contestant):
    """The floor of a stall: one thread copies every byte once, into memory that it keeps."""

    writes = False

    def __init__(self) -> None:
        self._kept: State | None = None

    def save(self, state: State, path: Path) -> None:
        if self._kept is None:
            self._kept = {name: torch.empty_like(tensor) for name, tensor in state.items()}
        for name, tensor in state.items():
            ctypes.memmove(self._kept[name].data_ptr(), tensor.data_ptr(), tensor.nbytes)


class TorchCopy(Memcpy):
    """The same by torch, with all its threads."""

    def save(self, state: State, path: Path) -> None:
        if self._kept is None:
            self._kept = {name: torch.empty_like(tensor) for name, tensor in state.items()}
        for name, tensor in state.items():
            self._kept[name].copy_(tensor)


class RawWrite(Contestant):
    """The floor of durability: the bytes alone, one after the other, and fsync."""

    def save(self, state: State, path: Path) -> None:
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        try:
            for tensor in state.values():
                _write_all(fd, tensor)
            os.fsync(fd)
        finally:
            os.close(fd)


class RawWriteParallel(Contestant):
    """The same by four threads, each writing where its bytes belong."""

    def save(self, state: State, path: Path) -> None:
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        try:
            starts = _starts([tensor.nbytes for tensor in state.values()])
            with ThreadPoolExecutor(_WRITERS) as pool:
                list(pool.map(partial(_write_all, fd), state.values(), starts))
            os.fsync(fd)
        finally:
            os.close(fd)


class TorchSave(Contestant):
    """``torch.save`` and fsync, on the training thread."""

    def save(self, state: State, path: Path) -> None:
        torch.save(state, path)
        sync_tree(path)


class AsyncCkpt(Contestant):
    """Ours: ``CheckpointService.save``, every option at its default unless it is given."""

    is_background = True

    def __init__(self, **options: Any) -> None:
        from async_ckpt import CheckpointService

        self._service = CheckpointService(**options)

    def save(self, state: State, path: Any) -> None:
        self._handle = self._service.save(state, path)

    def wait(self) -> None:
        self._handle.wait()

    def done(self) -> bool:
        return self._handle.done()

    def close(self) -> None:
        self._service.close()


class AsyncCkptLazy(AsyncCkpt):
    """Ours, which copies after the call what only the optimizer changes."""

    def __init__(self) -> None:
        super().__init__(snapshot="lazy")


class Lightning(Contestant):
    """Lightning's own AsyncCheckpointIO around its TorchCheckpointIO; it leaves out fsync."""

    is_background = True
    syncs = False

    def __init__(self) -> None:
        from pytorch_lightning.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

        self._plugin = AsyncCheckpointIO(TorchCheckpointIO())

    def save(self, state: State, path: Any) -> None:
        self._plugin.save_checkpoint(state, path)
        worker = self._plugin._executor
        assert worker is not None
        self._written: Future[None] = worker.submit(
            lambda: None
        )  # it has one thread, so the save comes first

    def wait(self) -> None:
        self._written.result()

    def done(self) -> bool:
        return self._written.done()

    def close(self) -> None:
        self._plugin.teardown()


class DcpAsync(Contestant):
    """``torch.distributed.checkpoint.async_save`` as it comes: a directory, synced by its writer."""

    is_background = True
    _stager: Any = None

    def save(self, state: State, path: Path) -> None:
        from torch.distributed.checkpoint.state_dict_saver import async_save

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that there is one process only
            self._future: Any = async_save(state, checkpoint_id=path, no_dist=True, async_stager=self._stager)

    def wait(self) -> None:
        self._future.result()

    def done(self) -> bool:
        return bool(self._future.done())


class DcpKept(DcpAsync):
    """The same with a stager that is kept from save to save, and with it the memory of the copy."""

    def __init__(self) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        options = StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=False,
        )
        self._stager = DefaultStager(options)

    def close(self) -> None:
        self._stager.close()


class DcpProcess(DcpKept):
    """The same, written by a process of its own, which needs a process group."""

    def __init__(self) -> None:
        import torch.distributed as dist

        super().__init__()
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def save(self, state: State, path: Path) -> None:
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save

        self._future = async_save(
            state,
            checkpoint_id=path,
            async_stager=self._stager,
            async_checkpointer_type=AsyncCheckpointerType.PROCESS,
        )


class TorchCheckpointing(Contestant):
    """The package ``torch_checkpointing``: it copies while training goes on, guards the step, and leaves out fsync.

    Its direct I/O, the default, fails on ext4; what it wants for CPUs is what its page on trouble says.
    """

    is_background = True
    syncs = False

    def __init__(self) -> None:
        from torch_checkpointing import AsyncCheckpointSaverConfig, CheckpointManager
        from torch_checkpointing.staging import CheckpointStagerConfig
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        staging = CheckpointStagerConfig(use_pinned_memory=False, use_non_blocking_copy=False)
        self._manager = CheckpointManager(
            CheckpointManager.Config(
                save=AsyncCheckpointSaverConfig(staging_config=staging),
                storage_config=LocalFileSystemStorageConfig(use_direct_io=False),
            )
        )

    def save(self, state: State, path: Path) -> None:
        self._future: Any = self._manager.save(str(path), {"state": state})

    def wait(self) -> None:
        self._future.result()

    def done(self) -> bool:
        return bool(self._future.done())

    def step_guard(self) -> AbstractContextManager[Any]:
        return self._manager.lock()

    def close(self) -> None:
        self._manager.close()


CONTESTANTS: dict[str, type[Contestant]] = {
    "memcpy": Memcpy,
    "torch copy": TorchCopy,
    "raw write": RawWrite,
    "raw write ×4": RawWriteParallel,
    "torch.save": TorchSave,
    "Lightning": Lightning,
    "dcp.async_save": DcpAsync,
    "dcp.async_save, kept stager": DcpKept,
    "dcp.async_save, process": DcpProcess,
    "torch_checkpointing": TorchCheckpointing,
    "async_ckpt": AsyncCkpt,
    "async_ckpt, lazy": AsyncCkptLazy,
}


def sync_tree(path: Path) -> None:
    """Make a file, or every file of a directory, survive the loss of power."""
    for file in (path, *path.rglob("*")) if path.is_dir() else (path,):
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def remove_tree(path: Path) -> None:
    """Delete what a save left, if it left anything."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _starts(sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[:index]) for index in range(len(sizes))]


def _write_all(fd: int, tensor: torch.Tensor, offset: int | None = None) -> None:
    rest = memoryview(tensor.view(torch.uint8).numpy().data)
    while rest:
        written = os.write(fd, rest) if offset is None else os.pwrite(fd, rest, offset)
        rest = rest[written:]
        offset = None if offset is None else offset + written
