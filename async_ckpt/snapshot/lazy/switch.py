"""Whether a service copies lazily: until its program is seen to change weights in another way than by a step."""

from __future__ import annotations

import logging
from contextlib import suppress

__all__ = ["Switch"]

logger = logging.getLogger("async_ckpt.snapshot")


class Switch:
    """On or off; once off, it stays so. On any thread.

    Attributes:
        is_on: whether it is on.
    """

    __slots__ = ("is_on",)

    def __init__(self, *, is_on: bool) -> None:
        self.is_on = is_on

    def turn_off(self, reason: str) -> None:
        """Turn it off, and say why, once."""
        if self.is_on:
            self.is_on = False
            with suppress(Exception):  # of the program's own log handlers
                logger.warning(
                    "snapshot='lazy' is off from now on, and each save copies in the call: %s", reason
                )
