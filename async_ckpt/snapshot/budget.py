"""The host bytes that snapshots may hold, counted (B1).

Guarantees: what fits stays within the limit, or is the only thing held; what is released was reserved.
Not thread-safe: one thread, the loop's, owns it.

What does not belong here: waiting, memory itself, queue places.
"""

from __future__ import annotations

__all__ = ["Budget"]


class Budget:
    """A limit on bytes, and how many of them are taken.

    Args:
        limit_bytes: the most that may be held.
    """

    __slots__ = ("_held_bytes", "_limit_bytes")

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._held_bytes = 0

    @property
    def limit_bytes(self) -> int:
        """The most that may be held."""
        return self._limit_bytes

    @property
    def held_bytes(self) -> int:
        """What is reserved now."""
        return self._held_bytes

    def fits(self, nbytes: int, *, beside: int | None = None) -> bool:
        """Return whether *nbytes* may be reserved.

        Args:
            nbytes: the size of the request.
            beside: the bytes held by others that it must fit beside; what is held now by default.

        Returns:
            True where the sum stays within the limit, or nothing else is held.
        """
        others = self._held_bytes if beside is None else beside
        return others == 0 or others + nbytes <= self._limit_bytes

    def reserve(self, nbytes: int) -> None:
        """Take *nbytes*, whether they fit or not: that is the caller's decision.

        Raises:
            ValueError: *nbytes* is negative.
        """
        if nbytes < 0:
            raise ValueError(f"cannot reserve {nbytes} bytes")
        self._held_bytes += nbytes

    def release(self, nbytes: int) -> None:
        """Give back *nbytes* that were reserved.

        Raises:
            ValueError: more would be given back than is held.
        """
        if not 0 <= nbytes <= self._held_bytes:
            raise ValueError(f"cannot release {nbytes} of {self._held_bytes} held bytes")
        self._held_bytes -= nbytes
