"""Random set-ups of ``ModelCheckpoint``: programs of fits, other calls and files of the user's own, as plain values.

Guarantees: a seed names one program for ever. A program says all that happens, scores included, so what it leaves with
synchronous checkpoints is what it has to leave with ours.

What does not belong here: how one is run (running), and what is compared (test_any_setup).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from random import Random
from typing import Any, Literal, TypeAlias

__all__ = [
    "BATCHES",
    "FOLDERS",
    "PRETRAINED",
    "Fit",
    "Link",
    "Program",
    "Put",
    "Save",
    "Unlink",
    "Validate",
    "random_program",
]

BATCHES = 2
"""Of an epoch."""

FOLDERS = ("a", "b", "checkpoints")
"""Where checkpoints go; ``checkpoints`` is Lightning's own choice."""

PRETRAINED = "shared/pretrained.ckpt"
"""A checkpoint of another run."""

# What ModelCheckpoint may itself want to save to.
_NAMES = (
    "last.ckpt",
    "last-v1.ckpt",
    "last-epoch=0.ckpt",
    "same.ckpt",
    "same-v1.ckpt",
    "epoch=0-step=2.ckpt",
    "epoch=1-step=4.ckpt",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """One ``fit``.

    Attributes:
        epochs: ``max_epochs``, those of earlier fits included.
        scores: ``val_loss`` of each epoch, and ``loss`` of each batch by its global step, over and over.
        resume: ``ckpt_path``.
        again: with the Trainer and the callbacks of the fit before; else with new ones, as another process has.
        breaks_at: the global step at which it ends, and how.
        trainer: options of the Trainer.
        checkpoints: options of each ``ModelCheckpoint``; ``dirpath`` below the root, ``CHECKPOINT_NAME_LAST`` as well.
        copies: whether a callback of the user's own saves and removes in between.
        logger: whether a logger is told of checkpoints.
    """

    epochs: int
    scores: tuple[float, ...]
    resume: Literal["last", "best"] | None = None
    again: bool = False
    breaks_at: int | None = None
    breaks_by: type[BaseException] = ValueError
    trainer: dict[str, Any] = field(default_factory=dict)
    checkpoints: tuple[dict[str, Any], ...] = ()
    copies: bool = False
    logger: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Validate:
    """``validate``, with the Trainer of the fit before."""

    resume: Literal["last", "best"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Save:
    """``save_checkpoint``, with the Trainer of the fit before."""

    name: str
    weights_only: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Put:
    """The user copies ``PRETRAINED`` there."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """The user makes a link."""

    name: str
    target: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Unlink:
    """The user deletes a file or a link, if there is one."""

    name: str


Step: TypeAlias = Fit | Validate | Save | Put | Link | Unlink
Program: TypeAlias = tuple[Step, ...]

_FILENAMES = (
    *(None, None, None),
    "same",
    "{epoch}",
    "{step}-{val_loss:.1f}",
    "{val_loss:.1f}",
    "of-{epoch}/{step}",
    "last",
    "last-{step}",
)
_TRIGGERS: tuple[dict[str, Any], ...] = (
    *({}, {}, {}),
    {"every_n_epochs": 2},
    {"every_n_train_steps": 1},
    {"every_n_train_steps": 3},
    {"train_time_interval": timedelta(0)},
    {"train_time_interval": timedelta(hours=1)},
)
_TRAINERS: tuple[dict[str, Any], ...] = (
    *({}, {}, {}),
    {"limit_val_batches": 0},
    {"val_check_interval": 0.5},
    {"check_val_every_n_epoch": 2},
)
_SCORES = (0.1, 0.2, 0.2, 0.3, 0.4, float("nan"), float("inf"))


def random_program(seed: int) -> Program:
    """Make a program: files of the user's own, then fits with the same checkpoints, and something in between."""
    rng = Random(seed)
    checkpoints = _checkpoints(rng)
    steps: list[Step] = [_others(rng) for _ in range(rng.choice((0, 0, 1, 2)))]
    epochs = 0
    for number in range(rng.choice((1, 2, 2, 3))):
        epochs += rng.choice((1, 2, 2))
        again = number > 0 and rng.random() < 0.4
        steps.append(
            Fit(
                epochs=epochs,
                scores=tuple(rng.choice(_SCORES) for _ in range(4)),
                resume=_resume(rng, number, again),
                again=again,
                breaks_at=rng.choice((None, None, rng.randrange(2 * epochs))),
                breaks_by=rng.choice((ValueError, ValueError, KeyboardInterrupt)),
                trainer=rng.choice(_TRAINERS),
                checkpoints=checkpoints,
                copies=rng.random() < 0.1,
                logger=rng.random() < 0.2,
            )
        )
        if rng.random() < 0.4:
            steps.append(_after(rng))
    return tuple(steps)


def _resume(rng: Random, number: int, again: bool) -> Literal["last", "best"] | None:
    if number == 0:
        return rng.choice((None, None, "last"))
    return rng.choice(("last", "best", None) if again else ("last", "last", None))


def _checkpoints(rng: Random) -> tuple[dict[str, Any], ...]:
    """Return options of one or more; Lightning wants them to differ in what it tells their states apart by."""
    first, *others = (_checkpoint(rng) for _ in range(rng.choice((1, 1, 1, 2, 3))))
    chosen = [first]
    for options in others:
        if all(_is_told_apart(options, each) for each in chosen):
            chosen.append(options)
    return tuple(chosen)


def _is_told_apart(one: dict[str, Any], other: dict[str, Any]) -> bool:
    triggers = [
        {name: each[name] for name in each if name.startswith(("every", "train"))} for each in (one, other)
    ]
    return (one["monitor"], one["mode"]) != (other["monitor"], other["mode"]) or triggers[0] != triggers[1]


def _checkpoint(rng: Random) -> dict[str, Any]:
    monitor = rng.choice((None, "val_loss", "val_loss", "loss", "step"))
    options = {
        "dirpath": rng.choice(("a", "a", "b", "alias", "a/../a", None)),
        "monitor": monitor,
        "mode": rng.choice(("min", "max")),
        "save_top_k": rng.choice((-1, 0, 1) if monitor is None else (-1, 0, 1, 1, 2, 3)),
        "save_last": rng.choice((None, True, "link", "link")),
        "filename": rng.choice(_FILENAMES),
        "save_weights_only": rng.random() < 0.2,
        "save_on_train_epoch_end": rng.choice((None, True, False)),
        "enable_version_counter": rng.random() < 0.7,
        "save_on_exception": rng.random() < 0.5,
        **rng.choice(_TRIGGERS),
    }
    if rng.random() < 0.2:
        options["CHECKPOINT_NAME_LAST"] = rng.choice(("last-{epoch}", "newest", "same"))
    return options


def _others(rng: Random) -> Step:
    """Return what the user does before there is a Trainer."""
    if rng.random() < 0.4:
        return Put(name=_file(rng))
    return Link(name=_file(rng), target=rng.choice((_file(rng), PRETRAINED, "gone.ckpt")))


def _after(rng: Random) -> Step:
    kind = rng.choice((Validate, Save, Unlink, None))
    if kind is Validate:
        return Validate(resume=rng.choice(("last", "best")))
    if kind is Save:
        return Save(name=_file(rng), weights_only=rng.random() < 0.3)
    if kind is Unlink:
        return Unlink(name=_file(rng))
    return _others(rng)


def _file(rng: Random) -> str:
    return f"{rng.choice(FOLDERS)}/{rng.choice(_NAMES)}"
