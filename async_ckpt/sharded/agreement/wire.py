"""How messages travel through a torch.distributed Store.

Guarantees: no call waits for another rank; a call takes the round trips for the messages that are there. Messages of
one rank arrive in the order in which they were sent. A rank that dies between two requests delays nobody. The keys of a
save are deleted when it is over, except for the verdicts of the last few saves that a living rank may not know yet. No
foreign keys are touched, and no collective operations of a process group are used.

What does not belong here: what the messages mean (protocol), and when to poll (rendezvous). Do not use it from two
threads at a time, nor from a thread whose waiting must be bounded: a host that hangs does not answer.

The keys: ``up/{n}`` is the n-th message to the coordinator, numbered by the counter ``up``. ``{save}/{n}`` is the n-th
message of the coordinator about a save, ``{save}/go/{rank}`` the work of one rank, ``{save}/claim`` the claim to the
decision, ``{save}/end`` the verdict for a rank that is late. The last rank to leave deletes the keys that the entries
``kept/{n}`` list.
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
_LOOKS_PER_SEARCH = 10
"""Every so many looks, the rarer things are looked for: a gap in the log, the end of a save that was long over."""
_SEARCHES_FOR_LOST = 100
_ENDS = 16
_WHOLE, _CHUNKED = b"w", b"c"
_ABSENT = "absent"  # of no value: those begin otherwise


class Wire:
    """One rank's end of it.

    Args:
        connect: makes a connection to the store, of our own where torch can make one.
        rank: of this process.
        world_size: how many there are.

    Attributes:
        has_connected: whether there was ever a connection.
    """

    def __init__(self, connect: Callable[[], Any], *, rank: int, world_size: int) -> None:
        self.has_connected = False
        self._connect = connect
        self._connection: Any = None
        self._rank = rank
        self._world_size = world_size
        self._looks = 0
        self._has_left = False
        # of the coordinator:
        self._next_up = 1
        self._gaps: dict[int, int] = {}  # messages that are announced and not there, and how often looked for
        self._told: dict[int, int] = {}  # messages of a save so far
        self._said: dict[int, list[str]] = {}  # keys of a save
        self._ends: OrderedDict[int, set[int]] = OrderedDict()  # ranks that do not know of a save's end
        # of the others:
        self._heard: dict[int, int] = {}

    @property
    def is_used(self) -> bool:
        """Whether anything was ever sent or looked for."""
        return self._connection is not None

    def disconnect(self) -> None:
        """Connect anew when next used."""
        self._connection = None

    def anew(self) -> Wire:
        """Return one that goes on where this one is, with a connection of its own."""
        other = copy.copy(self)
        for name in ("_gaps", "_told", "_said", "_ends", "_heard"):
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
        """Claim the decision on a save, and return who holds it."""
        if claim != COMMIT:  # maybe nobody will be left to clean up
            self._keep([f"{number}/claim"])
        wanted = claim if isinstance(claim, str) else encode_failures(claim)
        holder = bytes(self._store.compare_set(f"{number}/claim", "", wanted)).decode()
        return COMMIT if holder == COMMIT else decode_failures(holder)

    def poll(self, numbers: Iterable[int]) -> list[tuple[int, FromCoordinator]]:
        """Return what the coordinator has said since about saves *numbers*."""
        self._looks += 1
        found: list[tuple[int, FromCoordinator]] = []
        for number in numbers:
            place = self._heard.get(number, 0)
            while (data := self._take(f"{number}/{place}")) is not None:
                place += 1
                found.append((number, self._understood(number, data)))
            is_new = number not in self._heard
            self._heard[number] = place
            if is_new or self._looks % _LOOKS_PER_SEARCH == 0:
                data = self._take(f"{number}/end")
                if data is not None:
                    found.append((number, self._understood(number, data)))
        return found

    def forget(self, number: int) -> None:
        """Listen no more to a save."""
        self._heard.pop(number, None)

    def leave(self) -> None:
        """Take no more part; the last rank to leave takes away what is left."""
        self._has_left = True
        if self._rank == COORDINATOR:
            self._keep([f"{number}/end" for number in self._ends])
        if self._store.add("left", 1) >= self._world_size:
            unread = range(self._next_up, self._store.add("up", 0) + 1)
            kept = range(1, self._store.add("kept", 0) + 1)
            left = [key for place in kept for key in json.loads(self._take(f"kept/{place}") or b"[]")]
            left += [f"up/{place}" for place in unread] + [f"kept/{place}" for place in kept]
            self._delete([*left, "up", "kept", "left"])

    def _keep(self, keys: list[str]) -> None:
        """Have *keys* deleted when the last rank leaves."""
        if keys:
            place = self._store.add("kept", 1)
            self._put(f"kept/{place}", json.dumps(keys).encode())

    # -- the coordinator

    def collect(self) -> list[tuple[int, ToCoordinator]]:
        """Return what ranks have said since."""
        if self._has_left:
            return []
        self._looks += 1
        last = self._next_up - 1
        if self._store.check([f"up/{self._next_up}"]) or self._looks % _LOOKS_PER_SEARCH == 0:
            last = self._store.add("up", 0)
        places = [*self._gaps, *range(self._next_up, last + 1)]
        found: list[tuple[int, ToCoordinator]] = []
        for place in places:
            data = self._take(f"up/{place}")
            if data is None:  # announced, and on its way; or its rank has ended
                self._gaps[place] = self._gaps.get(place, 0) + 1
                if self._gaps[place] > _SEARCHES_FOR_LOST * _LOOKS_PER_SEARCH:
                    del self._gaps[place]
                continue
            self._gaps.pop(place, None)
            with suppress(ValueError):
                number, message = decode(data)
                found.append((number, message))  # type: ignore[arg-type]  # nobody else writes there
                self._note_heard(number, message)
            self._delete([f"up/{place}", *_chunk_keys(f"up/{place}", len(data))])
        self._next_up = max(self._next_up, last + 1)
        return found

    def broadcast(self, number: int, message: FromCoordinator) -> None:
        """Send *message*, about save *number*, to every other rank."""
        place = self._told.get(number, 0)
        self._said.setdefault(number, []).extend(self._put(f"{number}/{place}", encode(number, message)))
        self._told[number] = place + 1

    def scatter(self, number: int, messages: Mapping[int, Go]) -> None:
        """Send each rank its own work."""
        for rank, message in messages.items():
            if message.work is not None and rank != self._rank:
                self._said.setdefault(number, []).extend(self._put(f"{number}/go/{rank}", message.work))
        self.broadcast(number, Go(None, *_common(messages)))

    def clean_up(self, number: int, verdict: Verdict, unheard: Iterable[int]) -> None:
        """Delete what was said of a save; leave its end for those who have not heard of it."""
        left = set(unheard) - {self._rank}
        if left:
            self._put(f"{number}/end", encode(number, verdict))
            self._ends[number] = left
            while len(self._ends) > _ENDS:
                self._drop_end(next(iter(self._ends)))
        self._told.pop(number, None)
        self._delete([*self._said.pop(number, []), f"{number}/claim"])

    def _note_heard(self, number: int, message: Any) -> None:
        left = self._ends.get(number)
        if left is not None and isinstance(message, (Ack, GaveUp)):
            left.discard(message.rank)
            if not left:
                self._drop_end(number)

    def _drop_end(self, number: int) -> None:
        self._ends.pop(number, None)
        self._delete([f"{number}/end"])

    # -- keys and values

    @property
    def _store(self) -> Any:
        if self._connection is None:
            self._connection = self._connect()
            self.has_connected = True
        return self._connection

    def _understood(self, number: int, data: bytes) -> FromCoordinator:
        message: Any = decode(data)[1]
        if isinstance(message, Go):
            work = self._take(f"{number}/go/{self._rank}")
            if work is not None:
                message = Go(work, message.planned, message.save_id)
        return message  # type: ignore[no-any-return]

    def _put(self, key: str, data: bytes) -> list[str]:
        """Set *key*, and return it and all others that were set for it."""
        pieces = _chunk_keys(key, len(data))
        for index, piece in enumerate(pieces):
            self._store.set(piece, data[index * _CHUNK_BYTES : (index + 1) * _CHUNK_BYTES])
        self._store.set(key, _CHUNKED + str(len(pieces)).encode() if pieces else _WHOLE + data)
        return [key, *pieces]

    def _take(self, key: str) -> bytes | None:
        """Return what is under *key*, if anything, in one step.

        The store's own ``get`` would wait for it, for minutes, where it is taken away just after one has looked.
        """
        data = self._value(key)
        if data is None or data[:1] == _WHOLE:
            return None if data is None else data[1:]
        pieces = [self._value(f"{key}/{index}") for index in range(int(data[1:]))]
        return None if None in pieces else b"".join(filter(None, pieces))

    def _value(self, key: str) -> bytes | None:
        found = bytes(self._store.compare_set(key, _ABSENT, _ABSENT))  # changes nothing: nobody sets that
        return None if found == _ABSENT.encode() else found

    def _delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._store.delete_key(key)


def _chunk_keys(key: str, nbytes: int) -> list[str]:
    """Return the names of the pieces of a value that is too large for one; none if it is not."""
    if nbytes <= _CHUNK_BYTES:
        return []
    return [f"{key}/{index}" for index in range(-(-nbytes // _CHUNK_BYTES))]


def _common(messages: Mapping[int, Go]) -> tuple[int, str]:
    """Return what is the same in all of them."""
    one = next(iter(messages.values()))
    return one.planned, one.save_id
