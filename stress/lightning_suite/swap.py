"""A pytest plugin that gives every strategy of Lightning our plugin for a default, without a change to any file.

Guarantees: a strategy that was given no CheckpointIO of its own has an ``AsyncCheckpointIO`` each of whose
writes takes longer; Lightning's own ``AsyncCheckpointIO`` is ours; the outcome of every test is written down, one
line a test, as soon as it is known.

What does not belong here: which tests run, and what is made of the outcomes; that is ``__main__``'s.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from async_ckpt import AsyncCheckpointIO, OptionError
from async_ckpt.lightning import attach
from async_ckpt.testing import slowed
from stress.lightning_suite.processors import run_on_processors, show_names_of_dcp

__all__ = ["MODES", "SECONDS"]

MODES = ("synchronous", "callback", "plugin")  # the second is what a user has who installs the package
SECONDS = 0.15

_STRATEGIES = ("lightning.pytorch.strategies.strategy", "lightning.fabric.strategies.strategy")
_THEIR_PLUGIN = ("plugins.io.async_plugin", "plugins.io", "plugins")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Take what ``__main__`` passes."""
    parser.addoption("--suite-mode", choices=MODES, default=MODES[0])
    parser.addoption("--suite-outcomes", type=Path, required=True)
    parser.addoption("--suite-processors", action="store_true")


def pytest_configure(config: pytest.Config) -> None:
    """Replace the default before any test module is imported."""
    mode = config.getoption("--suite-mode")
    config.pluginmanager.register(_Recorder(config.getoption("--suite-outcomes")))
    if config.getoption("--suite-processors"):
        run_on_processors()
    if mode == "synchronous":
        return
    if config.getoption("--suite-processors"):
        show_names_of_dcp()
    for name in _STRATEGIES:
        _replace_default(importlib.import_module(name).Strategy)
    for name in _THEIR_PLUGIN:
        module: Any = importlib.import_module(f"lightning.pytorch.{name}")
        module.AsyncCheckpointIO = _SlowPlugin
    _after_init(importlib.import_module("lightning.pytorch").Trainer, _touch)
    _after_init(importlib.import_module("lightning.fabric").Fabric, _attach)
    accompany = _add_callback if mode == "callback" else _drop_callback
    _after_init(importlib.import_module("lightning.pytorch").Trainer, accompany)


class _Recorder:
    """Writes outcomes down; of a test's phases, the worst counts."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write one phase's outcome; a phase that passed is passed over but for the call itself."""
        if report.passed and report.when != "call":
            return
        crash = getattr(report.longrepr, "reprcrash", None)
        message = "" if not report.failed else str(crash or report.longreprtext)
        line = {"test": report.nodeid, "phase": report.when, "outcome": report.outcome, "message": message}
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


class _SlowPlugin(AsyncCheckpointIO):
    """Ours, with its writes slowed; picklable, since strategies go to child processes with it."""

    def __init__(self, checkpoint_io: Any = None) -> None:
        super().__init__(checkpoint_io, store_factory=slowed(SECONDS))


def _replace_default(strategy: Any) -> None:
    theirs = strategy.checkpoint_io

    def get(self: Any) -> Any:
        if self._checkpoint_io is None:
            self._checkpoint_io = _SlowPlugin()
        return theirs.fget(self)

    strategy.checkpoint_io = property(get, theirs.fset)


def _after_init(kind: Any, function: Callable[[Any], None]) -> None:
    init = kind.__init__

    @functools.wraps(init)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        function(self)

    kind.__init__ = wrapped


def _touch(trainer: Any) -> None:
    """Have the default made now: processes that are spawned import no plugin of pytest."""
    with suppress(
        TypeError, NotImplementedError
    ):  # strategies that take no such CheckpointIO, or none at all
        _ = trainer.strategy.checkpoint_io


def _attach(fabric: Any) -> None:
    """Have strategies that take no CheckpointIO save by our plugin, and wait after each save: tests look at once."""
    with suppress(OptionError):  # a double of the test's own
        plugin, save = attach(fabric, _SlowPlugin()), fabric.save

        def save_and_wait(*args: Any, **kwargs: Any) -> None:
            save(*args, **kwargs)
            plugin.teardown()  # no thread is left, as the suite wants it
            fabric.barrier()

        fabric.save = save_and_wait


def _add_callback(trainer: Any) -> None:
    """Do what the entry point does where the package is installed."""
    from async_ckpt.lightning.callback import FoundCallback

    _drop_callback(trainer)
    reorder = trainer._callback_connector._reorder_callbacks  # those that save come last
    trainer.callbacks = reorder([*trainer.callbacks, FoundCallback()])


def _drop_callback(trainer: Any) -> None:
    from async_ckpt.lightning.callback import FoundCallback

    trainer.callbacks = [each for each in trainer.callbacks if not isinstance(each, FoundCallback)]
