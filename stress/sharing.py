"""Checks what several processes did in directories that they share. Pure.

No storage fails here, and each process saves under names of its own, but for some that all of them save to and none
removes. So:

* **D1**: what one was told to be durable is there, unless it asked for something else at that name later, or another
  process did; and what was removed is not.
* **D2**: what is there, or is read, is whole, and was saved there by one of them; what a link leads to, anywhere.
  Who has saved finds something until it removes that. No request fails because of the others.
* **O2**: who loads finds no earlier state of its own than the one that it saved last.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from stress.checker import Violation
from stress.history import ABSENT

__all__ = ["Kind", "Word", "check_shared"]

Kind: TypeAlias = Literal["save", "remove", "link", "read", "done", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """What a process says before it asks for something, and of what came of it.

    Attributes:
        process: which one, or one that follows it.
        life: how often it has been killed.
        request: its own number, in this life.
        kind: what it asks for, or has read; ``done`` and ``failed`` end the request of that name.
        path: where.
        content: the digest of what is saved or was read, what is linked to, or the error.
    """

    process: str
    request: int
    kind: Kind
    life: int = 0
    path: str = ""
    content: str = ""

    def __str__(self) -> str:
        return f"{self.process:6} {self.life}.{self.request:<4} {self.kind:6} {self.path} {self.content[:90]}".rstrip()


def check_shared(
    words: Sequence[Word], *, seen: Collection[tuple[str, str]], final: Mapping[str, str]
) -> list[Violation]:
    """Return every violation.

    Args:
        words: of all processes; those of one are in their order.
        seen: the path and content that others than the processes found meanwhile.
        final: what is at each path once all have ended, or been killed.
    """
    found = [
        Violation(promise="D2", what=f"failed because of others: {word}")
        for word in words
        if word.kind == "failed"
    ]
    found += _unknown(words, {*seen, *final.items()})
    for said in _by(words, lambda word: (word.process, word.life)):
        found += _reads(said)
    for path, content in final.items():
        found += _end(path, content, [word for word in words if word.path == path], _done(words))
    return found


def _by(words: Sequence[Word], key: Callable[[Word], object]) -> Collection[Sequence[Word]]:
    groups: dict[object, list[Word]] = {}
    for word in words:
        groups.setdefault(key(word), []).append(word)
    return groups.values()


def _done(words: Sequence[Word]) -> Collection[tuple[str, int, int]]:
    return {(word.process, word.life, word.request) for word in words if word.kind == "done"}


def _unknown(words: Sequence[Word], seen: Collection[tuple[str, str]]) -> Iterator[Violation]:
    links = {word.path for word in words if word.kind == "link"}
    saved = {(word.path, word.content) for word in words if word.kind == "save"}
    anywhere = {content for _, content in saved}
    read = {(word.path, word.content) for word in words if word.kind == "read"}
    for path, content in read | set(seen):
        if content != ABSENT and not (content in anywhere if path in links else (path, content) in saved):
            yield Violation(promise="D2", what=f"{path} held what was never saved there: {content}")


def _reads(said: Sequence[Word]) -> Iterator[Violation]:
    """Hold what one process read in one life against what it had asked for until then."""
    there: dict[str, Word] = {}
    earlier: set[tuple[str, str]] = set()
    for word in said:
        if word.kind in ("save", "link"):
            if word.path in there:
                earlier.add((word.path, there[word.path].content))
            there[word.path] = word
        elif word.kind == "remove":
            there.pop(word.path, None)
        elif word.kind == "read" and word.path in there:
            if word.content == ABSENT:
                yield Violation(promise="D2", what="nothing was read", around=[there[word.path], word])
            elif (word.path, word.content) in earlier:
                yield Violation(
                    promise="O2", what="an earlier state was read", around=[there[word.path], word]
                )


def _end(
    path: str, content: str, at_path: Sequence[Word], done: Collection[tuple[str, int, int]]
) -> Iterator[Violation]:
    """Hold what is at *path* in the end against what each process, in its order, did there."""
    asked = [word for word in at_path if word.kind in ("save", "remove")]
    if not asked:
        return  # a link to one of many: it is known that it leads to something whole
    possible = set()
    is_settled = False
    for said in _by(asked, lambda word: word.process):
        settled = [
            index for index, word in enumerate(said) if (word.process, word.life, word.request) in done
        ]
        is_settled |= bool(settled)
        for word in said[settled[-1] if settled else 0 :]:
            possible.add(ABSENT if word.kind == "remove" else word.content)
    if not is_settled:
        possible.add(ABSENT)
    if content not in possible:
        what = f"at {path} is {content[:8]}, of {sorted(each[:8] for each in possible)}"
        yield Violation(promise="D1", what=what, around=at_path[-12:])
