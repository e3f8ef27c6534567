"""CheckpointIOs that write nowhere, in place of Lightning's."""

from __future__ import annotations

import threading
from typing import Any

WAIT_SECONDS = 20.0


class Base:
    """A CheckpointIO that writes nowhere and remembers how it was called."""

    flavour = "vanilla"

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.saved: dict[str, Any] = {}
        self.teardowns = 0

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None, **extra: Any) -> None:
        self.calls.append(("save", (path, storage_options, extra)))
        self.saved[str(path)] = checkpoint

    def load_checkpoint(self, path: Any, map_location: Any = None, **extra: Any) -> Any:
        self.calls.append(("load", (path, map_location, extra)))
        return self.saved[str(path)]

    def remove_checkpoint(self, path: Any) -> None:
        self.calls.append(("remove", path))
        self.saved.pop(str(path), None)

    def teardown(self) -> None:
        self.teardowns += 1


class TorchCheckpointIO(Base):
    """Named like the ordinary base that a strategy offers."""


class Blocked(Base):
    """A base whose saves wait until ``go`` is set; tells how many run at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Event()
        self.go = threading.Event()
        self.running = 0
        self.most_at_a_time = 0

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None, **extra: Any) -> None:
        self.running += 1
        self.most_at_a_time = max(self.most_at_a_time, self.running)
        self.entered.set()
        assert self.go.wait(WAIT_SECONDS)
        super().save_checkpoint(checkpoint, path, storage_options, **extra)
        self.running -= 1


class Broken(Base):
    """A base whose saves to a path with ``bad`` in it fail."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None, **extra: Any) -> None:
        if "bad" in str(path):
            raise KeyError(f"the base broke on {path}")
        super().save_checkpoint(checkpoint, path, storage_options, **extra)


class OddNames(Base):
    """A base with its own names for everything."""

    def save_checkpoint(self, state: Any, target: Any, *, verbose: bool = False) -> None:  # type: ignore[override]
        self.saved[str(target)] = (state, verbose)

    def load_checkpoint(self, target: Any) -> Any:  # type: ignore[override]
        return self.saved[str(target)][0]

    def remove_checkpoint(self, target: Any) -> None:
        del self.saved[str(target)]
