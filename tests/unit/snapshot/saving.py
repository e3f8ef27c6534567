"""What torch.save writes of a state, and what a capture of it does."""

from __future__ import annotations

import collections
import enum
import io
from typing import Any

import torch

from async_ckpt.format import lay_out
from async_ckpt.snapshot import Capture, HostBuffer


def file_of_torch(state: Any) -> bytes:
    """Return the file that ``torch.save`` writes."""
    torch.save(state, file := io.BytesIO())
    return file.getvalue()


def file_of(captured: Capture) -> bytes:
    """Return the file that a capture leads to."""
    snapshot = captured.stage(HostBuffer(captured.nbytes))
    layout = lay_out(snapshot)
    file = b"".join(layout.read(0, layout.nbytes))
    snapshot.close()
    return file


def weights() -> Any:
    """Return a ``state_dict`` with tied tensors, a view and bytes."""
    weight = torch.nn.Parameter(torch.arange(1.0, 2001.0))
    return collections.OrderedDict(
        a=weight, view=weight.data[3:9], b=torch.arange(1, 50), again=weight, c=b"x" * 70_000
    )


class Colour(enum.Enum):
    """A value that is a constant."""

    RED = 1
