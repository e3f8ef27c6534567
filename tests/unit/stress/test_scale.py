"""The simulation of many ranks: what it says of the agreement, and that it can say otherwise."""

from __future__ import annotations

from dataclasses import replace

from stress.scale import Setting, simulate


def test_many_ranks_lose_nothing_and_exchange_little() -> None:
    """Of two saves of 64 ranks both are durable; the second costs each rank a few hundred bytes (B3)."""
    result = simulate(Setting(world=64, nbytes=1 << 30))
    assert result.not_durable == 0
    assert result.gave_up == 0
    first, later = result.bytes_per_rank
    assert first > 2 * 20_000 > 1000 > later
    assert all(seconds < 0.5 for seconds in result.verdict_seconds)


def test_a_death_is_known_to_all_within_the_bound() -> None:
    """A rank that dies while it writes ends the save for all others alike, after the silence bound (E4, E5)."""
    result = simulate(Setting(world=16, deaths=1))
    ends = result.ends[1]
    assert len(ends) == 15
    (failures,) = {tuple(sorted(each.items())) for each in ends.values()}
    ((rank, why),) = failures
    assert rank not in ends
    assert why.startswith("sent nothing for 60 s")
    assert 50 < result.verdict_seconds[1] < 75


def test_ranks_that_keep_to_their_share_are_not_refused() -> None:
    """Five hundred ranks together stay below what S3 takes, and are no slower for it than where it refuses them."""
    setting = Setting(world=500, nbytes=1 << 30, plan_bytes=100)
    shared, crowded = simulate(setting), simulate(replace(setting, is_shared=False))
    assert shared.refused == 0
    assert crowded.refused > 1000
    assert max(shared.seconds) <= max(crowded.seconds)


def test_throttled_ranks_wait_rather_than_give_up() -> None:
    """Where S3 refuses many requests, every rank still gets its bytes there (E3)."""
    result = simulate(Setting(world=200, nbytes=512 << 20, plan_bytes=100, is_shared=False))
    assert result.refused > 100
    assert result.gave_up == 0
    assert result.not_durable == 0
