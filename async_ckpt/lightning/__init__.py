"""What Lightning users hold: the plugin, and the callback beside it; nothing in here is imported by the rest.

Neither imports Lightning before it is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from async_ckpt.lightning.callback import AsyncCheckpointCallback
    from async_ckpt.lightning.plugin import AsyncCheckpointIO

__all__ = ["AsyncCheckpointCallback", "AsyncCheckpointIO"]


def __getattr__(name: str) -> Any:
    """Import what is asked for, and make it known to what of Lightning is there by then."""
    if name == "AsyncCheckpointIO":
        from async_ckpt.lightning.plugin import AsyncCheckpointIO
        from async_ckpt.lightning.registration import introduce_plugin

        introduce_plugin(AsyncCheckpointIO)
        return AsyncCheckpointIO
    if name == "AsyncCheckpointCallback":
        from async_ckpt.lightning.callback import AsyncCheckpointCallback
        from async_ckpt.lightning.registration import introduce_callback

        introduce_callback(AsyncCheckpointCallback)
        return AsyncCheckpointCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
