"""How a sharded checkpoint, or a plain file, fills the parts of a state that this rank holds.

`origins` says what is where, `extents` and `fetching` which bytes are asked for, `filling` where they go. `load` and
`reader` do it.

What does not belong here: what is written (`writing`).
"""

from __future__ import annotations
