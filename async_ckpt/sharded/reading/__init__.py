"""Fills the parts of a state that this rank holds, from a sharded checkpoint or a plain file.

`origins` says where everything is, `extents` which bytes of a file a part is, `fetching` fetches them, `filling` puts
them into the state. `reader` reads one checkpoint, `load` finds it and tries again if it was replaced.

What does not belong here: how checkpoints are written (`writing`).
"""

from __future__ import annotations
