"""What is asked: threads that save, remove, load and wait over a few paths, and one that only looks.

Guarantees: all choices come from the seed; only the threads' timing does not. What each call came to
is in the history; nothing is judged here.
"""

from __future__ import annotations

import hashlib
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch

from async_ckpt import BackPressureError, CheckpointService, Handle
from async_ckpt.handle import State
from stress.history import ABSENT, History, Operation, Outcome
from stress.nemesis import INJECTED

__all__ = ["Worker", "digest", "look", "look_on", "run_together"]

_SMALL_FLOATS = (7, 1000, 3000)
_MEDIUM_FLOATS = (100_000, 300_000)
_MANY = 300
"""Removals that come one right after the other."""
_OUTCOMES: dict[State, Outcome] = {
    State.DURABLE: "durable",
    State.REMOVED: "removed",
    State.FAILED: "failed",
    State.SUPERSEDED: "superseded",
    State.CANCELLED: "cancelled",
    State.DROPPED: "dropped",
}


class Worker:
    """One thread's program.

    Args:
        service: shared by all workers.
        paths: shared by all workers.
        directories: some of the paths lie in them; they are removed as a whole.
        spellings: of some paths, another that leads there, maybe through a link.
        history: what it tells.
        random: its own.
    """

    def __init__(
        self,
        service: CheckpointService,
        paths: Sequence[str],
        history: History,
        random: Random,
        *,
        directories: Sequence[str] = (),
        spellings: Mapping[str, str] | None = None,
    ) -> None:
        self._service = service
        self._paths = paths
        self._directories = directories
        self._spellings = spellings or {}
        self._history = history
        self._random = random
        self._handles: list[tuple[Operation, Handle]] = []
        self._states = [self._state(_SMALL_FLOATS), self._state(_MEDIUM_FLOATS)]

    def run(self, calls: int) -> None:
        """Make so many calls."""
        steps = (self._save, self._remove, self._load, self._wait, self._remove_directory, self._remove_many)
        for step in self._random.choices(steps, weights=(550, 150, 200, 100, 20, 3), k=calls):
            step(self._random.choice(self._paths))

    def settle(self) -> None:
        """Note what every handle came to; after the service was closed."""
        for operation, handle in self._handles:
            operation.outcome = _OUTCOMES[handle.state]

    def _state(self, floats: Sequence[int]) -> dict[str, Any]:
        weights = [torch.zeros(length) for length in floats]
        return {"number": 0, "weights": weights, "view": weights[0][2:]}

    def _save(self, path: str) -> None:
        state = self._states[self._random.random() < 0.3]
        state["number"] = number = self._random.getrandbits(60)
        state["weights"][0].fill_(number % 1000)
        operation = self._history.call("save", path, digest(state))
        spelling = self._spelling(path)
        self._submit(operation, lambda: self._service.save(state, spelling))
        for weight in state["weights"]:
            weight.add_(1.0)  # S1: from here on the state is ours again

    def _remove(self, path: str) -> None:
        operation = self._history.call("remove", path)
        self._submit(operation, lambda: self._service.remove(path))

    def _remove_directory(self, path: str) -> None:
        if self._directories:
            self._remove(self._random.choice(self._directories))

    def _remove_many(self, path: str) -> None:
        for number in range(_MANY):
            self._remove(f"{path}.old/{number}")

    def _spelling(self, path: str) -> str:
        return self._spellings.get(path, path) if self._random.random() < 0.3 else path

    def _submit(self, operation: Operation, call: Callable[[], Handle]) -> None:
        try:
            handle = call()
            self._handles.append((operation, handle))
            handle.add_done_callback(lambda _: setattr(operation, "ended", self._history.now()))
        except BackPressureError:
            operation.outcome = "refused"
        except Exception as error:
            self._history.tell(error)
        finally:
            operation.returned = self._history.now()

    def _load(self, path: str) -> None:
        operation = self._history.call("load", path)
        try:
            operation.content = digest(self._service.load(self._spelling(path)))
            operation.outcome = "read"
        except FileNotFoundError:
            operation.content, operation.outcome = ABSENT, "read"
        except Exception as error:
            operation.outcome = "refused"
            if self._history.is_known(error) or INJECTED not in str(error):
                self._history.tell(error)
        finally:
            operation.returned = self._history.now()

    def _wait(self, _: str) -> None:
        if not self._handles:
            return
        handle = self._handles[-1][1]
        try:
            handle.wait()
        except Exception as error:
            if handle.state is State.FAILED:
                self._history.tell(error, by_handle=True)


def digest(state: dict[str, Any]) -> str:
    """Return a digest of everything in a state."""
    sha = hashlib.sha256(struct.pack("q", state["number"]))
    for tensor in (*state["weights"], state["view"]):
        sha.update(tensor.numpy())
    return sha.hexdigest()


def look(path: str) -> str:
    """Return the digest of what plain ``torch.load`` finds at a local path."""
    try:
        with Path(path).open("rb") as file:
            return digest(torch.load(file, weights_only=True))
    except FileNotFoundError:
        return ABSENT
    except Exception as error:  # torn, whatever it is that torch says of it
        return f"{type(error).__name__}: {error}"


def look_on(paths: Sequence[str], history: History, stop: threading.Event) -> None:
    """Look at files without the service, again and again."""
    while not stop.is_set():
        for path in paths:
            history.seen.add((path, look(path)))


def run_together(programs: Sequence[Callable[[], object]]) -> list[BaseException]:
    """Run each in a thread of its own; return what they raised."""
    raised: list[BaseException] = []

    def contained(program: Callable[[], object]) -> None:
        try:
            program()
        except BaseException as error:
            raised.append(error)

    threads = [
        threading.Thread(target=contained, args=(program,), name=f"worker-{number}")
        for number, program in enumerate(programs)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised
