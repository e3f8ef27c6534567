"""Which of torch's arguments can be honoured, and the error for each that cannot.

Guarantees: an argument that would be ignored is refused before anything is done.

What does not belong here: the saves and loads themselves (`functions`).
"""

from __future__ import annotations

import os
from typing import Any

from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import LoadPlanner

from async_ckpt.errors import OptionError
from async_ckpt.stores import Given

__all__ = ["THREAD", "check_collectives", "check_load", "check_save", "place"]

THREAD: Any = getattr(getattr(state_dict_saver, "AsyncCheckpointerType", None), "THREAD", None)
"""How torch's ``async_save`` writes, unless told otherwise; ``None`` before torch 2.6, which knows one way only."""

_USUAL = {"flatten_state_dict": True, "flatten_sharded_tensors": True, "dedup_save_to_lowest_rank": False}
"""The settings that a ``DefaultSavePlanner`` must have; how it caches plans makes no difference here."""


def place(checkpoint_id: Any) -> Given:
    """Return the directory of a checkpoint.

    Raises:
        OptionError: *checkpoint_id* is missing.
    """
    if checkpoint_id is None or os.fspath(checkpoint_id) == "":
        raise OptionError("checkpoint_id=None: give the checkpoint's directory, a local path or any URL")
    return checkpoint_id  # type: ignore[no-any-return]


def check_save(
    *,
    storage_writer: object,
    planner: object,
    use_collectives: bool,
    kind: object = THREAD,
    stager: object = None,
) -> None:
    """Refuse what a save cannot honour.

    Args:
        storage_writer: as given to ``save``.
        planner: as given to ``save``.
        use_collectives: as given to ``save``.
        kind: the ``async_checkpointer_type``.
        stager: the ``async_stager``.

    Raises:
        OptionError: an argument would be ignored; the message says what to do instead.
    """
    if storage_writer is not None:
        raise OptionError(
            f"storage_writer=<{_kind(storage_writer)}>: it is not used here, because the state is written to storage "
            "in another way. Give its path or URL as checkpoint_id, or call torch.distributed.checkpoint's own function"
        )
    _check_planner(planner)
    check_collectives(use_collectives)
    if kind is not THREAD:
        raise OptionError(
            f"async_checkpointer_type={kind!r}: no second process is started here. Leave it out: what is written "
            "goes from memory to storage in threads, without the interpreter's lock"
        )
    if stager is not None:
        raise OptionError(
            f"async_stager=<{_kind(stager)}>: it is not used here, because async_save copies the state "
            "itself, into memory that it reuses from save to save. Leave it out"
        )


def check_load(*, storage_reader: object, planner: object) -> None:
    """Refuse what a load cannot honour; the arguments are those of ``load``.

    Raises:
        OptionError: an argument would be ignored; the message says what to do instead.
    """
    if storage_reader is not None:
        raise OptionError(
            f"storage_reader=<{_kind(storage_reader)}>: it is not used here, because checkpoints are read from "
            "storage in another way. Give its path or URL as checkpoint_id, or call torch.distributed.checkpoint's own "
            "function"
        )
    if planner is not None and not isinstance(planner, LoadPlanner):
        raise OptionError(f"planner=<{_kind(planner)}>: must be a LoadPlanner")


def check_collectives(use_collectives: object) -> None:
    """Refuse an option that would make each rank write a checkpoint of its own.

    Raises:
        OptionError: *use_collectives* is false.
    """
    if not use_collectives:
        raise OptionError(
            "use_collectives=False has each rank write a checkpoint of its own into one directory, which only torch "
            "reads. async_ckpt.dcp.save calls no collective in any case: leave it out. For a checkpoint of each "
            "rank's own, give no_dist=True and a checkpoint_id of its own"
        )


def _check_planner(planner: object) -> None:
    if planner is None:
        return
    advice = (
        "call torch.distributed.checkpoint's own function with "
        "storage_writer=async_ckpt.dcp.StorageWriter(url), which takes any planner"
    )
    if type(planner) is not DefaultSavePlanner:
        raise OptionError(
            f"planner=<{_kind(planner)}>: a save that waits for no other rank cannot ask it. Change the state "
            f"before the call, or {advice}"
        )
    for name, usual in _USUAL.items():
        if getattr(planner, name, usual) is not usual:
            raise OptionError(
                f"planner=DefaultSavePlanner({name}={not usual}): only {name}={usual} is supported here. "
                f"Leave it out, or {advice}"
            )


def _kind(value: object) -> str:
    kind = type(value)
    return f"{kind.__module__}.{kind.__qualname__}"
