"""The budget: counts the host bytes that snapshots hold (B1).

Guarantees: a reservation that fits stays within the limit, or is the only one; no more is released than was reserved.
Not thread-safe: the loop's thread owns it.

What does not belong here: waiting, the memory itself, the queue depth.
"""

from __future__ import annotations

__all__ = ["Budget"]


class Budget:
    """A limit on bytes, and how many are reserved.

    Args:
        limit_bytes: the limit.
    """

    __slots__ = ("_held_bytes", "_limit_bytes")

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._held_bytes = 0

    @property
    def limit_bytes(self) -> int:
        """The limit."""
        return self._limit_bytes

    @property
    def held_bytes(self) -> int:
        """The bytes that are reserved now."""
        return self._held_bytes

    def fits(self, nbytes: int, *, beside: int | None = None) -> bool:
        """Return whether *nbytes* may be reserved.

        Args:
            nbytes: the size of the request.
            beside: the bytes that are reserved otherwise; by default, those reserved now.

        Returns:
            True if the sum stays within the limit, or nothing else is reserved.
        """
        others = self._held_bytes if beside is None else beside
        return others == 0 or others + nbytes <= self._limit_bytes

    def reserve(self, nbytes: int) -> None:
        """Reserve *nbytes*, whether they fit or not: that is the caller's decision.

        Raises:
            ValueError: *nbytes* is negative.
        """
        if nbytes < 0:
            raise ValueError(f"cannot reserve {nbytes} bytes")
        self._held_bytes += nbytes

    def release(self, nbytes: int) -> None:
        """Release *nbytes* that were reserved.

        Raises:
            ValueError: more would be released than is reserved.
        """
        if not 0 <= nbytes <= self._held_bytes:
            raise ValueError(f"cannot release {nbytes} of {self._held_bytes} held bytes")
        self._held_bytes -= nbytes
