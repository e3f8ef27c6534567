"""Sharded checkpoints: a state that no single process holds, as a directory that torch's own DCP opens.

A save takes each rank's part apart (`flatten`) and copies it. The ranks agree (`agreement`, `rendezvous`) on who writes
what (`plan`). Each writes one object (`archive`, `shard`, `writer`), and the first of them commits all by one file
(`manifest`). `reader` brings them back, on any number of ranks.

What does not belong here: the queue, memory, retries, how bytes get to storage. ``import async_ckpt`` imports nothing
of this, and with it nothing of ``torch.distributed``.
"""

from __future__ import annotations
