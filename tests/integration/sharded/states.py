"""States that several ranks hold together: of each kind that can be saved, and as training makes them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tests.integration.sharded.torch_names import (
    DTensor,
    Placement,
    Replicate,
    Shard,
    fully_shard,
    local_part,
)


def every_kind(seed: float, *, with_planes: bool = True) -> dict[str, Any]:
    """Return a state with every kind of value; *seed* changes each of them and no size."""
    size = dist.get_world_size()
    line = init_device_mesh("cpu", (size,))
    plane = init_device_mesh("cpu", (2, size // 2)) if with_planes and size in (2, 4) else None

    def numbers(*shape: int) -> torch.Tensor:
        return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape) * 0.5 + seed

    tied = numbers(6, 4)
    state: dict[str, Any] = {
        "rows": spread(numbers(10, 6), line, [Shard(0)]),
        "uneven": spread(numbers(5, 3), line, [Shard(0)]),
        "fewer": spread(numbers(2, 3), line, [Shard(0)]),
        "columns": spread(numbers(5, 9), line, [Shard(1)]),
        "half": spread(numbers(16, 3).bfloat16(), line, [Shard(0)]),
        "everywhere": spread(numbers(4, 4), line, [Replicate()]),
        "large": spread(numbers(1000, 300), line, [Shard(0)]),
        "nothing": spread(numbers(0, 3), line, [Shard(0)]),
        "plain": numbers(7, 3),
        "turned": numbers(3, 8).t(),
        "tied": tied,
        "also tied": tied,
        "number": torch.tensor(seed),
        "int": torch.arange(5) + int(seed),
        "nested": {
            "step": int(seed),
            "rate": seed / 3,
            "list": [numbers(3), {"deep": numbers(2)}],
            "name": f"run {seed}",
        },
        "group": {"betas": (0.9, seed), "params": [1, 2, 3], "none": None, "flag": True},
    }
    if plane is not None:
        state["plane"] = spread(numbers(8, 6), plane, [Shard(0), Shard(1)])
        state["replicated rows"] = spread(numbers(9, 3), plane, [Replicate(), Shard(0)])
        state["rows twice"] = spread(numbers(12, 2), plane, [Shard(0), Shard(0)])
    return state


def spread(tensor: torch.Tensor, mesh: DeviceMesh, placements: list[Placement]) -> DTensor:
    """Return this rank's part of *tensor*, which each rank has: ``distribute_tensor`` without a collective."""
    sizes, offsets = local_part(tensor.shape, mesh, placements)
    local = tensor[
        tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))
    ].contiguous()
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def whole(state: Any) -> Any:
    """Return *state* with every distributed tensor put together: a collective call."""
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(map(whole, state))
    if hasattr(state, "full_tensor"):
        return state.full_tensor()
    return state


def differences(one: Any, other: Any, at: str = "") -> list[str]:
    """Return the ways to what is not the same, bit for bit."""
    if isinstance(one, dict):
        if not isinstance(other, dict) or list(one) != list(other):
            return [at]
        return [found for key in one for found in differences(one[key], other[key], f"{at}.{key}")]
    if isinstance(one, (list, tuple)):
        if type(one) is not type(other) or len(one) != len(other):
            return [at]
        return [
            found
            for number, (mine, theirs) in enumerate(zip(one, other, strict=True))
            for found in differences(mine, theirs, f"{at}.{number}")
        ]
    if isinstance(one, torch.Tensor):
        same = isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
        return [] if same else [at]
    return [] if type(one) is type(other) and one == other else [at]


class Training:
    """A small model sharded by FSDP2, with AdamW, that trains on the CPU."""

    def __init__(self, mesh: DeviceMesh | None = None, *, width: int = 33) -> None:
        torch.manual_seed(3)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(8, width), torch.nn.GELU(), torch.nn.LayerNorm(width), torch.nn.Linear(width, 5)
        )
        mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in (self.model[0], self.model[3]):
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.steps = 0

    def step(self) -> None:
        """Take one step, the same on any number of ranks."""
        torch.manual_seed(1000 + self.steps)
        inputs = torch.randn(4, 8)
        self.optimizer.zero_grad()
        self.model(inputs).square().mean().backward()
        self.optimizer.step()
        self.steps += 1

    def state(self) -> dict[str, Any]:
        """Return what is to be saved, as DCP's own helpers give it."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "steps": self.steps}
