"""The conformance suite for stores: subclass ``StoreConformance`` and run pytest.

Guarantees: a store that passes keeps the promises of ``stores.base``, as far as one process can check. That files
survive the process or a loss of power is not tested.

::

    class TestMyStore(StoreConformance):
        def make_store(self, workers): return MyStore(workers=workers)
        def locate(self, name): return my_location(name)
        def leftovers(self): return [...]

The tests are in ``suites.saving``, ``suites.ending`` and ``suites.reading``; see ``UnderTest`` for what else a subclass
may define: a store with ``overwrite=False``, leftovers of a dead process.
"""

from __future__ import annotations

from async_ckpt.testing.harness import StoreHarness, cut
from async_ckpt.testing.suites.ending import Ending
from async_ckpt.testing.suites.reading import Reading
from async_ckpt.testing.suites.saving import Saving

__all__ = ["StoreConformance", "StoreHarness", "cut"]


class StoreConformance(Saving, Ending, Reading):
    """The tests; a subclass defines the store and its locations."""
