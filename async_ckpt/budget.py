"""The host bytes that snapshots may hold, counted (B1).

Guarantees: never are more than the limit reserved, except by one request alone that is larger than
the limit itself; what is released was reserved. Not thread-safe: one thread, the loop's, owns it.

What does not belong here: waiting, memory itself, queue places.
"""

from __future__ import annotations

__all__ = ["Budget"]


class Budget:
    """A limit on bytes, and how many of them are taken.

    Args:
        limit_bytes: the most that may be held; ``None`` for no limit.
    """

    __slots__ = ("_held_bytes", "_limit_bytes")

    def __init__(self, limit_bytes: int | None) -> None:
        self._limit_bytes = limit_bytes
        self._held_bytes = 0

    @property
    def limit_bytes(self) -> int | None:
        """The most that may be held, ``None`` for no limit."""
        return self._limit_bytes

    @property
    def held_bytes(self) -> int:
        """What is reserved now."""
        return self._held_bytes

    def fits(self, nbytes: int, *, beside: int | None = None) -> bool:
        """Tell whether *nbytes* could be reserved.

        Args:
            nbytes: the size of the request.
            beside: the bytes held by others that it must fit beside; what is held now by default.

        Returns:
            True where the sum stays within the limit, or nothing else is held.
        """
        others = self._held_bytes if beside is None else beside
        return self._limit_bytes is None or others == 0 or others + nbytes <= self._limit_bytes

    def try_reserve(self, nbytes: int) -> bool:
        """Reserve *nbytes* if they fit.

        Args:
            nbytes: how many bytes, not negative.

        Returns:
            Whether they were reserved.

        Raises:
            ValueError: *nbytes* is negative.
        """
        if nbytes < 0:
            raise ValueError(f"cannot reserve {nbytes} bytes")
        if not self.fits(nbytes):
            return False
        self._held_bytes += nbytes
        return True

    def force_reserve(self, nbytes: int) -> None:
        """Reserve *nbytes* whether they fit or not, for a caller that must not wait.

        Args:
            nbytes: how many bytes, not negative.

        Raises:
            ValueError: *nbytes* is negative.
        """
        if nbytes < 0:
            raise ValueError(f"cannot reserve {nbytes} bytes")
        self._held_bytes += nbytes

    def release(self, nbytes: int) -> None:
        """Give back *nbytes* that were reserved.

        Args:
            nbytes: how many bytes, not negative.

        Raises:
            ValueError: more would be given back than is held.
        """
        if not 0 <= nbytes <= self._held_bytes:
            raise ValueError(f"cannot release {nbytes} of {self._held_bytes} held bytes")
        self._held_bytes -= nbytes
