"""Snapshots: the copy of a state at one instant, in reused host memory (S1).

``capture`` walks a state once, on the training thread, for a file; ``capture_objects`` does so for a writer that needs
the objects. ``Capture.stage`` copies the bulk data into a leased ``HostBuffer``; the resulting ``Snapshot`` shares
nothing with the state.

What does not belong here: the bytes of the file, the queue, waiting for memory.
"""

from __future__ import annotations

from async_ckpt.snapshot.capture import Capture, capture, capture_objects
from async_ckpt.snapshot.host_pool import HostBuffer, HostPool
from async_ckpt.snapshot.snapshot import Snapshot, Storages

__all__ = ["Capture", "HostBuffer", "HostPool", "Snapshot", "Storages", "capture", "capture_objects"]
