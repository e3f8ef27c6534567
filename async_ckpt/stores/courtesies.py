"""What is asked of a server beyond what a save needs, and is gone without where the server will have none of it.

Guarantees: what a server has refused it is not asked for again, in that bucket, for the life of the service; the log
says so, once. The user may switch each off, or insist. Nothing here is what a save promises, but for the checksums.

What does not belong here: what a refusal looks like; each store knows its servers.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

from async_ckpt.errors import OptionError

__all__ = ["CHECKSUMS", "CONDITIONS", "LISTINGS", "OPTION", "Courtesies", "check_choices"]

_log = logging.getLogger("async_ckpt.stores")

OPTION = "async_ckpt"
"""Under which name ``storage_options`` has the switches, so that no file system of that name's is in the way."""

CHECKSUMS = "checksums"
LISTINGS = "listings"
CONDITIONS = "conditional_reads"
_NAMES = (CHECKSUMS, LISTINGS, CONDITIONS)


def check_choices(options: Mapping[str, Any]) -> None:
    """Refuse switches that nobody knows.

    Raises:
        OptionError: there is such a one in *options*, the storage options.
    """
    choices = options.get(OPTION, {})
    known = isinstance(choices, Mapping) and all(
        name in _NAMES and (value is None or isinstance(value, bool)) for name, value in choices.items()
    )
    if not known:
        raise OptionError(
            f"storage_options[{OPTION!r}]: must map {', '.join(map(repr, _NAMES))} to True, False or None"
        )


class Courtesies:
    """Those of one store.

    Args:
        options: what its file system is made with.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._chosen = {CHECKSUMS: _choice_of_botocore(options), **options.get(OPTION, {})}
        self._refused: set[tuple[str, str]] = set()

    def asks(self, bucket: str, name: str, request: str = "") -> bool:
        """Return whether the courtesy *name* is to be asked for in *bucket*; by *request*, if several serve it."""
        if self._chosen.get(name) is False:
            return False
        return (bucket, request or name) not in self._refused

    def may_decline(self, name: str) -> bool:
        """Return whether the courtesy may be gone without; no, where the user insists."""
        return self._chosen.get(name) is not True

    def decline(self, bucket: str, name: str, error: BaseException, request: str = "") -> bool:
        """Go without from now on, for the server has answered with *error*; no, where the user insists."""
        if not self.may_decline(name):
            return False
        refused = (bucket, request or name)
        if refused not in self._refused:
            self._refused.add(refused)
            level = logging.WARNING if name == CHECKSUMS else logging.INFO
            told = "the server of bucket %s will have none of %s, so it is asked for none: %s"
            _log.log(level, told, bucket, request or name, error)
        return True


def _choice_of_botocore(options: Mapping[str, Any]) -> bool | None:
    """Return ``False`` where botocore is told to send no checksum that is not required: it is meant for all of them."""
    config = options.get("config_kwargs") or {}
    told = config.get("request_checksum_calculation") or os.environ.get("AWS_REQUEST_CHECKSUM_CALCULATION")
    return False if str(told).lower() == "when_required" else None
