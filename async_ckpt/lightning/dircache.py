"""Invalidates fsspec's directory cache after a save or a removal: Lightning looks for files through cached listings.

Guarantees: when a save or a removal has ended, no file system instance that fsspec caches has an older listing of its
location or of the directories above; other listings stay. No request is made.

What does not belong here: file systems that the user made with ``skip_instance_cache``; only the user has them.
"""

from __future__ import annotations

import logging
from typing import Any

from async_ckpt.events import Durable, Event, Failed, Removed
from async_ckpt.stores.redaction import redacted_text, redacted_url

__all__ = ["forget_changed", "forget_listings"]

logger = logging.getLogger(__name__)


def forget_changed(event: Event, url: str) -> None:
    """Invalidate the listings that *event*, at *url*, has outdated; waiters of its request are notified later."""
    if isinstance(event, (Durable, Removed, Failed)):
        forget_listings(url)


def forget_listings(url: str) -> None:
    """Invalidate the cached listings of the directories above *url*; a local path has none.

    Args:
        url: a file's URL. One that fsspec does not know, as a base CheckpointIO may have, is ignored.
    """
    protocol, separator, _ = url.partition("://")
    if not separator:
        return
    try:
        for file_system in _kept_by_fsspec(protocol):
            below, path = None, file_system._strip_protocol(url)
            while (
                path != below
            ):  # from the file itself upwards, because fsspec may have cached a listing of the file
                file_system.invalidate_cache(path)
                below, path = path, file_system._parent(path)
    except Exception as error:  # an unknown protocol, or another thread has just dropped the listing
        logger.debug(
            "%s",
            redacted_text(
                f"cached listings of the directories above {redacted_url(url)} may be outdated: {error}"
            ),
        )


def _kept_by_fsspec(protocol: str) -> list[Any]:
    """Return the instances in fsspec's cache; fsspec has no public way to list them."""
    import fsspec

    return list(getattr(fsspec.get_filesystem_class(protocol), "_cache", {}).values())
