"""Makes locations, and chooses the store for a URL: an unusable URL is an error at the call.

Guarantees: ``locate`` and ``check_target`` use no network; two spellings of one location have the same key (O1). What
does not belong here: anything that a store does.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from async_ckpt.errors import MissingDependencyError, OptionError, StoreError, UnknownProtocolError
from async_ckpt.stores.addresses import (
    LOCAL_PROTOCOLS,
    Given,
    is_given,
    is_protocol,
    read_address,
    refuse_mangled,
)
from async_ckpt.stores.base import Location, Store, Workers
from async_ckpt.stores.identity import path_of_place, place_of_options
from async_ckpt.stores.optional_features import OPTION, check_choices
from async_ckpt.stores.redaction import redacted_url, secrets_in
from async_ckpt.system.trusted_paths import resolve

if TYPE_CHECKING:
    from async_ckpt.options import Durability, InPlace, PageCache
    from async_ckpt.retry import RetryPolicy

__all__ = [
    "LOCAL_GROUP",
    "Given",
    "check_target",
    "is_given",
    "is_local",
    "locate",
    "locate_local",
    "open_store",
    "refuse_mangled",
    "relocate",
]

LOCAL_GROUP = "file"

_EXTRAS = {
    "s3": "s3",
    "s3a": "s3",
    "gs": "gcs",
    "gcs": "gcs",
    "az": "azure",
    "abfs": "azure",
    "abfss": "azure",
}
_NATIVE = {  # by the package that brings the file system
    "s3fs": ("async_ckpt.stores.s3", "S3Store"),
    "gcsfs": ("async_ckpt.stores.gcs", "GCSStore"),
    "adlfs": ("async_ckpt.stores.azure", "AzureStore"),
}
# File systems of fsspec's that cannot be saved to: read-only ones, and archives, which cannot rename.
_UNWRITABLE = frozenset({"data", "gist", "git", "github", "http", "libarchive", "reference", "tar", "zip"})
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-_]*)://")


def locate(
    url: Given,
    *,
    storage_options: Mapping[str, Any] | None = None,
    follow: bool = True,
) -> Location:
    """Return the location for *url*; cheap enough for a training thread.

    Args:
        url: a local path, a URL that fsspec knows, or a ``UPath``.
        storage_options: options for the file system; a ``UPath``'s own options take precedence.
        follow: whether a symlink on a local disk stands for its present target, as for ``open``, or for itself, to be
            deleted or replaced by a file.

    Returns:
        The location; its ``key`` is the same for every spelling of a file.

    Raises:
        TypeError: *url* is neither text nor a path.
        OptionError: *url* is empty, chained, or a URL that went through ``pathlib``.
        UnknownProtocolError: fsspec knows no file system for the URL's protocol.
        MissingDependencyError: the package of that file system is not installed.
        StoreError: a symlink to follow leads back to itself.
    """
    text, own_options = read_address(url)
    scheme = _SCHEME.match(text)
    if scheme is None or scheme[1] in LOCAL_PROTOCOLS:
        return locate_local(text if scheme is None else text[scheme.end() :], follow=follow, url=text)
    shown = redacted_url(text)
    file_system = _file_system_class(scheme[1], shown)
    try:
        options = _file_system_options(file_system, text, storage_options, own_options)
        path = str(file_system._strip_protocol(text))
    except ValueError:  # its message may contain parts of a password
        raise OptionError(
            f"{shown!r} is not a valid URL of {scheme[1]}; special characters in a user name or password "
            "must be percent-encoded"
        ) from None
    if OPTION in options:
        check_choices(options)
        if _package(file_system) != "s3fs":
            raise OptionError(
                f"storage_options[{OPTION!r}]: its switches exist only for S3, not for {scheme[1]}"
            )
    protocols = file_system.protocol
    name = protocols if isinstance(protocols, str) else protocols[0]
    path = path_of_place(name, path)  # for the store, too, because servers handle "/../" differently
    if not path.strip("/"):
        raise OptionError(f"{shown!r} does not name a file")
    place = place_of_options(file_system, name, options)
    return Location(
        url=shown,
        path=path,
        key=f"{name}:{place}:{path}",
        group=f"{name}:{_token(options)}",
        address=text,
        secrets=secrets_in(text, {**_configured(scheme[1]), **options}),
        options=own_options,
    )


def locate_local(
    path: str, *, follow: bool = True, url: str = "", changes: Mapping[str, str | None] | None = None
) -> Location:
    """Like ``locate``, for a path on a local disk, even if it looks like a URL.

    Args:
        path: relative to the working directory, or absolute.
        follow: as for ``locate``.
        url: the location as the user wrote it, if different from *path*.
        changes: pending changes of links: by path, the future target, or ``None`` if it will be no link.

    Raises:
        OptionError: *path* names no file.
        StoreError: there is a cycle of links.
    """
    url = url or path
    if path.startswith("~"):
        path = os.path.expanduser(path)  # as fsspec does, and with it Lightning
    if not path.strip("/") or "\0" in path:
        raise OptionError(f"{redacted_url(url)!r} does not name a file")
    shown = redacted_url(url)  # there may be a URL in it that lost a slash
    try:
        way = resolve(path, follow=follow, changes=changes)
    except OSError as error:
        raise StoreError.during("begin", shown, error) from error
    return Location(
        url=shown,
        path=way.path,
        key=_local_key(way.path),
        group=LOCAL_GROUP,
        address=url,
        foreign_link=way.foreign,
        links=tuple(map(_local_key, way.links)),
        follows=follow,
        in_directory=way.in_directory,
        look=way.look,
    )


def relocate(location: Location, changes: Mapping[str, str | None]) -> Location:
    """Return a local *location* as it will be after pending changes of links on its path.

    Args:
        location: a location just made by ``locate``.
        changes: by key, the key of the future target, or ``None`` if it will be no link.

    Raises:
        StoreError: there is a cycle of links.
    """
    paths = {
        _local_path(name): None if target is None else _local_path(target) for name, target in changes.items()
    }
    url = location.address
    scheme = _SCHEME.match(url)
    path = url if scheme is None else url[scheme.end() :]
    return locate_local(path, follow=location.follows, url=url, changes=paths)


def is_local(location: Location) -> bool:
    """Return whether *location* belongs to the local store."""
    return location.group == LOCAL_GROUP


def check_target(location: Location, *, in_place: bool = False) -> None:
    """Refuse a location that cannot be saved to, with a few system calls, without changes and without network.

    Args:
        location: a location just made; for a remote one, only the kind of file system is checked.
        in_place: whether a local file may be written in place if no other can be created beside it.

    Raises:
        StoreError: it is a directory or another special file, or it may not be written.
    """
    if is_local(location):
        from async_ckpt.stores.disk import Disk
        from async_ckpt.stores.local.target import check_local_target

        check_local_target(location, Disk(), in_place=in_place, at_call=True)
        return
    package, _, module = _file_system_of(location).__module__.rpartition(".")
    if package == "fsspec.implementations" and module in _UNWRITABLE:
        number, advice = (
            errno.EROFS,
            "Checkpoints can only be loaded from there; save to another file system.",
        )
    elif package.partition(".")[0] in _NATIVE and "/" not in location.path.strip("/"):
        number, advice = errno.EISDIR, "That is a whole bucket; give the name of an object in it."
    else:
        return
    cause = OSError(number, os.strerror(number))
    raise StoreError.during("begin", location.url, cause, advice) from cause


def open_store(
    location: Location,
    *,
    workers: Workers,
    storage_options: Mapping[str, Any] | None = None,
    durability: Durability = "fsync",
    retry: RetryPolicy | None = None,
    overwrite: bool = True,
    in_place: InPlace = "refuse",
    page_cache: PageCache = "auto",
    part_size: int = 128 << 20,
    max_concurrent_parts: int = 4,
) -> Store:
    """Make the store for *location* and all other locations of its group.

    Args:
        location: from ``locate`` with the same *storage_options*.
        workers: run blocking calls.
        storage_options: what the file system is made with.
        durability: the durability of local files.
        retry: how often a request to a remote file system is repeated.
        overwrite: whether a commit may replace an existing file.
        in_place: whether local files may be written in place.
        page_cache: what is to become of local files in the page cache.
        part_size: the preferred size of a part, within the store's limits.
        max_concurrent_parts: how many requests that carry data run at a time.

    Returns:
        A store; close it with ``aclose``.

    """
    if is_local(location):
        from async_ckpt.stores.local.store import LocalStore

        return LocalStore(
            workers=workers,
            durability=durability,
            overwrite=overwrite,
            in_place=in_place == "allow",
            page_cache=page_cache,
            part_size=part_size,
        )
    from async_ckpt.retry import RetryPolicy

    retry = retry or RetryPolicy()
    file_system = _file_system_of(location)
    options = _file_system_options(file_system, location.address, storage_options, location.options)
    native = _NATIVE.get(_package(file_system))
    if native is None:  # a class of the user's own behind s3:// is not what ours are written for
        from async_ckpt.stores.generic.store import GenericStore

        return GenericStore.connect(
            file_system, options, location, workers=workers, retry=retry, overwrite=overwrite
        )
    module, name = native
    store: Store = getattr(import_module(module), name)(
        file_system,
        options,
        workers=workers,
        retry=retry,
        overwrite=overwrite,
        part_size=part_size,
        max_concurrent_parts=max_concurrent_parts,
    )
    return store


def _local_key(path: str) -> str:
    return f"{LOCAL_GROUP}:{path}"


def _local_path(key: str) -> str:
    return key.partition(":")[2]


def _file_system_of(location: Location) -> Any:
    scheme = _SCHEME.match(location.url)
    assert scheme is not None, location
    return _file_system_class(scheme[1], location.url)


def _package(file_system: Any) -> str:
    return str(file_system.__module__.partition(".")[0])


def _file_system_class(protocol: str, url: str) -> Any:
    import fsspec

    try:
        return fsspec.get_filesystem_class(protocol)
    except ValueError as error:
        usual = protocol.lower()
        advice = "install the package that adds it to fsspec, or give a local path"
        if usual != protocol and is_protocol(usual):
            advice = f"write {usual}://; the case matters"
        raise UnknownProtocolError(
            f"no file system is known for {protocol}:// in {url!r}; {advice}",
            location=url,
            stage="begin",
        ) from error
    except (ImportError, AttributeError) as error:
        extra = _EXTRAS.get(protocol)
        advice = f'pip install "async-ckpt[{extra}]"' if extra else str(error)
        raise MissingDependencyError(
            f"{protocol}:// in {url!r} needs a package that is not installed: {advice}"
        ) from error


def _file_system_options(
    file_system: Any, url: str, storage_options: Mapping[str, Any] | None, own: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the file system's options: from the URL, from *storage_options*, and from the location itself."""
    return {**file_system._get_kwargs_from_urls(url), **(storage_options or {}), **own}


def _configured(protocol: str) -> Mapping[str, Any]:
    """Return the options that the user's fsspec configuration adds for a protocol."""
    from fsspec.config import conf  # not by way of fsspec: an import that Ctrl-C broke off leaves it without

    found = conf.get(protocol)
    return found if isinstance(found, Mapping) else {}


def _token(options: dict[str, Any]) -> str:
    if not options:
        return ""
    from fsspec.utils import tokenize

    return str(tokenize(sorted(options.items(), key=lambda item: item[0])))
