"""The demo's table: what it computes and how it lines up."""

from __future__ import annotations

from demo.costs import Cost, table


def test_numbers_are_medians_but_for_the_worst_and_columns_line_up() -> None:
    """The table shows medians and the worst stall, each number ending where its head ends."""
    costs = {
        "ours": Cost(
            stalls=[0.001, 0.002, 0.9],
            durations=[0.1, 0.3, 0.2],
            nbytes=[2**20, 2**20, 3 * 2**20],
            fit_seconds=[5.0, 4.0],
        ),
        "a longer name": Cost(stalls=[10.0], durations=[20.0], nbytes=[2**30], fit_seconds=[100.0]),
    }
    assert table(costs) == [
        "               saves  MiB each  stall a save     worst  until written  training",
        "─────────────  ─────  ────────  ────────────  ────────  ─────────────  ────────",
        "ours               3       1.0        2.0 ms    900 ms         200 ms     4.5 s",
        "a longer name      1    1024.0    10000.0 ms  10000 ms       20000 ms   100.0 s",
    ]
