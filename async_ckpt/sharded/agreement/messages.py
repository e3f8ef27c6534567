"""The messages about a save that ranks send each other, and their encoding.

Guarantees: decoding treats its input as data only; nothing that another process wrote decides which code runs here. A
message that cannot be decoded raises `ValueError`.

What does not belong here: who sends what and when (protocol), and by which means (wire).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = [
    "Ack",
    "CoordinatorHeartbeat",
    "Failed",
    "FromCoordinator",
    "GaveUp",
    "Go",
    "Heartbeat",
    "Ready",
    "ToCoordinator",
    "Verdict",
]
__all__ += ["Wrote", "decode", "decode_failures", "encode", "encode_failures"]


@dataclass(frozen=True, slots=True)
class Ready:
    """A rank has begun a save.

    Attributes:
        rank: the rank.
        location: the location it was given, for messages.
        fingerprint: a hash of what it saves: names, shapes, specs.
        plan: what it saves, in full; ``None`` on the wire if the coordinator has it.
        sizes: the lengths of the pickled items in bytes, which differ from save to save.
        planned: the number of the save whose planning assigned its current work; ``None`` if it has none.
    """

    rank: int
    location: str
    fingerprint: bytes
    plan: bytes | None
    sizes: tuple[int, ...] = ()
    planned: int | None = None


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A rank is alive, and so is its event loop."""

    rank: int


@dataclass(frozen=True, slots=True)
class Wrote:
    """A rank's part is durable."""

    rank: int


@dataclass(frozen=True, slots=True)
class Failed:
    """A rank cannot, or will not, write its part."""

    rank: int
    why: str


@dataclass(frozen=True, slots=True)
class GaveUp:
    """A rank has waited for the coordinator in vain, and has made sure that no rank commits.

    Attributes:
        rank: the rank.
        failures: the reasons of the failure, by rank, with which its save has ended.
    """

    rank: int
    failures: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class Ack:
    """A rank knows the verdict."""

    rank: int


@dataclass(frozen=True, slots=True)
class Go:
    """All ranks have begun, so each may write.

    Attributes:
        work: what to write, and where; ``None`` repeats the last work.
        planned: the number of the save whose planning assigned the work.
        save_id: the identity of this save.
    """

    work: bytes | None
    planned: int
    save_id: str


@dataclass(frozen=True, slots=True)
class CoordinatorHeartbeat:
    """The coordinator is alive, and so is its event loop."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of the save.

    Attributes:
        failures: the reasons of the failure, by rank; empty if the save is durable.
        is_certain: whether it is certain that the checkpoint does not exist; if not, storage has to be checked.
    """

    failures: Mapping[int, str]
    is_certain: bool = True


ToCoordinator = Ready | Heartbeat | Wrote | Failed | GaveUp | Ack
FromCoordinator = Go | CoordinatorHeartbeat | Verdict

_LENGTH_BYTES = 4


def encode(number: int, message: ToCoordinator | FromCoordinator) -> bytes:
    """Encode a *message* about save *number*."""
    head: list[Any]
    body: bytes | None = None
    match message:
        case Ready(rank, location, fingerprint, body, sizes, planned):
            head = ["ready", rank, location, fingerprint.hex(), list(sizes), planned]
        case Failed(rank, why):
            head = ["failed", rank, why]
        case GaveUp(rank, failures):
            head = ["gaveup", rank, sorted(failures.items())]
        case Heartbeat(rank) | Wrote(rank) | Ack(rank):
            head = [type(message).__name__.lower(), rank]
        case Go(body, planned, save_id):
            head = ["go", planned, save_id]
        case Verdict(failures, is_certain):
            head = ["verdict", sorted(failures.items()), is_certain]
        case CoordinatorHeartbeat():
            head = ["alive"]
    text = json.dumps([number, body is not None, *head]).encode()
    return len(text).to_bytes(_LENGTH_BYTES, "big") + text + (body or b"")


def decode(data: bytes) -> tuple[int, ToCoordinator | FromCoordinator]:
    """Return the number and the message that `encode` was given.

    Raises:
        ValueError: *data* is not the result of `encode`.
    """
    end = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "big")
    number, has_body, kind, *values = json.loads(data[_LENGTH_BYTES:end])
    body = data[end:] if has_body else None
    match kind, values:
        case "ready", [rank, location, fingerprint, sizes, planned]:
            return number, Ready(rank, location, bytes.fromhex(fingerprint), body, tuple(sizes), planned)
        case "failed", [rank, why]:
            return number, Failed(rank, why)
        case "gaveup", [rank, failures]:
            return number, GaveUp(rank, {int(each): str(why) for each, why in failures})
        case "heartbeat", [rank]:
            return number, Heartbeat(rank)
        case "wrote", [rank]:
            return number, Wrote(rank)
        case "ack", [rank]:
            return number, Ack(rank)
        case "go", [planned, save_id]:
            return number, Go(body, planned, save_id)
        case "verdict", [failures, is_certain]:
            return number, Verdict({int(rank): str(why) for rank, why in failures}, bool(is_certain))
        case "alive", []:
            return number, CoordinatorHeartbeat()
    raise ValueError(f"unknown kind of message: {kind!r}")


def encode_failures(failures: Mapping[int, str]) -> str:
    """Return *failures* as text."""
    return json.dumps(sorted(failures.items()))


def decode_failures(text: str) -> dict[int, str]:
    """Decode the result of `encode_failures`."""
    return {int(rank): str(why) for rank, why in json.loads(text)}
