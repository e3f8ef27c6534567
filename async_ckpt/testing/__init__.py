"""Test doubles, and the conformance suite for stores, for testing code that is built on async_ckpt.

``StoreRig`` is the former name of ``StoreHarness``. Only tests import this package.
"""

from __future__ import annotations

from async_ckpt.testing.conformance import StoreConformance, StoreHarness
from async_ckpt.testing.doubles import BytesContent, ManualClock, ThreadWorkers
from async_ckpt.testing.faults import Fault, FaultyDisk, FaultyStore, Gate, crash, slowed
from async_ckpt.testing.harness import UnderTest

StoreRig = StoreHarness

__all__ = [
    "BytesContent",
    "Fault",
    "FaultyDisk",
    "FaultyStore",
    "Gate",
    "ManualClock",
    "StoreConformance",
    "StoreHarness",
    "StoreRig",
    "ThreadWorkers",
    "UnderTest",
    "crash",
    "slowed",
]
