"""How the ranks agree on the outcome of a sharded save: one verdict, within bounds, without collective operations.

`coordinator` and `participant` decide, as pure state machines, by the rules in `protocol`; `driver` carries out their
actions, and sends messages by `wire` through the group's store. A save waits for its `rendezvous`.

What does not belong here: what is written, and where.
"""

from __future__ import annotations
