"""Names of torch's that have moved: ``torch.distributed.tensor`` is new in 2.5, its ``fully_shard`` in 2.6."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

__all__ = [
    "ALONE",
    "DTensor",
    "Placement",
    "Replicate",
    "Shard",
    "distribute_tensor",
    "fully_shard",
    "local_part",
]


def _first(name: str, *modules: str) -> Any:
    for module in modules:
        try:
            return getattr(import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise ImportError(f"no {name} in any of {modules}")


_TENSOR = "torch.distributed.tensor", "torch.distributed._tensor"
DTensor = _first("DTensor", *_TENSOR)
Replicate = _first("Replicate", *_TENSOR)
Shard = _first("Shard", *_TENSOR)
distribute_tensor = _first("distribute_tensor", *_TENSOR)
Placement = _first("Placement", *_TENSOR, "torch.distributed._tensor.placement_types")
fully_shard = _first("fully_shard", "torch.distributed.fsdp", "torch.distributed._composable.fsdp")
local_part = _first("compute_local_shape_and_global_offset", *(f"{module}._utils" for module in _TENSOR))
"""Of shape, mesh and placements: what this rank has, and where it begins."""
IS_TORCH_24 = torch.__version__.startswith("2.4.")
needs_fsdp2 = pytest.mark.skipif(IS_TORCH_24, reason="FSDP2 of torch 2.4 needs CUDA")
ALONE = {"no_dist": True} if "no_dist" in inspect.signature(dcp.load).parameters else {}
"""For a load by this process alone, where torch has to be told: from 2.9 on."""
