"""How the ranks agree on the end of a sharded save: one verdict, within bounds, without a collective operation.

`coordinator` and `participant` decide, purely, by the rules in `protocol`; `driver` carries out what they decide,
through `wire` and the group's store. `rendezvous` is what a save waits for.

What does not belong here: what is written, and where.
"""

from __future__ import annotations
