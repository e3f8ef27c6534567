"""Makes fsspec see what a save or a removal has changed: Lightning looks through file systems that remember listings.

Guarantees: when a save or a removal has ended, no file system that fsspec keeps (one a set of options) remembers a
listing from before it, of its location or the directories above; other listings stay. Nothing is asked of storage.

What does not belong here: file systems of the user's own, made with ``skip_instance_cache``; nobody else knows them.
"""

from __future__ import annotations

import logging
from typing import Any

from async_ckpt.events import Durable, Event, Failed, Removed
from async_ckpt.stores.redaction import redacted_text, redacted_url

__all__ = ["forget_changed", "forget_listings"]

logger = logging.getLogger(__name__)


def forget_changed(event: Event, url: str) -> None:
    """Forget what *event* has changed, which is at *url*; whoever waits for its request has not been told yet."""
    if isinstance(event, (Durable, Removed, Failed)):
        forget_listings(url)


def forget_listings(url: str) -> None:
    """Drop the remembered listings of the directories above *url*; a local path has none.

    Args:
        url: a file's URL. One that fsspec does not know, as a base CheckpointIO may have, is passed over.
    """
    protocol, separator, _ = url.partition("://")
    if not separator:
        return
    try:
        for file_system in _kept_by_fsspec(protocol):
            below, path = None, file_system._strip_protocol(url)
            while path != below:  # a file may be remembered as a listing of itself, so from there on upwards
                file_system.invalidate_cache(path)
                below, path = path, file_system._parent(path)
    except Exception as error:  # an unknown protocol, or a listing that another thread dropped first
        logger.debug("%s", redacted_text(f"listings above {redacted_url(url)} may be old: {error}"))


def _kept_by_fsspec(protocol: str) -> list[Any]:
    """Return the instances that ``fsspec.filesystem`` would return again; fsspec has no public way to ask."""
    import fsspec

    return list(getattr(fsspec.get_filesystem_class(protocol), "_cache", {}).values())
