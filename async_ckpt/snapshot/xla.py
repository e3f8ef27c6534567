"""Tensors of torch_xla: their memory is not accessible, so their values are fetched to the host.

Guarantees: pending computations of all these tensors run in one execution, and the program's own graph is left as it
was; the values come in few transfers, with at most one batch (256 MiB, or one tensor) of host memory beside the
snapshot's. Two tensors of one value, such as tied weights in a ``state_dict``, stay tied; views do not. Our files equal
those of ``torch_xla.core.xla_model.save``: the tensors are on the CPU.

What does not belong here: collective operations. All ranks must be at the end of their step; Lightning's strategies
ensure that. torch_xla is not imported before a state contains one of its tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch

from async_ckpt.snapshot.parallel_copy import copy_together

__all__ = ["Remote", "fetch_values", "value_id"]

Remote: TypeAlias = tuple[int, torch.Tensor]
"""The offset of a tensor's bytes in the buffer, and the tensor."""

_BATCH_BYTES = 256 << 20


def value_id(tensor: torch.Tensor) -> int:
    """Return the id of the present value of *tensor*; no other value of the process ever has it."""
    return int(_torch_xla()._xla_get_tensor_id(tensor))


def fetch_values(
    remotes: Sequence[Remote], buffer: torch.Tensor, *, fresh: bool, batch_bytes: int = _BATCH_BYTES
) -> None:
    """Compute the tensors, and copy their values into the buffer.

    Args:
        remotes: the tensors, each with the offset of its first byte.
        buffer: the snapshot's memory.
        fresh: whether nothing has been written to it yet.
        batch_bytes: the size of one transfer.

    Raises:
        RuntimeError: a value does not match its tensor's dtype or shape.
    """
    # Not with sync_xla_data: other pending computations of the program would lose their inputs.
    _torch_xla()._xla_sync_multi(
        [tensor for _, tensor in remotes], devices=[], wait=True, sync_xla_data=False
    )
    for batch in _batches(remotes, batch_bytes):
        _bring_batch(batch, buffer, fresh)


def _bring_batch(batch: Sequence[Remote], buffer: torch.Tensor, fresh: bool) -> None:
    values = _torch_xla()._xla_get_cpu_tensors([tensor for _, tensor in batch])
    sources = [_bytes_of(value, tensor) for value, (_, tensor) in zip(values, batch, strict=True)]
    targets = [buffer[start : start + len(source)] for source, (start, _) in zip(sources, batch, strict=True)]
    copy_together(targets, sources, fresh=fresh)


def _batches(remotes: Sequence[Remote], batch_bytes: int) -> Iterator[list[Remote]]:
    batch: list[Remote] = []
    nbytes = 0
    for start, tensor in remotes:
        if batch and nbytes + tensor.nbytes > batch_bytes:
            yield batch
            batch, nbytes = [], 0
        batch.append((start, tensor))
        nbytes += tensor.nbytes
    yield batch


def _bytes_of(value: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    if value.dtype is not tensor.dtype or value.shape != tensor.shape:
        raise RuntimeError(
            f"torch_xla gave a {value.dtype} tensor of {tuple(value.shape)} "
            f"for one of {tensor.dtype} and {tuple(tensor.shape)}"
        )
    return value.detach().contiguous().reshape(-1).view(torch.uint8)


def _torch_xla() -> Any:
    import torch_xla

    return torch_xla._XLAC
