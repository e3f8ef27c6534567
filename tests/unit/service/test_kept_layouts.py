"""The layout of a service's last file serves its next ones (B1)."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from async_ckpt import CheckpointService


def _state(step: int) -> dict[str, Any]:
    return {"step": step, **{f"layer.{index}": torch.full((9,), float(step)) for index in range(50)}}


def _file_of_torch(state: Any) -> bytes:
    torch.save(state, file := io.BytesIO())
    return file.getvalue()


def test_a_layout_is_kept_until_the_service_is_closed(tmp_path: Path) -> None:
    """Saves to several places, pending at once, are laid out by one layout; it is counted, and dropped at the end."""
    service = CheckpointService(durability="process", queue_depth=4, max_concurrent_saves=2)
    pool = service._resources.account.pool
    service.save(_state(0), tmp_path / "0.ckpt").wait()
    kept: Any = pool.kept
    assert kept is not None
    for step in range(1, 7):
        service.save(_state(step), tmp_path / f"{step}.ckpt")
    service.wait()
    assert pool.kept is kept
    assert pool._budget.held_bytes == pool.idle_bytes >= kept.nbytes
    for step in range(7):
        assert (tmp_path / f"{step}.ckpt").read_bytes() == _file_of_torch(_state(step))
    service.save(_state(300), tmp_path / "7.ckpt").wait()
    assert pool.kept is not kept
    service.close()
    assert pool.kept is None
    assert pool._budget.held_bytes == 0
    assert (tmp_path / "7.ckpt").read_bytes() == _file_of_torch(_state(300))
