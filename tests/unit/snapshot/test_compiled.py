"""Pickle tells equal constants apart, and Python makes others where a module was compiled before."""

from __future__ import annotations

import marshal
from pathlib import Path
from types import ModuleType

import numpy

from async_ckpt.snapshot import arrays


def compiled_before(module: ModuleType) -> ModuleType:
    """Return *module* as it is where Python reads its compiled code from a file, as in every installation."""
    assert module.__file__ is not None
    code = compile(Path(module.__file__).read_text(), module.__file__, "exec")
    found = ModuleType(module.__name__)
    exec(marshal.loads(marshal.dumps(code)), found.__dict__)
    return found


def test_what_is_said_of_an_array_is_what_numpy_says_to_the_object() -> None:
    """What numpy gives pickle for every array is one object, so that it has the same number in the file (S1)."""
    array = numpy.arange(3.0)
    expected = array.__reduce_ex__(2)
    module = compiled_before(arrays)
    said = module.reduction(seen := module.ArrayBytes(array))
    assert said[:2] == expected[:2]
    assert said[2] == (*expected[2][:-1], seen)
    assert said[0] is expected[0]
    assert said[1][2] is expected[1][2]
