"""How this torch writes checkpoints, found out by asking it.

Guarantees: nothing is taken for known that torch was not seen to do, in this process and as its functions are now; a
function that is not torch's own is never taken for known. What is known is known before a state is walked, so that
nothing has to be asked when the state may have changed.

For each dtype torch pickles a few tensors, and what comes out is compared with what would be made here.

What does not belong here: how records become a file, which torch's writer knows.
"""

from __future__ import annotations

import _pickle
import codecs
import copyreg
import io
import logging
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from async_ckpt.snapshot.filling import Reduction, Skeleton, fill
from async_ckpt.snapshot.pickler import PROTOCOL, FilePickler

__all__ = ["Convention", "Record", "alignment", "ask", "convention", "open_writer"]

logger = logging.getLogger("async_ckpt.snapshot")

Record: TypeAlias = "tuple[str, bytes | str | int]"
"""A name, and what it holds: a number is a storage's."""

_EXAMPLE_BYTES = 128
_EXAMPLES = 11  # the order of so many shows how their numbers are sorted


@dataclass(frozen=True, slots=True, kw_only=True)
class Convention:
    """What was found out.

    Attributes:
        alignment: what torch was told to align storages to; before 2.7 that cannot be told.
        others: the records that torch puts between the pickle and the storages.
        sorts: torch writes storages in the order of their names, as 2.4 does, and not as it met them.
        reductions: by dtype, how tensors are pickled; ``None`` where that is not known.
        words: by identity, how pickle refers by name to the objects that tensors and storages are pickled with.
    """

    alignment: int
    others: tuple[Record, ...]
    sorts: bool
    reductions: Mapping[torch.dtype, Reduction | None]
    words: Mapping[int, bytes]

    def records(self, skeleton: Skeleton, bytes_at: Callable[[int, int], memoryview]) -> list[Record]:
        """Return what the archive is to hold, in its order, but for what torch's writer adds itself."""
        pickled, keys = fill(skeleton, bytes_at)
        names: list[Record] = [(f"data/{key}", index) for index, key in keys.items()]
        return [("data.pkl", pickled), *self.others, *(sorted(names) if self.sorts else names)]


def convention() -> Convention | None:
    """Return what torch does now, ``None`` where that is not known."""
    global _latest
    now = _circumstances()
    if _latest is None or _latest[0] != now:
        found = _find_out()
        if found is None:  # perhaps for the moment: the caller may have put torch into some mode
            return None
        _latest = now, found
    return _latest[1]


_latest: tuple[tuple[Any, ...], Convention] | None = None


def ask(state: Any) -> list[tuple[str, Any]]:
    """Have torch say what records it would write of *state*; storages themselves stand for their bytes."""
    notes = _Notes()
    torch.serialization._save(state, notes, pickle, torch.serialization.DEFAULT_PROTOCOL, False)
    return notes.records


def open_writer(file: Any, boundary: int) -> Any:
    """Return torch's writer into a file-like object, ``None`` where it is not opened in a way known here."""
    writer: Any = torch._C.PyTorchFileWriter
    for arguments in ((False, boundary), (False,), ()):  # torch 2.7 on, 2.6, before
        try:
            return writer(file, *arguments)
        except TypeError:
            continue
    return None


class _Notes:
    """An archive to torch, which only notes what it is to hold."""

    def __init__(self) -> None:
        self.records: list[tuple[str, Any]] = []

    def write_record(self, name: str, content: Any, nbytes: int) -> None:
        """Note a record."""
        self.records.append((name, content))


def _circumstances() -> tuple[Any, ...]:
    """Return what decides how torch writes: its functions, what it is told, and names that pickle knows by number."""
    return (
        *_functions(),
        _is_interfered_with(),
        torch.serialization.DEFAULT_PROTOCOL,
        alignment(),
        frozenset(copyreg._extension_registry) if copyreg._extension_registry else None,  # type: ignore[attr-defined]
    )


def _functions() -> tuple[Any, ...]:
    return (
        torch.serialization._save,
        getattr(torch.serialization, "normalize_storage_type", None),
        torch.Tensor.__reduce_ex__,
        torch.Tensor._reduce_ex_internal,
        torch.nn.Parameter.__reduce_ex__,
        torch._utils._get_obj_state,
        torch._utils._rebuild_parameter,
        torch._utils._rebuild_tensor_v2,
        torch._utils._rebuild_tensor_v3,
        torch.TypedStorage._pickle_storage_type,
    )


def _is_interfered_with() -> bool:
    """Return whether somebody else says how what a tensor is pickled with is pickled, or adds a state to tensors."""
    default = getattr(object, "__getstate__", None)  # from Python 3.11 on
    return (
        pickle.Pickler is not _pickle.Pickler
        or not copyreg.dispatch_table.keys().isdisjoint(_PARTS)
        or any(
            getattr(kind, "__getstate__", None) is not default for kind in (torch.Tensor, torch.nn.Parameter)
        )
    )


#: Kinds of what tensors and bytes are pickled with, whose reducers pickle would ask.
_PARTS = (OrderedDict, torch.dtype, type(codecs.encode), type(torch.FloatStorage))


def _is_torchs(function: Any) -> bool:
    return bool(function.__globals__["__name__"].partition(".")[0] == "torch")


def alignment() -> int:
    """Return what torch is told to align storages to; before 2.7 that cannot be told."""
    return int(getattr(torch.serialization, "_get_storage_alignment", lambda: 64)())


def _find_out() -> Convention | None:
    try:
        with torch.inference_mode(mode=False):
            return _found_out()
    except Exception:  # a torch that does everything otherwise must not break a save that is possible
        logger.debug("torch %s cannot be asked how it writes", torch.__version__, exc_info=True)
        return None


def _found_out() -> Convention | None:
    if _is_interfered_with() or not all(map(_is_torchs, _functions())):
        return None
    if open_writer(io.BytesIO(), alignment()) is None:
        return None
    storages = _storages()
    names = [name for name, _ in ask([*storages])]
    words = _words()
    found = Convention(
        alignment=alignment(),
        others=tuple(ask(None)[1:]),
        sorts=names.index("data/10") < names.index("data/2"),
        reductions=_Reductions(words),
        words=words,
    )
    typed = [torch.TypedStorage(wrap_storage=each, dtype=torch.float32, _internal=True) for each in storages]
    for example in ([*storages, storages[0]], [*typed, typed[0]]):
        if not _is_written_so(example, found):
            return None
    return found


class _Reductions(dict[torch.dtype, "Reduction | None"]):
    """What is known of each dtype; found out when it is asked for."""

    def __init__(self, words: Mapping[int, bytes]) -> None:
        super().__init__()
        self._words = words

    def __missing__(self, dtype: torch.dtype) -> Reduction | None:
        known = self[dtype] = self._find_out(dtype)
        logger.debug(
            "torch %s pickles %s in the way known here: %s", torch.__version__, dtype, known is not None
        )
        return known

    def _find_out(self, dtype: torch.dtype) -> Reduction | None:
        try:
            with torch.inference_mode(mode=False):
                reduction = _reduction(dtype)
                trial = Convention(
                    alignment=0, others=(), sorts=False, reductions={dtype: reduction}, words=self._words
                )
                return reduction if all(_is_written_so(each, trial) for each in _examples(dtype)) else None
        except Exception:  # as above
            logger.debug("torch %s cannot be asked about %s", torch.__version__, dtype, exc_info=True)
            return None


def _reduction(dtype: torch.dtype) -> Reduction:
    tensor = torch.empty(0, dtype=dtype, device="cpu")
    rebuild, arguments = tensor.__reduce_ex__(PROTOCOL)
    storage, *_ = arguments
    rebuild_parameter = torch._utils._rebuild_parameter
    if isinstance(storage, torch.TypedStorage):
        kind = getattr(torch, storage._pickle_storage_type())
        return Reduction(rebuild, kind, dtype.itemsize, arguments[6:], rebuild_parameter)
    return Reduction(rebuild, torch.UntypedStorage, 1, arguments[6:], rebuild_parameter)


def _is_written_so(example: Any, known: Convention) -> bool:
    """Return whether torch puts *example* into the pickle and the storages that it would be put into here."""
    file = io.BytesIO()
    pickler = FilePickler(file, known.words, known.reductions)
    pickler.dump(example)
    lifted = pickler.lifted
    skeleton = Skeleton(
        file.getvalue(), lifted.entries, lifted.sizes, lifted.locations, known.reductions, known.words
    )
    pickled, keys = fill(skeleton, _nothing)
    ours = {f"data/{key}": lifted.storages[index].tolist() for index, key in keys.items()}
    theirs = dict(ask(example))
    return pickled == theirs.pop("data.pkl") and ours == {
        name: content.tolist()
        for name, content in theirs.items()
        if isinstance(content, torch.UntypedStorage)
    }


def _nothing(start: int, nbytes: int) -> memoryview:
    """Give the bytes of arrays, of which there are none in an example."""
    raise LookupError(f"no array of {nbytes} bytes at {start}")


def _storages() -> list[torch.UntypedStorage]:
    """Return storages that are told apart by their bytes."""
    return [
        torch.full((_EXAMPLE_BYTES,), number, dtype=torch.uint8, device="cpu").untyped_storage()
        for number in range(_EXAMPLES)
    ]


def _examples(dtype: torch.dtype) -> Iterator[Any]:
    """Yield tensors of a dtype, some tied, some views of one storage, with numbers that tell them apart."""
    storages = _storages()

    def views() -> list[torch.Tensor]:
        return [
            torch.empty(0, dtype=dtype, device="cpu").set_(storages[number], offset, (1, 2), (1, offset))
            for number, offset in ((0, 1), (0, 2), (1, 1))
        ]

    differentiable = dtype.is_floating_point or dtype.is_complex
    for requires_grad in (False, True) if differentiable else (False,):
        plain = [view.requires_grad_(requires_grad) for view in views()]
        parameters = [torch.nn.Parameter(view, requires_grad) for view in views()]
        yield [*plain, plain[0], *parameters, parameters[0]]


def _words() -> dict[int, bytes]:
    """Return, by their identity, how pickle refers to what tensors and storages are pickled with."""
    storage_types = torch.storage._dtype_to_storage_type_map().values()
    objects = (
        OrderedDict,
        codecs.encode,
        torch._utils._rebuild_parameter,
        torch._utils._rebuild_tensor_v2,
        torch._utils._rebuild_tensor_v3,
        torch.UntypedStorage,
        *(getattr(torch, name) for name in storage_types),
        *torch.storage._new_dtypes(),
    )
    return {id(each): _named(each) for each in objects}


def _named(value: Any) -> bytes:
    """Return how pickle writes the name of *value*."""
    written = pickle.dumps(value, PROTOCOL)
    if not (written.startswith(b"\x80\x02c") and written.endswith(b"\nq\x00.")):
        raise ValueError(f"{value!r} is not pickled by its name")
    return written[2:-3]
