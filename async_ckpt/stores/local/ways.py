"""How a file gets to its name in a place that may refuse what that takes; and what to tell where no way is left.

The safest way first: under a temporary name, and then to its own (D2), by way of the earlier file's being put aside
where that cannot be replaced. Only then, and only where the user allows it, right under its name. In each of them the
bytes go in the order of the file where the place takes no others.

Pure: what is known of the place and of the file comes in, a way or an error comes out.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass

from async_ckpt.stores.local.places import Place

__all__ = [
    "BY_OPTION",
    "Found",
    "Way",
    "WayRefused",
    "choose",
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

BY_OPTION = (
    'in_place="allow" lets it be written under its own name: then a failure or a kill in the middle leaves '
    "neither the earlier checkpoint nor a whole new one."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How one file gets to its name.

    Attributes:
        in_place: it is written under its name.
        in_order: its bytes are written one after the other.
    """

    in_place: bool = False
    in_order: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What is at the name.

    Attributes:
        taken: something is there.
        fixed: the number with which the system refuses to put another file in its place, or to move it; else 0.
    """

    taken: bool = False
    fixed: int = 0


class WayRefused(OSError):
    """There is no way, or none that is allowed.

    Attributes:
        advice: what can be done.
    """

    def __init__(self, number: int, advice: str) -> None:
        super().__init__(number, os.strerror(number))
        self.advice = advice


def choose(place: Place, found: Found, *, in_place: bool) -> Way:
    """Return the safest way.

    Args:
        place: what the directory refuses.
        found: what is at the name.
        in_place: whether the file may be written under its name, where nothing else is left.

    Raises:
        WayRefused: there is none.
    """
    in_order = bool(place.offset)
    number, reason = _against_moving(place, found)
    if not number:
        return Way(in_order=in_order)
    if place.create and not found.taken:  # nor in place
        raise WayRefused(number, reason)
    if not in_place:
        raise WayRefused(number, f"{reason} {BY_OPTION}")
    return Way(in_place=True, in_order=in_order)


def _against_moving(place: Place, found: Found) -> tuple[int, str]:
    """Return the number and the reason for which no file can be moved to the name; 0 and nothing if one can."""
    if found.fixed == errno.EBUSY:
        return found.fixed, (
            "It is a mount of its own, as of a single file into a container, so no other file can take its place. "
            "Mount its directory instead, or save to another name."
        )
    if found.fixed:
        return found.fixed, (
            "The file there belongs to another user, and in a sticky directory nobody else may replace it. "
            "Save to another name."
        )
    if place.create:
        return place.create, "No file can be made in that directory. Save where one can."
    if place.rename:
        return place.rename, (
            "The place refuses to rename a file, so none can appear there whole and at once. Save elsewhere: to a "
            "local disk, or to the storage behind a mount by its own URL, such as s3://."
        )
    if found.taken and place.replace and place.unlink:
        return place.replace, (
            "The place refuses to rename a file over another, and to remove one, so the earlier file stays in the way. "
            "Save to a new name, or allow deleting where it is mounted."
        )
    return 0, ""


def is_of_another(found: os.stat_result) -> bool:
    """Return whether what was *found* belongs to another user, and that makes a difference to this one."""
    return os.geteuid() not in (0, found.st_uid)


def refusal_to_replace(found: os.stat_result, directory: os.stat_result) -> int:
    """Return the number with which the system will keep what was *found* in *directory* from being replaced; else 0."""
    sticky = directory.st_mode & stat.S_ISVTX and os.geteuid() != directory.st_uid
    return errno.EPERM if sticky and is_of_another(found) else 0


def late_advice(stage: str) -> str:
    """Return what to tell where the place refused at a later stage what it seemed to do."""
    if stage == "commit":
        return f"The place refuses to put another file there; what was there is untouched. Save elsewhere. {BY_OPTION}"
    return ""


def is_refusal(number: int | None) -> bool:
    """Return whether *number* says that a place does not do such a thing at all."""
    return number in _REFUSALS


def refused_in_place(error: OSError) -> WayRefused:
    """Return the error of a place that takes nothing in place of the file that is there, not even in it."""
    advice = (
        "The place lets no file that is there be written over. Save to a new name, or mount it so that it does: "
        "Mountpoint for S3, with --allow-overwrite. What was there is untouched."
    )
    return WayRefused(error.errno or errno.EPERM, advice)
