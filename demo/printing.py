"""What the demo prints: headings, lines, and claims with their outcome."""

from __future__ import annotations

__all__ = ["Proofs", "say", "title"]


def title(text: str) -> None:
    """Print the heading of an act."""
    print(f"\n{text}\n{'─' * len(text)}", flush=True)


def say(text: str = "") -> None:
    """Print a line of an act."""
    print(f"  {text}".rstrip(), flush=True)


class Proofs:
    """The claims of the demo, and whether they hold.

    Attributes:
        failed: the claims that did not hold.
    """

    def __init__(self) -> None:
        self.failed: list[str] = []

    def show(self, claim: str, holds: bool) -> None:
        """Print *claim* with the outcome, and keep it if it does not hold."""
        say(f"✓ {claim}" if holds else f"✗ FAILED: {claim}")
        if not holds:
            self.failed.append(claim)
