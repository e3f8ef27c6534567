"""The stress checker: that it lets right histories pass, and finds each kind of wrong one."""

from __future__ import annotations

from typing import Any

import pytest

from async_ckpt.events import Accepted, Durable, Failed
from stress.checker import check
from stress.history import ABSENT, History, Kind, Outcome
from stress.nemesis import INJECTED


def history_of(*calls: tuple[Any, ...]) -> History:
    """Return a history of calls: kind, path, content, outcome, and when it was called, returned and ended."""
    history = History()
    for kind, path, content, outcome, called, returned, ended in calls:
        add(history, kind, path, content, outcome, called, returned, ended)
    return history


def add(
    history: History,
    kind: Kind,
    path: str,
    content: str,
    outcome: Outcome,
    called: int,
    returned: int,
    ended: int,
) -> None:
    """Add one call to a history."""
    operation = history.call(kind, path, content)
    operation.outcome, operation.called = outcome, called
    operation.returned, operation.ended = returned, ended


def promises(history: History, **final: str) -> list[str]:
    """Return the ids of the promises that were broken."""
    return [violation.promise for violation in check(history, final=final, queue_depth=1)]


def test_a_right_history_passes() -> None:
    """A load after an accepted save sees it, though it ends later; failed ones change nothing."""
    history = history_of(
        ("save", "a", "one", "durable", 0, 1, 9),
        ("load", "a", "one", "read", 2, 3, -1),
        ("save", "a", "two", "failed", 4, 5, 10),
        ("load", "a", "one", "read", 11, 12, -1),
        ("remove", "a", "", "removed", 13, 14, 16),
        ("save", "a", "three", "durable", 17, 18, 19),
    )
    assert promises(history, a="three") == []


def test_calls_at_the_same_time_may_take_effect_in_either_order() -> None:
    """Two saves whose calls overlap are in no order; what is there in the end tells which."""
    for final in ("one", "two"):
        history = history_of(
            ("save", "a", "one", "durable", 0, 3, 5),
            ("save", "a", "two", "durable", 1, 2, 4),
        )
        assert promises(history, a=final) == []


@pytest.mark.parametrize(
    ("calls", "final"),
    [
        pytest.param(
            [("save", "a", "one", "durable", 0, 1, 9), ("save", "a", "two", "durable", 2, 3, 8)],
            "one",
            id="the later save was overtaken",
        ),
        pytest.param(
            [("save", "a", "one", "durable", 0, 1, 9), ("load", "a", ABSENT, "read", 2, 3, -1)],
            "one",
            id="a load did not wait",
        ),
        pytest.param(
            [("save", "a", "one", "durable", 0, 1, 9), ("remove", "a", "", "removed", 2, 3, 8)],
            "one",
            id="a deletion was overtaken",
        ),
        pytest.param(
            [("save", "a", "one", "durable", 0, 1, 2), ("save", "a", "two", "failed", 3, 4, 5)],
            "two",
            id="a failed save took effect",
        ),
    ],
)
def test_operations_out_of_order_are_found(calls: list[tuple[Any, ...]], final: str) -> None:
    """What no order in keeping with the calls explains breaks O1."""
    assert promises(history_of(*calls), a=final) == ["O1"]


def test_torn_content_is_found() -> None:
    """Content that nobody saved there breaks D2."""
    history = history_of(("save", "a", "one", "durable", 0, 1, 2))
    history.seen.add(("a", "half of one"))
    assert promises(history, a="one") == ["D2"]


def test_an_unsafe_deletion_is_found() -> None:
    """A deletion after a save had failed breaks D3, unless another one became durable in its place."""
    calls = [
        ("save", "old", "one", "durable", 0, 1, 2),
        ("save", "new", "two", "failed", 3, 4, 5),
        ("remove", "old", "", "removed", 6, 7, 10),
    ]
    final = {"old": ABSENT, "new": ABSENT, "newer": ABSENT}
    assert promises(history_of(*calls), **final) == ["D3"]
    calls.append(("save", "newer", "three", "durable", 5, 6, 8))
    assert promises(history_of(*calls), **final | {"newer": "three"}) == []


def test_saves_that_never_end_and_too_many_are_found() -> None:
    """A save without an end breaks D4; two at a time where one is allowed break B1."""
    history = History()
    for request_id in (1, 2):
        history.observe(Accepted(request_id=request_id, url="a", nbytes=1))
    history.observe(Durable(request_id=1, url="a", nbytes=1, seconds=0.0))
    assert promises(history) == ["D4", "B1"]


def test_errors_told_never_or_twice_are_found() -> None:
    """An error must be raised by its handle, or by one other call, or else E1 is broken."""
    for times, broken in ((0, ["E1"]), (1, []), (2, ["E1"])):
        history, error = History(), OSError(f"an {INJECTED} error")
        history.observe(Failed(request_id=1, url="a", error=error))
        for _ in range(times):
            history.tell(error)
        assert promises(history) == broken


def test_a_failure_that_nobody_has_injected_is_found() -> None:
    """A request may fail of an injected error, or because another one has failed, and of nothing else (D2)."""
    injected, theirs = OSError(f"an {INJECTED} error"), FileNotFoundError("the temporary file")
    because = RuntimeError("another one failed")
    because.__cause__ = injected
    for error, broken in ((injected, []), (because, []), (theirs, ["D2"])):
        history = History()
        history.observe(Failed(request_id=1, url="a", error=error))
        history.tell(error)
        assert promises(history) == broken


def test_an_error_of_nobody_is_found() -> None:
    """What a call raised though no request had failed with it breaks E1."""
    history = History()
    history.tell(OSError("whose?"))
    assert promises(history) == ["E1"]


def test_a_directory_is_removed_with_what_is_in_it() -> None:
    """A removal of a directory takes effect at each path in it, and at none beside it."""
    calls = [
        ("save", "d/a", "one", "durable", 0, 1, 2),
        ("save", "da", "two", "durable", 3, 4, 5),
        ("remove", "d", "", "removed", 6, 7, 8),
    ]
    assert promises(history_of(*calls), **{"d/a": ABSENT, "da": "two"}) == []
    assert promises(history_of(*calls), **{"d/a": "one", "da": "two"}) == ["O1"]
    assert promises(history_of(*calls), **{"d/a": ABSENT, "da": ABSENT}) == ["O1"]


def test_what_is_saved_into_a_directory_after_its_removal_stays() -> None:
    """A save that was called after the removal of its directory had returned must be there in the end."""
    calls = [("remove", "d", "", "removed", 0, 1, 9), ("save", "d/a", "one", "durable", 2, 3, 8)]
    assert promises(history_of(*calls), **{"d/a": "one"}) == []
    assert promises(history_of(*calls), **{"d/a": ABSENT}) == ["O1"]


def test_a_checkpoint_in_the_directory_that_is_removed_makes_up_for_nothing() -> None:
    """A removal is unsafe where the only checkpoint newer than a failure lies in what is removed (D3)."""
    calls = [
        ("save", "b", "lost", "failed", 0, 1, 2),
        ("save", "d/a", "one", "durable", 3, 4, 5),
        ("remove", "d", "", "removed", 6, 7, 8),
    ]
    assert promises(history_of(*calls), **{"d/a": ABSENT}) == ["D3"]
