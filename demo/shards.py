"""One rank of a training of a small transformer, sharded by FSDP2, with asynchronous sharded checkpoints.

``python -m demo.shards FOLDER STEPS [KILLED_AT]``, once for each rank, with RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT as ``torchrun`` sets them. It goes on from the newest complete checkpoint in FOLDER, saves every few steps,
and prints one line of JSON. The last rank kills itself, as the kernel would, in the middle of the save of step
KILLED_AT.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from async_ckpt import CheckpointService, Handle, ShardedSaveError, latest
from async_ckpt.events import Begun, Event

__all__ = ["SAVED_EVERY", "SILENCE_SECONDS"]

SAVED_EVERY = 5
SILENCE_SECONDS = 2.0
_BATCH = 48


class Reader(nn.Module):
    """Reads an image of eight rows of eight pixels as a sentence of eight words."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.place = nn.Parameter(torch.zeros(8, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the scores of the ten digits."""
        return self.head(self.layers(self.embed(images) + self.place).mean(1))  # type: ignore[no-any-return]


class Training:
    """The model, its optimizer, and how far it is. In double precision: runs on other numbers of ranks add up alike."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float64)
        self.model = Reader()
        for layer in self.model.layers.layers:
            fully_shard(layer)
        fully_shard(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        digits = load_digits()
        self._images = torch.tensor(digits.images / 16.0)
        self._labels = torch.tensor(digits.target)
        self.step = 0

    def state(self) -> dict[str, Any]:
        """Return this rank's part of what is to be saved."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "step": self.step}

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from *state*."""
        set_state_dict(
            self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        self.step = state["step"]

    def train_a_step(self) -> float:
        """Take a step with this rank's share of the batch; return the loss of that share."""
        chosen = torch.randint(
            len(self._labels), (_BATCH,), generator=torch.Generator().manual_seed(self.step)
        )
        share = chosen.tensor_split(dist.get_world_size())[dist.get_rank()]
        loss = nn.functional.cross_entropy(self.model(self._images[share]), self._labels[share])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step += 1
        return float(loss.detach())

    def weights(self) -> list[float]:
        """Return a digest of the weights: of each, the sum of its squares."""
        return [float(each.full_tensor().square().sum()) for each in self.model.state_dict().values()]


def main() -> None:
    """Be one rank."""
    folder, steps, killed_at = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    training = Training()
    told: dict[str, Any] = {"from": 0, "stalls": []}
    observer = _dies_in(f"step-{killed_at}") if killed_at and rank == last else None
    service = CheckpointService(
        queue_depth=2, silence_timeout=SILENCE_SECONDS, agreement_timeout=30.0, observer=observer
    )
    found = latest(folder)
    if found is not None:
        state = training.state()
        service.load_sharded(state, found)
        training.resume(state)
        told["from"] = training.step
    if not _train(training, service, folder, steps, told):
        print(json.dumps(told), flush=True)
        os._exit(0)  # the group's collectives would wait for the dead rank
    told["weights"] = training.weights()
    # After the last collective operation: gloo's thread may still let go of its tensors, and aborts a Python that ends.
    service.close()
    print(json.dumps(told), flush=True)
    dist.destroy_process_group()


def _train(
    training: Training, service: CheckpointService, folder: str, steps: int, told: dict[str, Any]
) -> bool:
    """Train, and save; return whether that came to its end."""
    handles: list[Handle] = []
    try:
        while training.step < steps:
            told["loss"] = training.train_a_step()
            if training.step % SAVED_EVERY == 0:
                begun = perf_counter()
                handles.append(service.save_sharded(training.state(), f"{folder}/step-{training.step}"))
                told["stalls"].append(perf_counter() - begun)
    except RuntimeError as error:  # of a collective operation: another rank has gone
        told["training"] = str(error)
    begun = perf_counter()
    try:
        for handle in handles:
            handle.wait()
    except ShardedSaveError as failure:
        told["failed"] = {str(each): why for each, why in failure.failures.items()}
        told["waited"] = perf_counter() - begun
        return False
    return True


def _dies_in(name: str) -> Callable[[Event], None]:
    """Return an observer that kills this process as it begins to write its part of a save."""

    def observe(event: Event) -> None:
        if isinstance(event, Begun) and name in event.url:
            os.kill(os.getpid(), signal.SIGKILL)

    return observe


if __name__ == "__main__":
    main()
