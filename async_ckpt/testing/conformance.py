"""What every store must do, as tests: subclass ``StoreConformance`` and run pytest.

Guarantees: a class that passes keeps what ``stores.base`` promises, as far as one process can see. That
bytes outlive the process and the power is not shown here.

::

    class TestMyStore(StoreConformance):
        def make_store(self, workers): return MyStore(workers=workers)
        def locate(self, name): return my_location(name)
        def leftovers(self): return [...]

The facts are in ``suites.saving``, ``suites.ending`` and ``suites.reading``; ``UnderTest`` says what else a subclass
may tell: a store that replaces nothing, what a dead process leaves.
"""

from __future__ import annotations

from async_ckpt.testing.rig import StoreRig, cut
from async_ckpt.testing.suites.ending import Ending
from async_ckpt.testing.suites.reading import Reading
from async_ckpt.testing.suites.saving import Saving

__all__ = ["StoreConformance", "StoreRig", "cut"]


class StoreConformance(Saving, Ending, Reading):
    """The tests; a subclass says what store, and where."""
