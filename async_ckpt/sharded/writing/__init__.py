"""How a rank's part of a state becomes one object of a sharded checkpoint, and all of them one checkpoint.

`flatten` takes a state apart, `plan` has torch decide who writes what, `archive` and `shard` make the bytes. `writer`
carries a save out, and `saves` numbers those of a service.

What does not belong here: who decides over a save (`agreement`), what is read (`reading`).
"""

from __future__ import annotations
