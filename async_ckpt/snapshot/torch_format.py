"""The format in which this torch writes checkpoints, found out by trial.

Guarantees: the format counts as known only if torch was seen to write it, in this process and with its present
functions, which must be torch's own. The trial comes before a state is walked, so none is needed when the state may
have changed.

For each dtype torch pickles a few example tensors, and the result is compared with our own.

What does not belong here: how records become a file; torch's writer does that.
"""

from __future__ import annotations

import _pickle
import codecs
import copyreg
import io
import logging
import pickle
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from async_ckpt.snapshot.columns import Entries
from async_ckpt.snapshot.filling import Filled, Reduction, Skeleton, fill
from async_ckpt.snapshot.pickler import PROTOCOL, FilePickler

__all__ = ["Record", "TorchFormat", "alignment", "known_format", "open_writer", "torch_records"]

logger = logging.getLogger("async_ckpt.snapshot")

Record: TypeAlias = "tuple[str, bytes | str | int]"
"""A record's name and its content; a number stands for a storage."""

_EXAMPLE_BYTES = 128
_EXAMPLES = 11  # the order of so many shows how their numbers are sorted


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchFormat:
    """The format of this torch.

    Attributes:
        alignment: torch's setting for the alignment of storages; fixed before torch 2.7.
        others: the records between the pickle and the storages.
        sorts: whether torch writes storages sorted by name, as 2.4 does, instead of in the order of their occurrence.
        reductions: by dtype, how tensors are pickled; ``None`` if that is not known.
        global_names: by identity, the pickled names of the objects that occur in pickles of tensors and storages.
    """

    alignment: int
    others: tuple[Record, ...]
    sorts: bool
    reductions: Mapping[torch.dtype, Reduction | None]
    global_names: Mapping[int, bytes]

    def records(self, filled: Filled) -> list[Record]:
        """Return the records of the archive, in order, without those that torch's writer adds itself."""
        names: list[Record] = [(f"data/{key}", index) for index, key in filled.keys.items()]
        return [("data.pkl", filled.pickle), *self.others, *(sorted(names) if self.sorts else names)]


def known_format() -> TorchFormat | None:
    """Return the format that torch writes now; ``None`` if it is not known."""
    global _latest
    now = _circumstances()
    if _latest is None or _latest[0] != now:
        found = _find_out()
        if found is None:  # perhaps only for now: the caller may have put torch into some mode
            return None
        _latest = now, found
    return _latest[1]


_latest: tuple[tuple[Any, ...], TorchFormat] | None = None


def torch_records(state: Any) -> list[tuple[str, Any]]:
    """Return the records that torch would write of *state*; storages stand for their bytes."""
    notes = _Notes()
    torch.serialization._save(state, notes, pickle, torch.serialization.DEFAULT_PROTOCOL, False)
    return notes.records


def open_writer(file: Any, boundary: int) -> Any:
    """Return torch's archive writer on a file-like object; ``None`` if its constructor is not known."""
    writer: Any = torch._C.PyTorchFileWriter
    for arguments in ((False, boundary), (False,), ()):  # torch 2.7 on, 2.6, before
        try:
            return writer(file, *arguments)
        except TypeError:
            continue
    return None


class _Notes:
    """Stands in for torch's archive writer, and only notes the records."""

    def __init__(self) -> None:
        self.records: list[tuple[str, Any]] = []

    def write_record(self, name: str, content: Any, nbytes: int) -> None:
        """Note a record."""
        self.records.append((name, content))


def _circumstances() -> tuple[Any, ...]:
    """Return all that the format depends on: torch's functions and settings, and pickle's extension registry."""
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
    """Return whether other code changes how the parts of a tensor's pickle are pickled, or gives tensors a state."""
    default = getattr(object, "__getstate__", None)  # from Python 3.11 on
    return (
        pickle.Pickler is not _pickle.Pickler
        or not copyreg.dispatch_table.keys().isdisjoint(_PARTS)
        or any(
            getattr(kind, "__getstate__", None) is not default for kind in (torch.Tensor, torch.nn.Parameter)
        )
    )


#: Types that occur in pickles of tensors and bytes, for which pickle looks up reducers.
_PARTS = (OrderedDict, torch.dtype, type(codecs.encode), type(torch.FloatStorage))


def _is_torchs(function: Any) -> bool:
    return bool(function.__globals__["__name__"].partition(".")[0] == "torch")


def alignment() -> int:
    """Return torch's setting for the alignment of storages; fixed before torch 2.7."""
    return int(getattr(torch.serialization, "_get_storage_alignment", lambda: 64)())


def _find_out() -> TorchFormat | None:
    try:
        with torch.inference_mode(mode=False):
            return _found_out()
    except Exception:  # a torch that is entirely different must not break a save that is possible
        logger.debug("cannot find out the format of torch %s", torch.__version__, exc_info=True)
        return None


def _found_out() -> TorchFormat | None:
    if _is_interfered_with() or not all(map(_is_torchs, _functions())):
        return None
    if open_writer(io.BytesIO(), alignment()) is None:
        return None
    storages = _storages()
    names = [name for name, _ in torch_records([*storages])]
    global_names = _global_names()
    found = TorchFormat(
        alignment=alignment(),
        others=tuple(torch_records(None)[1:]),
        sorts=names.index("data/10") < names.index("data/2"),
        reductions=_Reductions(global_names),
        global_names=global_names,
    )
    typed = [torch.TypedStorage(wrap_storage=each, dtype=torch.float32, _internal=True) for each in storages]
    for example in ([*storages, storages[0]], [*typed, typed[0]]):
        if not _is_written_so(example, found):
            return None
    return found


class _Reductions(dict[torch.dtype, "Reduction | None"]):
    """The reduction of each dtype, found out when it is first needed."""

    def __init__(self, global_names: Mapping[int, bytes]) -> None:
        super().__init__()
        self._global_names = global_names

    def __missing__(self, dtype: torch.dtype) -> Reduction | None:
        known = self[dtype] = self._find_out(dtype)
        logger.debug("torch %s pickles %s in a known format: %s", torch.__version__, dtype, known is not None)
        return known

    def _find_out(self, dtype: torch.dtype) -> Reduction | None:
        try:
            with torch.inference_mode(mode=False):
                reduction = _reduction(dtype)
                trial = TorchFormat(
                    alignment=0,
                    others=(),
                    sorts=False,
                    reductions={dtype: reduction},
                    global_names=self._global_names,
                )
                return reduction if all(_is_written_so(each, trial) for each in _examples(dtype)) else None
        except Exception:  # as above
            logger.debug("cannot find out how torch %s pickles %s", torch.__version__, dtype, exc_info=True)
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


def _is_written_so(example: Any, known: TorchFormat) -> bool:
    """Return whether torch's pickle and storages for *example* equal ours."""
    file = io.BytesIO()
    pickler = FilePickler(file, known.global_names, known.reductions)
    extracted = pickler.extract(example)
    skeleton = Skeleton(
        file.getvalue(),
        Entries(extracted.others, extracted.tensors),
        extracted.sources.sizes,
        extracted.locations,
        known.reductions,
        known.global_names,
    )
    filled = fill(skeleton, _nothing)
    ours = {f"data/{key}": extracted.sources.view(index).tolist() for index, key in filled.keys.items()}
    theirs = dict(torch_records(example))
    return filled.pickle == theirs.pop("data.pkl") and ours == {
        name: content.tolist()
        for name, content in theirs.items()
        if isinstance(content, torch.UntypedStorage)
    }


def _nothing(start: int, nbytes: int) -> memoryview:
    """Stand in for the bytes of arrays; examples contain none."""
    raise LookupError(f"no array of {nbytes} bytes at {start}")


def _storages() -> list[torch.UntypedStorage]:
    """Return storages that differ in their bytes."""
    return [
        torch.full((_EXAMPLE_BYTES,), number, dtype=torch.uint8, device="cpu").untyped_storage()
        for number in range(_EXAMPLES)
    ]


def _examples(dtype: torch.dtype) -> Iterator[Any]:
    """Yield tensors of a dtype, some tied, some views of one storage, all distinguishable."""
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


def _global_names() -> dict[int, bytes]:
    """Return, by identity, the pickled names of the objects that occur in pickles of tensors and storages."""
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
    """Return the bytes by which pickle refers to *value* by name."""
    written = pickle.dumps(value, PROTOCOL)
    if not (written.startswith(b"\x80\x02c") and written.endswith(b"\nq\x00.")):
        raise ValueError(f"{value!r} is not pickled by its name")
    return written[2:-3]
