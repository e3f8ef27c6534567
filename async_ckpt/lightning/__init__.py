"""The Lightning integration: the plugin, its companion callback, and what attaches the plugin to a Fabric.

Nothing outside of it imports it. None of them imports Lightning before the first instance is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from async_ckpt.lightning.callback import AsyncCheckpointCallback
    from async_ckpt.lightning.fabric import attach
    from async_ckpt.lightning.plugin import AsyncCheckpointIO

__all__ = ["AsyncCheckpointCallback", "AsyncCheckpointIO", "attach"]


def __getattr__(name: str) -> Any:
    """Import what is asked for, and register a class with the Lightning modules that are imported already."""
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
    if name == "attach":
        from async_ckpt.lightning.fabric import attach

        return attach
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
