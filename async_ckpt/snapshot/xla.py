"""Tensors of torch_xla: they have no memory that can be looked into, so they are brought to the host by value.

Guarantees: what they are yet to compute is computed in one execution for all of them, and is left as it was for
the program's own next step; they come in few transfers, and no more than a batch (256 MiB, or one tensor) of host
memory is used beside the snapshot's. Two tensors of one value, as tied weights are in a ``state_dict``, stay tied;
views do not, as with ``torch_xla.core.xla_model.save``, whose files ours equal: the tensors lie on the CPU.

What does not belong here: collective operations. All ranks must have come to the end of their step, which is what
Lightning's strategies see to. torch_xla is not imported before a state holds a tensor of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch

from async_ckpt.snapshot.parallel_copy import copy_together

__all__ = ["Remote", "bring", "value_id"]

Remote: TypeAlias = tuple[int, torch.Tensor]
"""Where in the buffer a tensor's bytes go, and the tensor."""

_BATCH_BYTES = 256 << 20


def value_id(tensor: torch.Tensor) -> int:
    """Return the number of the value that *tensor* has now; no other value of the process ever has it."""
    return int(_torch_xla()._xla_get_tensor_id(tensor))


def bring(
    remotes: Sequence[Remote], buffer: torch.Tensor, *, fresh: bool, batch_bytes: int = _BATCH_BYTES
) -> None:
    """Compute the tensors and copy them to their places.

    Args:
        remotes: the tensors, each with the place of its first byte.
        buffer: all of the snapshot's memory.
        fresh: nothing has been written to it yet.
        batch_bytes: what may come at a time.

    Raises:
        RuntimeError: a tensor came back as something else than it said it was.
    """
    # Not with sync_xla_data: what the program has pending beside these tensors would lose what it is computed from.
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
