"""A file that one rank writes for all: what fails on a rank alone is raised later, so no rank misses a barrier."""

from __future__ import annotations

import pytest
import torch

from async_ckpt import AsyncCheckpointIO, UnknownProtocolError

PLACE = "nowhere-at-all://bucket/file.ckpt"


def test_place_that_cannot_be_located() -> None:
    """The first rank fails at the next save or at the end; the others do not even look."""
    first, other = AsyncCheckpointIO(), AsyncCheckpointIO()
    for plugin in (first, other):
        plugin.save_once({"a": torch.ones(1)}, PLACE, is_first=plugin is first, known=None)
    other.teardown()
    with pytest.raises(UnknownProtocolError, match="nowhere-at-all"):
        first.teardown()
