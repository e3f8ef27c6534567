"""What the driver needs of a save: a description of what this rank saves, and an executor of the agreement's actions.

What does not belong here: which actions are due (protocol), and carrying them out (rendezvous).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from async_ckpt.sharded.agreement.protocol import Action

__all__ = ["Executor", "Offer", "Replies"]


@dataclass(frozen=True, slots=True)
class Replies:
    """Reports the outcome of an action to the agreement: *done* takes its result, *failed* its error."""

    done: Callable[..., list[Action]]
    failed: Callable[[str], list[Action]]


class Offer(Protocol):
    """A rank's description of what it saves; the rank announces it when it begins a save."""

    @property
    def location(self) -> str:
        """The location of the save, without secrets."""

    @property
    def fingerprint(self) -> bytes:
        """A hash of everything that the plan contains."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """The size of each pickled item in bytes."""

    def plan(self) -> bytes:
        """Return the plan; called only if the coordinator does not know it."""


class Executor(Protocol):
    """Carries out one rank's part in one save, on the service's loop."""

    number: int
    offer: Offer

    def deliver(self, action: Action, replies: Replies | None) -> None:
        """Perform *action* on the loop, and report its outcome by one of *replies*. Must not raise."""
