"""What a caller writes for a place: text, a path, or a ``UPath``; and what cannot be what was meant.

Guarantees: no file system is imported for it, and no network touched. What ``pathlib`` has made of a URL is refused,
with the text that would work, and is never taken for a directory called ``s3:``.

What does not belong here: what a place is called, and which store serves it.
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
# What pathlib makes of "s3://bucket/…", and os.path.abspath of that: Lightning has it of ModelCheckpoint's dirpath.
_EATEN_SLASH = rf"(?:^|(?<=/))((?:{_NAME}::)*)({_NAME}):/+"
_BACKSLASHED = re.compile(rf"(?:^|[/\\:]){_NAME}:\\")  # what pathlib.PureWindowsPath makes of one
_URL = rf"{_NAME}://"
_FROM_THE_ROOT = frozenset({"dbfs"})  # no host comes first in their URLs


@runtime_checkable
class UniversalPath(Protocol):
    """A ``UPath`` of universal_pathlib, by what it has; one that is not local is no ``os.PathLike``."""

    @property
    def protocol(self) -> str:
        """The name of its file system; empty for a local path."""

    @property
    def path(self) -> str:
        """What that file system knows it as."""

    @property
    def storage_options(self) -> Mapping[str, Any]:
        """What that file system is made with."""


Given: TypeAlias = "str | os.PathLike[str] | UniversalPath"
"""What a place may be given as."""


class Address(NamedTuple):
    """What was given.

    Attributes:
        text: a local path, or a URL.
        options: what the file system is made with, as far as a ``UPath`` says it; there may be secrets in it.
    """

    text: str
    options: Mapping[str, Any]


def is_given(value: object) -> bool:
    """Return whether *value* is of a kind that a place is given as."""
    return isinstance(value, (str, os.PathLike, UniversalPath))


def read_address(given: Given) -> Address:
    """Return what *given* says.

    Raises:
        TypeError: it is of no such kind.
        OptionError: it is empty, chained, or a URL that went through ``pathlib``.
    """
    text, options = _taken_apart(given)
    if not isinstance(text, str):
        raise TypeError(f"a checkpoint's place must be a str or a path, not {type(given).__name__}")
    if not text.strip():
        raise OptionError("a checkpoint's place must not be empty")
    if "\0" in text:
        raise OptionError(f"{redacted_text(text)!r} contains a null character")
    _refuse_chained(text)
    refuse_mangled(text)
    if isinstance(given, UniversalPath) and not _is_local(given) and "://" not in text:
        raise OptionError(
            f"{redacted_text(text)!r} is of {given.protocol!r} and no URL; nothing is saved to such"
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
            f"{redacted_text(text)!r} is chained, and what is written through a chain cannot be committed safely; "
            f"give the storage's own place: {works!r}"
        )


def refuse_mangled(text: str) -> None:
    """Refuse a path that was a URL before it went through ``pathlib`` or ``os.path``.

    Where a relative path begins with the name of one of fsspec's protocols and a colon, that is what has happened,
    and in the working directory ``os.path.abspath`` has followed. Elsewhere, a directory of such a name is believed.
    What begins with ``./``, or as ``file://``, is meant as it is.

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
    """Return the URL that *text* was from where *eaten* begins."""
    protocol, path = eaten[2].lower(), text[eaten.end() :]
    if protocol in LOCAL_PROTOCOLS:
        # While it can be told what in it is secret.
        return "/" + redacted_url(f"{protocol}://{path}").partition("://")[2]
    return f"{protocol}://{'/' if protocol in _FROM_THE_ROOT else ''}{path}"


def is_protocol(name: str) -> bool:
    """Return whether fsspec knows a protocol of that name, in whatever letters."""
    from fsspec.registry import known_implementations, registry

    return name.lower() in known_implementations or name.lower() in registry
