"""Shows pending saves in the training's progress bar: ``ckpt: 2 (63%)``.

Guarantees: nothing is shown while nothing is pending, nor after an epoch's last batch, because that bar may stay on
screen; logged metrics do not change.

What does not belong here: the bar that a flush shows (flushing).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from async_ckpt.lightning.overrides import Overrides
from async_ckpt.telemetry.meter import Meter, SaveProgress

__all__ = ["pending_text", "show_pending"]


def pending_text(pending: Iterable[SaveProgress]) -> str:
    """Return how many saves are pending, and their progress, which is unknown if a base writes them."""
    saves = list(pending)
    if not saves:
        return ""
    written = sum(save.written_bytes for save in saves)
    expected = sum(save.nbytes for save in saves)
    # Until a save is laid out, its length is slightly underestimated.
    return (
        f"{len(saves)} ({min(100 * written // expected, 99)}%)" if written and expected else f"{len(saves)}"
    )


def show_pending(bar: Any, meter: Meter, overrides: Overrides) -> None:
    """Make Lightning's progress bar *bar* show pending saves, too."""
    get_metrics = bar.get_metrics

    def get_metrics_and_pending(trainer: Any, pl_module: Any) -> Any:
        metrics = get_metrics(trainer, pl_module)
        is_over = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        text = "" if is_over else pending_text(meter.pending)
        return {**metrics, "ckpt": text} if text else metrics

    overrides.replace(bar, "get_metrics", get_metrics_and_pending)
