"""What may befall a request to the strict server, and what a test sees of one."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Fault", "Request", "at"]


class Fault(enum.Enum):
    """What may befall a request."""

    BUSY = "answered 503, not carried out"
    DENIED = "answered 403, not carried out"
    LOST = "carried out, and the connection reset instead of an answer"
    FORGOTTEN = "the same, and the session is forgotten too"
    HALF = "half of the bytes kept, then the connection reset"
    SHORT = "half of the bytes kept, and said so"
    NOTHING = "no byte kept, and said so"
    DROPPED = "every byte of the upload dropped, and said so"
    BOASTED = "carried out, and more said to be held than was sent"
    FOREIGN = "answered 200 by somebody else, who means something else"
    REDIRECTED = "answered 308 by somebody else, who sends it elsewhere"
    GONE = "the session forgotten, answered 410"
    STALLED = "neither read nor answered"
    LATE = "carried out, unanswered, when the next upload begins; the session is forgotten at once"
    DAMAGED = "one byte changed on the way in"
    CORRUPT = "one byte changed after every check"


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request as a test sees it.

    Attributes:
        kind: ``begin``, ``chunk``, ``last``, ``ask``, ``cancel``, ``describe``, ``read``, ``list`` or ``delete``.
        number: how many of its kind came before it.
        key: the object's name, as far as the request tells.
        span: its Content-Range or Range.
        authorization: its credentials.
        project: whose it is to pay.
    """

    kind: str
    number: int
    key: str
    span: str
    authorization: str
    project: str


def at(kind: str, number: int, fault: Fault) -> Callable[[Request], Fault | None]:
    """Return what makes *fault* befall one request."""
    return lambda request: fault if (request.kind, request.number) == (kind, number) else None
