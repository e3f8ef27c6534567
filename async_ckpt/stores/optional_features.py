"""Optional features of servers, which are switched off if a server refuses them.

Guarantees: a feature that a server refused for a bucket is not used there again during the life of the service; this is
logged once. The user may switch each feature off, or require it. No promise depends on these features, except that the
checksums are verified by the server.

What does not belong here: recognizing a refusal; each store knows its servers.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

from async_ckpt.errors import OptionError

__all__ = ["CHECKSUMS", "CONDITIONS", "LISTINGS", "OPTION", "OptionalFeatures", "check_choices"]

_log = logging.getLogger("async_ckpt.stores")

OPTION = "async_ckpt"
"""The key of the switches in ``storage_options``; no file system has an option of this name."""

CHECKSUMS = "checksums"
LISTINGS = "listings"
CONDITIONS = "conditional_reads"
_NAMES = (CHECKSUMS, LISTINGS, CONDITIONS)


def check_choices(options: Mapping[str, Any]) -> None:
    """Refuse unknown switches.

    Raises:
        OptionError: *options*, the storage options, contain one.
    """
    choices = options.get(OPTION, {})
    known = isinstance(choices, Mapping) and all(
        name in _NAMES and (value is None or isinstance(value, bool)) for name, value in choices.items()
    )
    if not known:
        raise OptionError(
            f"storage_options[{OPTION!r}]: must map {', '.join(map(repr, _NAMES))} to True, False or None"
        )


class OptionalFeatures:
    """Those of one store.

    Args:
        options: the options of its file system.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._chosen = {CHECKSUMS: _choice_of_botocore(options), **options.get(OPTION, {})}
        self._refused: set[tuple[str, str]] = set()

    def asks(self, bucket: str, name: str, request: str = "") -> bool:
        """Return whether to use the feature *name* in *bucket*; *request* tells apart several requests for it."""
        if self._chosen.get(name) is False:
            return False
        return (bucket, request or name) not in self._refused

    def is_optional(self, name: str) -> bool:
        """Return whether the feature may be left out; False if the user requires it."""
        return self._chosen.get(name) is not True

    def decline(self, bucket: str, name: str, error: BaseException, request: str = "") -> bool:
        """Stop using the feature, as the server answered with *error*; return False if the user requires it."""
        if not self.is_optional(name):
            return False
        refused = (bucket, request or name)
        if refused not in self._refused:
            self._refused.add(refused)
            level = logging.WARNING if name == CHECKSUMS else logging.INFO
            told = "the server of bucket %s refuses %s, so they are not used there from now on: %s"
            _log.log(level, told, bucket, request or name, error)
        return True


def _choice_of_botocore(options: Mapping[str, Any]) -> bool | None:
    """Return ``False`` if botocore is configured to send only required checksums: that is meant for ours, too."""
    config = options.get("config_kwargs") or {}
    told = config.get("request_checksum_calculation") or os.environ.get("AWS_REQUEST_CHECKSUM_CALCULATION")
    return False if str(told).lower() == "when_required" else None
