"""Doubles and suites for testing what is built on async_ckpt, shipped with it.

Nothing outside of tests imports this.
"""

from __future__ import annotations

from async_ckpt.testing.conformance import StoreConformance, StoreRig
from async_ckpt.testing.doubles import BytesContent, ManualClock, ThreadWorkers
from async_ckpt.testing.faults import Fault, FaultyDisk, FaultyStore, Gate, crash, slowed
from async_ckpt.testing.rig import UnderTest

__all__ = [
    "BytesContent",
    "Fault",
    "FaultyDisk",
    "FaultyStore",
    "Gate",
    "ManualClock",
    "StoreConformance",
    "StoreRig",
    "ThreadWorkers",
    "UnderTest",
    "crash",
    "slowed",
]
