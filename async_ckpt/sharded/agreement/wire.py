"""Sends and receives messages through a ``torch.distributed`` store.

Guarantees: no call waits for another rank; it only takes the round trips for the messages that are there. Messages of
one rank arrive in the order in which they were sent. A rank that dies between two requests delays no other. The keys of
a save are deleted when it is over, except for the verdicts of the last few saves that a living rank may not know yet.
Keys of other programs are left alone, and no collective operation is used.

What does not belong here: what the messages mean (protocol), and when to poll (store_thread). Only one thread may call
it at a time, and that thread must be allowed to hang, because a host that hangs does not answer.

The keys:

* ``up/{n}``: the n-th message to the coordinator; the counter ``up`` numbers them.
* ``{save}/{n}``: the coordinator's n-th message about a save; ``{save}/go/{rank}``: the work of one rank.
* ``{save}/claim``: the claim that holds; ``{save}/end``: the verdict, for ranks that are late.
* ``kept/{n}``: keys that the last rank to leave deletes; the counter ``left`` counts those that have left.
"""

from __future__ import annotations

import copy
import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

from async_ckpt.sharded.agreement.messages import (
    Ack,
    FromCoordinator,
    GaveUp,
    Go,
    ToCoordinator,
    Verdict,
    decode,
    decode_failures,
    encode,
    encode_failures,
)
from async_ckpt.sharded.agreement.protocol import COMMIT, COORDINATOR, ClaimHolder

__all__ = ["Wire"]

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 4 << 20  # TCPStore refuses values over 8 MiB, and drops the connection
_POLLS_PER_SEARCH = 10
"""Every so many polls, look for rare cases too: a missing message, the verdict of a save that ended long ago."""
_MOST_SEARCHES = 100
_MOST_VERDICTS = 16
_WHOLE, _CHUNKED = b"w", b"c"
_ABSENT = "absent"  # never the beginning of a value


class Wire:
    """One rank's access to the store.

    Args:
        connect: makes a connection to the store; one of our own, if torch supports that.
        rank: the rank of this process.
        world_size: the number of ranks.

    Attributes:
        has_connected: whether there was ever a connection.
    """

    def __init__(self, connect: Callable[[], Any], *, rank: int, world_size: int) -> None:
        self.has_connected = False
        self._connect = connect
        self._connection: Any = None
        self._rank = rank
        self._world_size = world_size
        self._polls = 0
        self._has_left = False
        # Only on the coordinator:
        self._next_up = 1
        self._gaps: dict[int, int] = {}  # numbers of missing messages: how often each was looked for
        self._sent_counts: dict[int, int] = {}  # by save: how many messages were sent
        self._sent_keys: dict[int, list[str]] = {}  # by save: the keys that were set
        self._verdicts: OrderedDict[int, set[int]] = OrderedDict()  # by save: the ranks that do not know it
        # Only on the other ranks, by save: how many messages were read.
        self._read_counts: dict[int, int] = {}

    @property
    def is_used(self) -> bool:
        """Whether it has connected to the store."""
        return self._connection is not None

    def disconnect(self) -> None:
        """Drop the connection; the next call makes a new one."""
        self._connection = None

    def reconnected(self) -> Wire:
        """Return a copy that continues where this one is, with a new connection."""
        other = copy.copy(self)
        for name in ("_gaps", "_sent_counts", "_sent_keys", "_verdicts", "_read_counts"):
            setattr(other, name, copy.deepcopy(getattr(self, name)))
        other.disconnect()
        return other

    # -- every rank

    def send(self, number: int, message: ToCoordinator) -> None:
        """Send *message*, about save *number*, to the coordinator."""
        data = encode(number, message)
        place = self._store.add("up", 1)
        self._put(f"up/{place}", data)

    def claim(self, number: int, claim: str | Mapping[int, str]) -> ClaimHolder:
        """Claim the decision on a save; return the claim that holds."""
        if claim != COMMIT:  # the coordinator, which would delete the key, may have ended
            self._keep([f"{number}/claim"])
        wanted = claim if isinstance(claim, str) else encode_failures(claim)
        holder = bytes(self._store.compare_set(f"{number}/claim", "", wanted)).decode()
        return COMMIT if holder == COMMIT else decode_failures(holder)

    def poll(self, numbers: Iterable[int]) -> list[tuple[int, FromCoordinator]]:
        """Return the coordinator's new messages about saves *numbers*."""
        self._polls += 1
        found: list[tuple[int, FromCoordinator]] = []
        for number in numbers:
            place = self._read_counts.get(number, 0)
            while (data := self._get(f"{number}/{place}")) is not None:
                place += 1
                found.append((number, self._decoded(number, data)))
            is_new = number not in self._read_counts
            self._read_counts[number] = place
            if is_new or self._polls % _POLLS_PER_SEARCH == 0:
                data = self._get(f"{number}/end")
                if data is not None:
                    found.append((number, self._decoded(number, data)))
        return found

    def forget(self, number: int) -> None:
        """Forget the state of a save that has ended on this rank."""
        self._read_counts.pop(number, None)

    def leave(self) -> None:
        """Take part in no more saves; the last rank to leave deletes the remaining keys."""
        self._has_left = True
        if self._rank == COORDINATOR:
            self._keep([f"{number}/end" for number in self._verdicts])
        if self._store.add("left", 1) >= self._world_size:
            unread = range(self._next_up, self._store.add("up", 0) + 1)
            kept = range(1, self._store.add("kept", 0) + 1)
            remaining = [key for place in kept for key in json.loads(self._get(f"kept/{place}") or b"[]")]
            remaining += [f"up/{place}" for place in unread] + [f"kept/{place}" for place in kept]
            self._delete([*remaining, "up", "kept", "left"])

    def _keep(self, keys: list[str]) -> None:
        """Let the last rank that leaves delete *keys*."""
        if keys:
            place = self._store.add("kept", 1)
            self._put(f"kept/{place}", json.dumps(keys).encode())

    # -- the coordinator

    def collect(self) -> list[tuple[int, ToCoordinator]]:
        """Return the new messages of the other ranks."""
        if self._has_left:
            return []
        self._polls += 1
        last = self._next_up - 1
        if self._store.check([f"up/{self._next_up}"]) or self._polls % _POLLS_PER_SEARCH == 0:
            last = self._store.add("up", 0)
        places = [*self._gaps, *range(self._next_up, last + 1)]
        found: list[tuple[int, ToCoordinator]] = []
        for place in places:
            data = self._get(f"up/{place}")
            if data is None:  # its number is taken, but its rank has not sent it yet, or has ended
                self._gaps[place] = self._gaps.get(place, 0) + 1
                if self._gaps[place] > _MOST_SEARCHES * _POLLS_PER_SEARCH:
                    del self._gaps[place]
                continue
            self._gaps.pop(place, None)
            with suppress(ValueError):
                number, message = decode(data)
                found.append((number, message))  # type: ignore[arg-type]  # nobody else writes there
                self._note_acknowledged(number, message)
            self._delete([f"up/{place}", *_piece_keys(f"up/{place}", len(data))])
        self._next_up = max(self._next_up, last + 1)
        return found

    def broadcast(self, number: int, message: FromCoordinator) -> None:
        """Send *message*, about save *number*, to every other rank."""
        place = self._sent_counts.get(number, 0)
        self._sent_keys.setdefault(number, []).extend(self._put(f"{number}/{place}", encode(number, message)))
        self._sent_counts[number] = place + 1

    def scatter(self, number: int, messages: Mapping[int, Go]) -> None:
        """Send each rank its own work."""
        for rank, message in messages.items():
            if message.work is not None and rank != self._rank:
                self._sent_keys.setdefault(number, []).extend(self._put(f"{number}/go/{rank}", message.work))
        self.broadcast(number, Go(None, *_common(messages)))

    def clean_up(self, number: int, verdict: Verdict, unacknowledged: Iterable[int]) -> None:
        """Delete the messages about a save; leave the verdict for the ranks that have not acknowledged it."""
        remaining = set(unacknowledged) - {self._rank}
        if remaining:
            self._put(f"{number}/end", encode(number, verdict))
            self._verdicts[number] = remaining
            while len(self._verdicts) > _MOST_VERDICTS:
                self._delete_verdict(next(iter(self._verdicts)))
        self._sent_counts.pop(number, None)
        self._delete([*self._sent_keys.pop(number, []), f"{number}/claim"])

    def _note_acknowledged(self, number: int, message: Any) -> None:
        remaining = self._verdicts.get(number)
        if remaining is not None and isinstance(message, (Ack, GaveUp)):
            remaining.discard(message.rank)
            if not remaining:
                self._delete_verdict(number)

    def _delete_verdict(self, number: int) -> None:
        self._verdicts.pop(number, None)
        self._delete([f"{number}/end"])

    # -- keys and values

    @property
    def _store(self) -> Any:
        if self._connection is None:
            self._connection = self._connect()
            self.has_connected = True
        return self._connection

    def _decoded(self, number: int, data: bytes) -> FromCoordinator:
        message: Any = decode(data)[1]
        if isinstance(message, Go):
            work = self._get(f"{number}/go/{self._rank}")
            if work is not None:
                message = Go(work, message.planned, message.save_id)
        return message  # type: ignore[no-any-return]

    def _put(self, key: str, data: bytes) -> list[str]:
        """Set *key*, in several pieces if *data* is too large for one; return all keys that were set."""
        pieces = _piece_keys(key, len(data))
        for index, piece in enumerate(pieces):
            self._store.set(piece, data[index * _CHUNK_BYTES : (index + 1) * _CHUNK_BYTES])
        self._store.set(key, _CHUNKED + str(len(pieces)).encode() if pieces else _WHOLE + data)
        return [key, *pieces]

    def _get(self, key: str) -> bytes | None:
        """Return the value of *key*, or ``None``, without waiting.

        The store's own ``get`` waits for a missing key, for minutes if it is deleted between ``check`` and ``get``.
        """
        data = self._get_piece(key)
        if data is None or data[:1] == _WHOLE:
            return None if data is None else data[1:]
        pieces = [self._get_piece(f"{key}/{index}") for index in range(int(data[1:]))]
        return None if None in pieces else b"".join(filter(None, pieces))

    def _get_piece(self, key: str) -> bytes | None:
        found = bytes(
            self._store.compare_set(key, _ABSENT, _ABSENT)
        )  # changes nothing: no key has that value
        return None if found == _ABSENT.encode() else found

    def _delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._store.delete_key(key)


def _piece_keys(key: str, nbytes: int) -> list[str]:
    """Return the keys for the pieces of a value; none if it fits into one."""
    if nbytes <= _CHUNK_BYTES:
        return []
    return [f"{key}/{index}" for index in range(-(-nbytes // _CHUNK_BYTES))]


def _common(messages: Mapping[int, Go]) -> tuple[int, str]:
    """Return the values that all of *messages* have in common."""
    one = next(iter(messages.values()))
    return one.planned, one.save_id
