"""``ModelCheckpoint(save_last=True)`` saves twice in one step: the bulk is held once (S1, B1)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt.events import Accepted, Event, Staged

pytestmark = pytest.mark.integration

MIB = 1 << 20


def _averages(self: Any, checkpoint: dict[str, Any]) -> None:
    """Add what a hook computes anew for each of the two files."""
    checkpoint["averages"] = torch.full((MIB // 4,), float(self.layer.weight.detach().sum()))


def test_last_shares_the_memory_of_the_best(
    tree: Any, tmp_path: Path, recording: Any, faults: Any, names: Callable[[Path], list[str]]
) -> None:
    """With memory for one snapshot, both files of a step are accepted at once, and equal synchronous ones."""
    gate = faults.hold(1)
    events: list[Event] = []

    def observe(event: Event) -> None:
        events.append(event)
        if isinstance(event, Staged) and event.url.endswith("last.ckpt"):
            gate.open()

    io = recording(
        store_factory=faults.make,
        observer=observe,
        memory_limit=MIB + MIB // 2,
        overflow="raise",
        queue_depth=2,
    )
    checkpoints = tree.checkpoints(tmp_path, monitor="loss", save_last=True, filename="best")
    trainer = tree.trainer(tmp_path, callbacks=[checkpoints], plugins=[io])
    trainer.fit(tree.model(on_save_checkpoint=_averages))
    accepted = {Path(event.url).name: event.nbytes for event in events if isinstance(event, Accepted)}
    assert accepted["best.ckpt"] > MIB
    assert accepted["last.ckpt"] == 0
    assert names(tmp_path) == ["best.ckpt", "last.ckpt"]
    for name in names(tmp_path):
        assert (tmp_path / name).read_bytes() == io.expected[str(tmp_path / name)]
    files = [torch.load(tmp_path / name, weights_only=False) for name in names(tmp_path)]
    assert files[0]["callbacks"] != files[1]["callbacks"]
