"""Sharded checkpoints: a state that no single process holds, as a directory that torch's own DCP opens.

* `writing`: each rank's part of a state becomes one object, and `.metadata`, written last, makes a checkpoint of all.
* `agreement`: the ranks come to one verdict on it.
* `reading`: any number of ranks fill their parts of a state from it, or from a plain file.
* `consolidating`: it becomes one plain file.
* `manifest` is what ``.metadata`` says, `latest` finds the newest checkpoint, `leftovers` what dead processes left.

What does not belong here: the queue, memory, retries, how bytes get to storage. ``import async_ckpt`` imports nothing
of this, and with it nothing of ``torch.distributed``.
"""

from __future__ import annotations
