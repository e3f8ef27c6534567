"""The Lightning integration: the plugin and its companion callback. Nothing outside of it imports it.

Neither imports Lightning before the first instance is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from async_ckpt.lightning.callback import AsyncCheckpointCallback
    from async_ckpt.lightning.plugin import AsyncCheckpointIO

__all__ = ["AsyncCheckpointCallback", "AsyncCheckpointIO"]


def __getattr__(name: str) -> Any:
    """Import the class that is asked for, and register it with the Lightning modules that are imported already."""
    if name == "AsyncCheckpointIO":
        from async_ckpt.lightning.plugin import AsyncCheckpointIO
        from async_ckpt.lightning.registration import register_if_imported

        register_if_imported(AsyncCheckpointIO)
        return AsyncCheckpointIO
    if name == "AsyncCheckpointCallback":
        from async_ckpt.lightning.callback import AsyncCheckpointCallback
        from async_ckpt.lightning.registration import inherit_if_imported

        inherit_if_imported(AsyncCheckpointCallback)
        return AsyncCheckpointCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
