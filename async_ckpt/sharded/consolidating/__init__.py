"""How a sharded checkpoint becomes one ordinary file of ``torch.save``, in bounded memory.

`state` makes the file but for the bytes of its tensors, `tensors` and `geometry` say in which items those are,
`gathering` gets them, `content` is the file as a store reads it, part by part, and `consolidation` does all of it.

What does not belong here: how the file gets to its storage, all at once or not at all (`engine.writers`, `stores`).
"""

from __future__ import annotations
