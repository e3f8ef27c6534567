"""A sharded save in the midst of another, as the handler of a signal makes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt import CheckpointService, load_sharded
from tests.integration.sharded.launching import all_well, play, preload
from tests.integration.sharded.signal_scenes import PATIENCE_SECONDS, WALKED
from tests.integration.test_signals import at_line, walk

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

preload("signal_scenes")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("is_first", [False, True])
def test_at_every_line(is_first: bool) -> None:
    """Whatever line the signal comes at, both saves become durable and hold what they were given; or, in the midst of
    a service's first one, the handler's is refused at once, and the other is durable (L1).
    """
    refusals: list[str] = []

    def step(number: int) -> list[str]:
        service = CheckpointService(queue_depth=4)
        handles: dict[float, Any] = {}
        if not is_first:
            save(service, 0.0).wait(PATIENCE_SECONDS)

        def handle() -> None:
            try:
                handles[2.0] = save(service, 2.0)
            except RuntimeError as error:
                refusals.append(str(error))

        with at_line(number, handle, WALKED) as where:
            handles[1.0] = save(service, 1.0)
        for value, each in handles.items():
            each.wait(PATIENCE_SECONDS)
            found = {"weight": torch.zeros(4)}
            load_sharded(found, f"memory://signals/{value}")
            assert torch.equal(found["weight"], torch.full((4,), value))
        service.close()
        return where

    def save(service: CheckpointService, value: float) -> Any:
        return service.save_sharded({"weight": torch.full((4,), value)}, f"memory://signals/{value}")

    assert walk(step) > 100
    assert bool(refusals) == is_first
    assert all("interrupted the service's first sharded save" in refusal for refusal in refusals)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [[0, 1], [0], [1]])
def test_of_several_ranks(tmp_path: Path, ranks: list[int]) -> None:
    """A signal comes to each rank at some other line, or to one only: every save ends within the bound, one that all
    ranks made alike on all of them, and a new service works. Where the order of calls differs, the error names that.
    """
    first, second = all_well(play("signal_scenes.interrupted", 2, tmp_path, trials=6, ranks=ranks))
    for one, other in zip(first, second, strict=True):
        assert max(one["seconds"], other["seconds"]) < 15
        assert one["loop"] == other["loop"]
        if "handler" in one and "handler" in other:
            assert (one["handler"] == "durable") == (other["handler"] == "durable")
        elif "handler" in one or "handler" in other:
            assert "durable" not in (one.get("handler"), other.get("handler"))
    if len(ranks) == 1:
        assert any("handler" in told for told in (first, second)[ranks[0]])
    assert (tmp_path / "afterwards" / ".metadata").exists()
