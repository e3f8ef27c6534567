"""Processes that share directories, a bucket and one ``last.ckpt``; one of them is killed and restarted repeatedly.

Guarantees: what is killed dies at a random moment of its work, never at its end; each life has a service, or several,
of its own, which sweep what the lives before have left. Nothing is judged here (`sharing`).
"""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from random import Random
from typing import Any

import torch

from async_ckpt import CheckpointService, Handle
from async_ckpt.stores import locate
from stress.checker import Violation
from stress.children import Say, child
from stress.history import ABSENT
from stress.sharing import Kind, Word, check_shared
from stress.workload import digest, look

__all__ = ["Neighbourhood", "Onlooker", "Places"]

_FLOATS = (1000, 30_000, 300_000)
_LONGEST_LIFE_SECONDS = 0.8
_MOST_STEPS = 12
"""Of one service: the next one sweeps again."""
_TALLIED: dict[Kind, str] = {
    "save": "saves",
    "remove": "removals",
    "link": "links",
    "read": "loads",
    "done": "ended well",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """What is shared.

    Attributes:
        directories: on this disk.
        remote: URLs of directories elsewhere.
        storage_options: what those are reached with.
    """

    directories: Sequence[str]
    remote: Sequence[str] = ()
    storage_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def last(self) -> str:
        """The link that all set."""
        return f"{self.directories[0]}/last.ckpt"

    @property
    def common(self) -> list[str]:
        """The files that all save to and none removes."""
        return [f"{directory}/common.ckpt" for directory in self.directories]


class Neighbour:
    """What one process does: saves, links the newest, removes the one before, and loads, as a training does.

    Args:
        process: its name; in that of each of its files.
        places: where it works.
        say: what it tells of each request, before and after.
        random: its own.
        life: how often it has been killed.
    """

    def __init__(self, process: str, places: Places, say: Say, random: Random, *, life: int = 0) -> None:
        self._process = process
        self._places = places
        self._say = say
        self._random = random
        self._life = life
        self._numbers = count()
        self._newest: dict[str, str] = {}
        self._state = {"number": 0, "weights": [torch.zeros(0)], "view": torch.zeros(1)}

    def work(self, stop: Callable[[], bool]) -> None:
        """Go on until *stop*."""
        while not stop():
            with CheckpointService(
                queue_depth=3,
                max_concurrent_saves=2,
                part_size="64KiB",
                on_error="warn",  # each failure is said by its handle
                storage_options=self._places.storage_options,
            ) as service:
                for _ in range(self._random.randint(1, _MOST_STEPS)):
                    self._step(service)

    def _step(self, service: CheckpointService) -> None:
        places = [*self._places.directories, *self._places.remote]
        place = self._random.choice(places)
        path = f"{place}/{self._process}-{self._life}-{next(self._numbers)}.ckpt"
        self._save(service, path)
        if place in self._places.directories:
            self._link(service, path)
        if place in self._newest:
            self._remove(service, self._newest[place])
        self._newest[place] = path
        if self._random.random() < 0.3:
            self._save(service, self._random.choice(self._places.common))
        if self._random.random() < 0.3:
            self._load(service, self._random.choice([path, self._places.last, *self._places.common]))

    def _save(self, service: CheckpointService, path: str) -> None:
        self._state["number"] = number = self._random.getrandbits(60)
        self._state["weights"] = [torch.full((self._random.choice(_FLOATS),), float(number % 1000))]
        request = self._ask("save", path, digest(self._state))
        self._told(request, service.save(self._state, path))

    def _link(self, service: CheckpointService, path: str) -> None:
        request = self._ask("link", self._places.last, path)
        # As the plugin does it for ModelCheckpoint(save_last="link").
        self._told(request, service.submit_link(locate(self._places.last, follow=False), locate(path)))

    def _remove(self, service: CheckpointService, path: str) -> None:
        self._told(self._ask("remove", path), service.remove(path))

    def _load(self, service: CheckpointService, path: str) -> None:
        request = next(self._numbers)
        try:
            content = digest(service.load(path))
        except FileNotFoundError:
            content = ABSENT
        except Exception as error:
            self._tell(request, "failed", path, repr(error))
            return
        self._tell(request, "read", path, content)

    def _ask(self, kind: Kind, path: str, content: str = "") -> int:
        request = next(self._numbers)
        self._tell(request, kind, path, content)
        return request

    def _told(self, request: int, handle: Handle) -> None:
        handle.add_done_callback(lambda ended: self._tell_end(request, ended))

    def _tell_end(self, request: int, handle: Handle) -> None:
        try:
            handle.wait()
        except Exception as error:
            self._tell(request, "failed", handle.url, repr(error))
        else:
            self._tell(request, "done")

    def _tell(self, request: int, kind: Kind, path: str = "", content: str = "") -> None:
        self._say(
            Word(
                process=self._process,
                life=self._life,
                request=request,
                kind=kind,
                path=path,
                content=content,
            )
        )


class Theirs:
    """Another process, killed and started again until it is told to end.

    Args:
        places: where it works.
        random: decides when it is killed.

    Attributes:
        words: what it said in all its lives.
        lives: how many there were.
    """

    def __init__(self, places: Places, random: Random) -> None:
        self.words: list[Word] = []
        self.lives = 0
        self._places = places
        self._random = random

    def live(self, stop: threading.Event) -> None:
        """Have it work, and kill it, at least once."""
        while not (stop.is_set() and self.lives):
            seed = self._random.getrandbits(64)
            with child(_live, self._places, seed, self.lives) as process:
                self.words += process.words(seconds=self._random.uniform(0.0, _LONGEST_LIFE_SECONDS))
                self.words += process.kill()
            self.lives += 1


def _live(say: Say, places: Places, seed: int, life: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("async_ckpt").setLevel(logging.ERROR)
    Neighbour("theirs", places, say, Random(seed), life=life).work(lambda: False)


class Neighbourhood:
    """A process of this kind that is killed again and again, and one that is not, and is this one.

    Args:
        places: where both work.
        random: decides everything but the timing.
    """

    def __init__(self, places: Places, random: Random) -> None:
        self._places = places
        self._words: list[Word] = []
        self._onlooker = Onlooker(places)
        self._ours = Neighbour("ours", places, self._words.append, Random(random.getrandbits(64)))
        self._theirs = Theirs(places, Random(random.getrandbits(64)))

    def programs(self, stop: threading.Event) -> list[Callable[[], object]]:
        """Return what is to run at the same time, until *stop*."""
        return [
            lambda: self._ours.work(stop.is_set),
            lambda: self._theirs.live(stop),
            lambda: self._onlooker.look_on(stop),
        ]

    def wrong(self, look_away: Callable[[str], str]) -> list[Violation]:
        """Return the violations once all processes have ended, and sweep what is left.

        Args:
            look_away: tells what is at a URL.
        """
        words = [*self._words, *self._theirs.words]
        paths = {word.path for word in words if word.kind in ("save", "link", "remove")}
        remote = tuple(self._places.remote)
        final = {
            path: look_away(path) if remote and path.startswith(remote) else look(path) for path in paths
        }
        with CheckpointService(storage_options=self._places.storage_options) as service:
            for place in (*self._places.directories, *remote):
                service.save({}, f"{place}/next.ckpt")
        return check_shared(words, seen=self._onlooker.seen, final=final)

    def count(self, tally: Counter[str]) -> None:
        """Add what was done, and how often a process was killed."""
        tally["processes killed"] += self._theirs.lives
        for word in (*self._words, *self._theirs.words):
            tally[f"{word.process}: {_TALLIED.get(word.kind, word.kind)}"] += 1


class Onlooker:
    """Looks, without a service, at files that never disappear once they exist.

    Args:
        places: where.

    Attributes:
        seen: the path and content that were found.
    """

    def __init__(self, places: Places) -> None:
        self.seen: set[tuple[str, str]] = set()
        self._paths = (places.last, *places.common)
        self._known: set[str] = set()

    def look_on(self, stop: threading.Event) -> None:
        """Look again and again."""
        while not stop.is_set():
            self.look()

    def look(self) -> None:
        """Look once at each."""
        for path in self._paths:
            content = _look(path)
            if content != ABSENT:
                self._known.add(path)
            elif path in self._known:
                content = "nothing, though it had been there"
            self.seen.add((path, content))


def _look(path: str) -> str:
    """Return what is there; nothing only where a link leads to nothing, and not elsewhere by now."""
    while True:
        leads_to = _leads_to(path)
        content = look(path)
        if content != ABSENT or _leads_to(path) == leads_to:
            return content


def _leads_to(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
