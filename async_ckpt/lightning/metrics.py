"""The metrics of a durable save in the trainer's loggers.

What does not belong here: when they are logged (notifications).
"""

from __future__ import annotations

from typing import Any

from async_ckpt.telemetry.meter import SaveProgress

__all__ = ["figures", "log_figures"]


def figures(save: SaveProgress, pending: int) -> dict[str, float]:
    """Return the metrics of *save*, which is durable.

    Args:
        save: the progress of the save.
        pending: how many other saves are pending now.
    """
    values = {
        "stall_seconds": save.stall_seconds,
        "staged_seconds": save.staged_seconds,
        "durable_seconds": save.durable_seconds,
        "pending": float(pending),
        "bytes": float(save.nbytes),
    }
    if save.durable_seconds > 0:
        values["throughput"] = save.nbytes / save.durable_seconds
    return {f"checkpoint/{name}": value for name, value in values.items()}


def log_figures(trainer: Any, values: dict[str, float]) -> None:
    """Log *values* with the loggers only, on the step axis of the training's own metrics."""
    epoch_loop = trainer.fit_loop.epoch_loop
    # With several optimizers, this differs from the global step.
    step = getattr(epoch_loop, "_batches_that_stepped", trainer.global_step)
    for logger in trainer.loggers:
        logger.log_metrics(metrics=dict(values), step=step)  # by name, as Lightning calls it
