"""A small training, and services whose copies are held up, so that they come as late as they may."""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from async_ckpt import CheckpointService
from async_ckpt.snapshot import Snapshot
from tests.support import PATIENCE_SECONDS

__all__ = ["Training", "copies_held", "digest", "digest_of_torch", "left_to_copy"]


class Training:
    """Weights of which most are large enough to be copied lazily, and an optimizer that has stepped.

    Args:
        kind: of the optimizer.
        count: of the large weights.
        numel: of each.
    """

    def __init__(
        self, kind: Any = torch.optim.AdamW, *, count: int = 3, numel: int = 1 << 16, **more: Any
    ) -> None:
        self.params = [torch.nn.Parameter(torch.randn(numel)) for _ in range(count)]
        self.params.append(torch.nn.Parameter(torch.randn(3)))
        self.optimizer = kind(self.params, **more)
        self.steps = 0
        self.step()

    def loss(self) -> torch.Tensor:
        """Go forward and backward."""
        self.optimizer.zero_grad()
        loss = torch.stack([(param * param).sum() for param in self.params]).sum()
        loss.backward()
        return loss.detach()

    def step(self) -> None:
        """Take one step."""
        self.loss()
        self.optimizer.step()
        self.steps += 1

    def state(self) -> dict[str, Any]:
        """Return what is saved."""
        model = {f"p{number}": param.detach() for number, param in enumerate(self.params)}
        return {"model": model, "optimizer": self.optimizer.state_dict(), "steps": self.steps}


def digest_of_torch(state: Any) -> str:
    """Return the digest of what ``torch.save`` writes now."""
    torch.save(state, file := io.BytesIO())
    return digest(file.getvalue())


def digest(file: bytes | Path) -> str:
    """Return the digest of a file."""
    return hashlib.sha256(file if isinstance(file, bytes) else file.read_bytes()).hexdigest()


def left_to_copy(snapshot: Snapshot) -> int:
    """Return how many bytes are left to be copied, if none was yet."""
    shares = [] if snapshot.later is None else snapshot.later._shares
    return sum(item.nbytes for share in shares if share._held is not None for item in share._held[0])


@contextmanager
def copies_held(service: CheckpointService) -> Iterator[threading.Event]:
    """Hold the service's copying threads up, until the event that this yields is set."""
    resources = service._own.resources
    runtime = resources.running()
    go_on = threading.Event()
    begun = [threading.Event() for _ in range(resources.options.max_concurrent_saves + 1)]

    def hold(event: threading.Event) -> None:
        event.set()
        go_on.wait(PATIENCE_SECONDS)

    for event in begun:
        runtime.call_async(resources.copiers.run, hold, event)
    try:
        assert all(event.wait(PATIENCE_SECONDS) for event in begun)
        yield go_on
    finally:
        go_on.set()
