"""Which part of a state a pattern means."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from typing import Any

import pytest

from async_ckpt.errors import OptionError
from async_ckpt.format.reading.selection import as_patterns, part_of

STATE: dict[str, Any] = {
    "state_dict": OrderedDict({"encoder.weight": 1, "encoder.bias": 2, "decoder.weight": 3}),
    "optimizers": [{"state": {0: {"m": 4, "v": 5}, 1: {"m": 6}}}, {"state": {}}],
    "pair": (7, 8),
    "epoch": 9,
    "blocks[0]": 10,
}


@pytest.mark.parametrize(
    ("patterns", "part"),
    [
        (["epoch"], {"epoch": 9}),
        (["state_dict.encoder.*"], {"state_dict": {"encoder.weight": 1, "encoder.bias": 2}}),
        (["*weight", "epoch"], {"state_dict": {"encoder.weight": 1, "decoder.weight": 3}, "epoch": 9}),
        (["optimizers.0.state.1"], {"optimizers": [{"state": {1: {"m": 6}}}]}),
        (["optimizers.*.m"], {"optimizers": [{"state": {0: {"m": 4}, 1: {"m": 6}}}]}),
        (["optimizers.1"], {"optimizers": [{"state": {}}]}),
        (["pair.1"], {"pair": (8,)}),
        (["state_dict"], {"state_dict": STATE["state_dict"]}),
        (["state_dict", "state_dict.encoder.bias"], {"state_dict": STATE["state_dict"]}),
        (["*"], STATE),
        (["blocks[0]"], {"blocks[0]": 10}),
        (["blocks[[]0]"], {"blocks[0]": 10}),
        (["[ep]*o[cd]h"], {"epoch": 9}),
    ],
)
def test_patterns(patterns: list[str], part: Any) -> None:
    """A pattern takes what its path matches and all below it; what is around that stays, and nothing else."""
    assert part_of(STATE, patterns) == part


def test_containers_keep_what_they_are() -> None:
    """A mapping keeps its type and its attributes, and the state is not changed."""
    encoder = OrderedDict(a=1, b=2)
    encoder.note = "note"  # type: ignore[attr-defined]
    state = {"encoder": encoder, "counts": defaultdict(int, a=1, b=2)}
    part = part_of(state, ["*.b"])
    assert type(part["encoder"]) is OrderedDict
    assert part["encoder"].note == "note"
    assert part["counts"]["missing"] == 0
    assert (len(encoder), len(state["counts"])) == (2, 2)


def test_a_state_that_holds_itself() -> None:
    """A cycle is gone round once."""
    state: dict[str, Any] = {"a": [1]}
    state["me"] = state
    state["a"].append(state["a"])
    assert part_of(state, ["a.0"]) == {"a": [1]}
    with pytest.raises(KeyError):
        part_of(state, ["me.a.0"])


@pytest.mark.parametrize("kind", [list, tuple, lambda pair: dict(enumerate(pair))])
def test_a_state_that_holds_the_same_a_million_times_over(kind: Any) -> None:
    """What comes first is found; where no end of the search is in sight, it is given up."""
    state: Any = kind([1, 2])
    for _ in range(60):
        state = kind([state, state])
    assert part_of({"a": state, "b": 3}, ["*.1"]) == {"a": part_of(state, ["*1"])}
    with pytest.raises(ValueError, match="too many times over"):
        part_of({"a": state, "b": 3}, ["b.*"])


def test_a_pattern_that_matches_nothing_names_the_nearest() -> None:
    """The error names the pattern and what comes nearest to it, each pattern on its own."""
    with pytest.raises(KeyError, match=r"'state_dict\.encodr\.bias'.*'state_dict\.encoder\.bias'"):
        part_of(STATE, ["epoch", "state_dict.encodr.bias"])
    with pytest.raises(KeyError, match="neither a mapping nor a list"):
        part_of(3, ["*"])


@pytest.mark.parametrize("keys", [[], "", [""], [3], ("a", None)])
def test_keys_that_cannot_be(keys: Any) -> None:
    """No pattern at all, and one that is no text, are refused."""
    with pytest.raises(OptionError, match="keys="):
        as_patterns(keys)
    assert as_patterns("a.*") == ("a.*",)
