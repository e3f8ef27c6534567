"""How the ranks agree on the outcome of a sharded save: one verdict, within bounds, without collective operations.

`coordinator` and `participant` are pure state machines that decide by the rules in `protocol`. `driver` carries out
their actions and sends their messages through the group's store, by `wire`. `rendezvous` is what a save calls.

What does not belong here: what is written, and where.
"""

from __future__ import annotations
