"""Chooses the strategy by which a file gets its name, given what the directory refuses; or explains that there is none.

The safest strategy writes a temporary file and renames it (D2), after putting the earlier file aside if that cannot be
replaced. Only if that is impossible, and the user allows it, the file is written in place. Either way, the bytes are
written in order if the directory demands it.

Pure: it takes the capabilities and the existing file, and returns a strategy or raises an error.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass

from async_ckpt.stores.local.capabilities import Capabilities

__all__ = [
    "IN_PLACE_ADVICE",
    "Existing",
    "NoStrategyError",
    "WriteStrategy",
    "choose_strategy",
    "is_of_another",
    "is_refusal",
    "late_advice",
    "refusal_to_replace",
    "refused_in_place",
]

_REFUSALS = frozenset(
    {
        errno.EACCES,
        errno.EBUSY,
        errno.EEXIST,
        errno.EINVAL,
        errno.ENOSYS,
        errno.ENOTSUP,
        errno.EOPNOTSUPP,
        errno.EPERM,
    }
)

IN_PLACE_ADVICE = (
    'in_place="allow" writes the file in place: then a failure or a kill in the middle leaves '
    "neither the earlier checkpoint nor a complete new one."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteStrategy:
    """How one file gets its name.

    Attributes:
        in_place: whether it is written under its final name.
        in_order: whether its bytes are written in the order of the file.
    """

    in_place: bool = False
    in_order: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Existing:
    """What is at the name.

    Attributes:
        taken: whether the name exists.
        fixed: the errno with which the system refuses to replace or rename it; otherwise 0.
    """

    taken: bool = False
    fixed: int = 0


class NoStrategyError(OSError):
    """There is no strategy, or none that is allowed.

    Attributes:
        advice: what to do.
    """

    def __init__(self, number: int, advice: str) -> None:
        super().__init__(number, os.strerror(number))
        self.advice = advice


def choose_strategy(capabilities: Capabilities, found: Existing, *, in_place: bool) -> WriteStrategy:
    """Return the safest strategy.

    Args:
        capabilities: the capabilities of the directory.
        found: the existing file.
        in_place: whether the file may be written in place if there is no other way.

    Raises:
        NoStrategyError: there is no strategy, or none that is allowed.
    """
    in_order = bool(capabilities.offset)
    number, reason = _against_moving(capabilities, found)
    if not number:
        return WriteStrategy(in_order=in_order)
    if capabilities.create and not found.taken:  # nor in place
        raise NoStrategyError(number, reason)
    if not in_place:
        raise NoStrategyError(number, f"{reason} {IN_PLACE_ADVICE}")
    return WriteStrategy(in_place=True, in_order=in_order)


def _against_moving(capabilities: Capabilities, found: Existing) -> tuple[int, str]:
    """Return the errno and the reason why no file can be renamed to the name; 0 and nothing if it can."""
    if found.fixed == errno.EBUSY:
        return found.fixed, (
            "It is a mount of its own, such as a single file mounted into a container, so no file can replace it. "
            "Mount its directory instead, or save to another name."
        )
    if found.fixed:
        return found.fixed, (
            "The file there belongs to another user, and in a sticky directory nobody else may replace it. "
            "Save to another name."
        )
    if capabilities.create:
        return capabilities.create, "No file can be made in that directory. Save where one can."
    if capabilities.rename:
        return capabilities.rename, (
            "The directory refuses to rename a file, so a checkpoint cannot appear there whole and at once. Save "
            "elsewhere: to a local disk, or to the storage behind the mount by its own URL, such as s3://."
        )
    if found.taken and capabilities.replace and capabilities.unlink:
        return capabilities.replace, (
            "The directory refuses to rename a file over another, and to remove one, so the earlier file stays in the "
            "way. Save to a new name, or mount it with the option that allows deleting."
        )
    return 0, ""


def is_of_another(found: os.stat_result) -> bool:
    """Return whether the file *found* belongs to another user, unless this one is root."""
    return os.geteuid() not in (0, found.st_uid)


def refusal_to_replace(found: os.stat_result, directory: os.stat_result) -> int:
    """Return the errno with which the system will refuse to replace the file *found* in *directory*; otherwise 0."""
    sticky = directory.st_mode & stat.S_ISVTX and os.geteuid() != directory.st_uid
    return errno.EPERM if sticky and is_of_another(found) else 0


def late_advice(stage: str) -> str:
    """Return advice for an operation that is refused though it seemed to be supported."""
    if stage == "commit":
        refused = "The directory refuses to replace the file that is there, which is untouched."
        return f"{refused} Save elsewhere. {IN_PLACE_ADVICE}"
    return ""


def is_refusal(number: int | None) -> bool:
    """Return whether the errno *number* means that an operation is not supported at all."""
    return number in _REFUSALS


def refused_in_place(error: OSError) -> NoStrategyError:
    """Return the error for a directory in which an existing file can be neither replaced nor written."""
    advice = (
        "The directory does not allow existing files to be overwritten. Save to a new name, or mount it with the "
        "option for that: Mountpoint for S3, --allow-overwrite. The earlier file is untouched."
    )
    return NoStrategyError(error.errno or errno.EPERM, advice)
