"""What a Trainer asks of every package that is installed.

Imported by each Trainer, with a plugin of ours or without: it costs nothing before there is one.
"""

from __future__ import annotations

from typing import Any

from async_ckpt.lightning.registration import is_registered

__all__ = ["found_callbacks"]


def found_callbacks() -> list[Any]:
    """Return the companion, if the program has ever made a plugin."""
    if not is_registered():
        return []
    from async_ckpt.lightning.callback import FoundCallback

    return [FoundCallback()]
