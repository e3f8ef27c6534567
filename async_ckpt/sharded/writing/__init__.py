"""How one rank's part of a state becomes an object of a sharded checkpoint, and all objects one checkpoint.

`flatten` takes a state apart, `plan` has torch decide who writes what, `archive` and `shard` produce the bytes.
`writer` carries out a save, and `saves` numbers the saves of a service.

What does not belong here: the decision about a save (`agreement`), loading (`reading`).
"""

from __future__ import annotations
