"""Reads a location as the caller gives it: text, a path, or a ``UPath``; refuses what was surely not meant.

Guarantees: no file system is imported, and no network is used. A URL that went through ``pathlib`` is refused, with the
text that works, and is never taken for a directory called ``s3:``.

What does not belong here: the key of a location, and the choice of its store.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

from async_ckpt.errors import OptionError
from async_ckpt.stores.redaction import redacted_text, redacted_url

__all__ = [
    "LOCAL_PROTOCOLS",
    "Address",
    "Given",
    "UniversalPath",
    "is_given",
    "is_protocol",
    "read_address",
    "refuse_mangled",
]

LOCAL_PROTOCOLS = frozenset({"file", "local"})

_NAME = r"[A-Za-z][A-Za-z0-9+.\-_]*"
# What pathlib makes of "s3://bucket/…", and os.path.abspath of that, as Lightning does with ModelCheckpoint's dirpath.
_EATEN_SLASH = rf"(?:^|(?<=/))((?:{_NAME}::)*)({_NAME}):/+"
_BACKSLASHED = re.compile(rf"(?:^|[/\\:]){_NAME}:\\")  # what pathlib.PureWindowsPath makes of one
_URL = rf"{_NAME}://"
_FROM_THE_ROOT = frozenset({"dbfs"})  # no host comes first in their URLs


@runtime_checkable
class UniversalPath(Protocol):
    """A ``UPath`` of universal_pathlib, recognized by its attributes; one that is not local is no ``os.PathLike``."""

    @property
    def protocol(self) -> str:
        """The name of its file system; empty for a local path."""

    @property
    def path(self) -> str:
        """The path within its file system."""

    @property
    def storage_options(self) -> Mapping[str, Any]:
        """The options of its file system."""


Given: TypeAlias = "str | os.PathLike[str] | UniversalPath"
"""The types in which a location may be given."""


class Address(NamedTuple):
    """What was given.

    Attributes:
        text: a local path, or a URL.
        options: a ``UPath``'s options for its file system, which may contain secrets.
    """

    text: str
    options: Mapping[str, Any]


def is_given(value: object) -> bool:
    """Return whether *value* has a type in which a location may be given."""
    return isinstance(value, (str, os.PathLike, UniversalPath))


def read_address(given: Given) -> Address:
    """Read a location as it was given.

    Raises:
        TypeError: it has another type.
        OptionError: it is empty, chained, or a URL that lost a slash in ``pathlib``.
    """
    text, options = _taken_apart(given)
    if not isinstance(text, str):
        raise TypeError(f"the location of a checkpoint must be a str or a path, not {type(given).__name__}")
    if not text.strip():
        raise OptionError("the location of a checkpoint must not be empty")
    if "\0" in text:
        raise OptionError(f"{redacted_text(text)!r} contains a null character")
    _refuse_chained(text)
    refuse_mangled(text)
    if "://" not in text and isinstance(given, UniversalPath) and not _is_local(given):
        raise OptionError(
            f"{redacted_text(text)!r} is a path of {given.protocol!r} without a URL, so it cannot be saved "
            "to; give a URL"
        )
    return Address(text, options)


def _taken_apart(given: Any) -> tuple[Any, Mapping[str, Any]]:
    if isinstance(given, str):
        return given, {}
    if isinstance(given, UniversalPath):
        return (given.path, {}) if _is_local(given) else (str(given), dict(given.storage_options))
    return (os.fspath(given) if isinstance(given, os.PathLike) else given), {}


def _is_local(path: UniversalPath) -> bool:
    return not path.protocol or path.protocol in LOCAL_PROTOCOLS


def _with_slashes(text: str) -> str:
    return text.replace("\\", "/") if _BACKSLASHED.search(text) else text


def _refuse_chained(text: str) -> None:
    text = _with_slashes(text)
    first, chained, rest = text.partition("::")
    if chained and ("://" in text or is_protocol(re.split("[:/]", first)[0])):
        own = re.match(_EATEN_SLASH, rest)
        works = redacted_text(_mended(own, rest) if own else rest)
        raise OptionError(
            f"{redacted_text(text)!r} is a chained URL, and files written through a chain cannot be committed safely; "
            f"give the storage's own URL: {works!r}"
        )


def refuse_mangled(text: str) -> None:
    """Refuse a path that was a URL before it went through ``pathlib`` or ``os.path``.

    That is the case if a relative path begins with the name of one of fsspec's protocols and a colon, or an absolute
    path does so below the working directory, after ``os.path.abspath``. Elsewhere, a directory may have such a name. A
    path that begins with ``./`` or ``file://`` is taken literally.

    Raises:
        OptionError: it is such a path.
    """
    text = _with_slashes(text)
    if ":/" not in text or text.startswith("./") or re.match(_URL, text):
        return
    for eaten in re.finditer(_EATEN_SLASH, text):
        if not is_protocol(eaten[2]) or _is_believed(text, eaten):
            continue
        local = redacted_text(os.path.expanduser(text))
        meant = f"file://{local}" if local.startswith("/") else f"./{local}"
        raise OptionError(
            f"{redacted_text(text)!r} was a URL that lost a slash, as in pathlib.Path('{eaten[2]}://…'); pass it as "
            f"a str: {redacted_text(_mended(eaten, text))!r}. If a local directory {eaten[0].rstrip('/')!r} is meant, "
            f"write {meant!r}"
        )


def _is_believed(text: str, eaten: re.Match[str]) -> bool:
    parent = text[: eaten.start()]
    if not parent or parent == os.path.join(os.getcwd(), ""):
        return False  # what made the same mistake before has left such a directory there
    return os.path.isdir(os.path.expanduser(text[: eaten.end()]))


def _mended(eaten: re.Match[str], text: str) -> str:
    """Return the original URL in *text*, which begins at the match *eaten*."""
    protocol, path = eaten[2].lower(), text[eaten.end() :]
    if protocol in LOCAL_PROTOCOLS:
        # As long as the secrets in it can be recognized.
        return "/" + redacted_url(f"{protocol}://{path}").partition("://")[2]
    return f"{protocol}://{'/' if protocol in _FROM_THE_ROOT else ''}{path}"


def is_protocol(name: str) -> bool:
    """Return whether fsspec knows a protocol of that name, in upper or lower case."""
    from fsspec.registry import known_implementations, registry

    return name.lower() in known_implementations or name.lower() in registry
