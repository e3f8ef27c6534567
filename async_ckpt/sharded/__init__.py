"""Sharded checkpoints: a state that no single process holds, as a directory that torch's own DCP opens.

* `writing`: each rank writes its part of the state as one object; `.metadata`, written last, completes the checkpoint.
* `agreement`: the ranks agree on one verdict for each save.
* `reading`: any number of ranks fill their parts of a state from such a directory, or from a plain file.
* `consolidating`: such a directory becomes one plain file.
* `operations`: what a service calls to save, load and consolidate.
* `manifest` reads ``.metadata``, `latest` finds the newest checkpoint, `leftovers` finds what dead processes left.

What does not belong here: the queue, memory, retries, how bytes get to storage. ``import async_ckpt`` imports neither
this package nor ``torch.distributed``.
"""

from __future__ import annotations
