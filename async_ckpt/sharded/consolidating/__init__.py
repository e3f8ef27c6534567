"""Makes one ordinary file of ``torch.save`` from a sharded checkpoint, in bounded memory.

`state` lays the file out without the bytes of its tensors, `tensors` and `geometry` say which items hold those bytes,
`gathering` fetches them, `content` is the file as a store reads it, part by part, and `consolidation` runs it all.

What does not belong here: how the file gets to its storage, as a whole or not at all (`engine.writers`, `stores`).
"""

from __future__ import annotations
