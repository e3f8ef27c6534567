"""Each kind of base: Lightning's ordinary one, anybody's own, wrappers around and below, Lightning's async plugin."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from async_ckpt import AsyncCheckpointIO, OptionError

pytestmark = pytest.mark.integration

WAIT_SECONDS = 20.0
#: How long a save looks out for another that runs beside it, which must not come.
LOOKOUT_SECONDS = 0.05


@pytest.fixture
def memory(request: pytest.FixtureRequest) -> Iterator[str]:
    """A directory of fsspec's file system in memory; it is empty before and after."""
    root = f"memory://{abs(hash(request.node.name))}"
    files = fsspec.filesystem("memory")
    files.mkdirs(root)
    yield root
    files.rm(root, recursive=True)


# -- TorchCheckpointIO


class Lookout:
    """Tells whether two saves ever ran beside each other."""

    def __init__(self) -> None:
        self.met = False
        self._inside = threading.Semaphore(1)
        self._second = threading.Event()

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Be looked at while running."""
        first = self._inside.acquire(blocking=False)
        if not first:
            self.met = True
            self._second.set()
        self._second.wait(LOOKOUT_SECONDS)
        try:
            yield
        finally:
            if first:
                self._inside.release()


@pytest.mark.parametrize("where", ["local", "memory"])
def test_saves_through_fsspec_transactions_are_serialised_per_file_system(
    tree: Any, tmp_path: Path, memory: str, where: str
) -> None:
    """Three plugins with a ``TorchCheckpointIO`` each save to one file system at the same time: none is lost.

    ``TorchCheckpointIO`` writes in an fsspec transaction, and all users of a file system share its one transaction.
    """
    folder = {"local": str(tmp_path), "memory": memory}[where]
    lookout = Lookout()

    class Watched(tree.fabric.plugins.TorchCheckpointIO):  # type: ignore[misc]  # a base found at run time
        def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            with lookout.inside():
                super().save_checkpoint(*args, **kwargs)

    plugins = [AsyncCheckpointIO(Watched(), max_concurrent_saves=3, queue_depth=3) for _ in range(3)]
    for number in range(6):
        plugins[number % 3].save_checkpoint({"number": number}, f"{folder}/{number}.ckpt")
    for plugin in plugins:
        plugin.teardown()
    assert not lookout.met
    plain = tree.fabric.plugins.TorchCheckpointIO()
    assert [plain.load_checkpoint(f"{folder}/{number}.ckpt")["number"] for number in range(6)] == list(
        range(6)
    )


def test_file_systems_do_not_wait_for_each_other(tree: Any, tmp_path: Path, memory: str) -> None:
    """While a ``TorchCheckpointIO`` is held up on one file system, its save to another becomes durable."""
    go = threading.Event()

    class HeldUpLocally(tree.fabric.plugins.TorchCheckpointIO):  # type: ignore[misc]
        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            assert str(path).startswith("memory:") or go.wait(WAIT_SECONDS)
            super().save_checkpoint(checkpoint, path, storage_options)

    plugin = AsyncCheckpointIO(HeldUpLocally(), max_concurrent_saves=2)
    plugin.save_checkpoint({"a": 1}, tmp_path / "a.ckpt")
    plugin.save_checkpoint({"b": 1}, f"{memory}/b.ckpt")
    assert plugin.load_checkpoint(f"{memory}/b.ckpt") == {"b": 1}
    assert not (tmp_path / "a.ckpt").exists()
    go.set()
    plugin.teardown()
    assert torch.load(tmp_path / "a.ckpt") == {"a": 1}


def test_options_that_the_ordinary_base_refuses(tree: Any, tmp_path: Path) -> None:
    """``TorchCheckpointIO`` refuses ``storage_options``: its own error comes, once, and no file."""
    plugin = AsyncCheckpointIO(tree.fabric.plugins.TorchCheckpointIO())
    plugin.save_checkpoint({"a": 1}, tmp_path / "a.ckpt", storage_options={"key": 1})
    with pytest.raises(TypeError, match="TorchCheckpointIO"):
        plugin.wait()
    plugin.teardown()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [
        {"queue_depth": 1, "overflow": "supersede"},
        {"memory_limit": 1},
        {"snapshot": "copy", "durability": "process"},
        {"max_concurrent_saves": 4, "overwrite": True},
        {"on_error": "warn", "flush_timeout": 60},
    ],
    ids=lambda options: " ".join(options),
)
def test_any_options_with_the_ordinary_base(
    tree: Any, tmp_path: Path, names: Any, options: dict[str, Any]
) -> None:
    """Whatever the plugin's options, a training with a ``TorchCheckpointIO`` leaves the same files, which load."""
    plugin = AsyncCheckpointIO(tree.fabric.plugins.TorchCheckpointIO(), **options)
    checkpoint = tree.checkpoints(tmp_path / "ckpt", save_last=True)
    model = tree.model()
    tree.trainer(tmp_path, max_epochs=3, plugins=[plugin], callbacks=[checkpoint]).fit(model)
    assert names(tmp_path / "ckpt") == ["epoch=2-step=12.ckpt", "last.ckpt"]
    for name in names(tmp_path / "ckpt"):
        saved = torch.load(tmp_path / "ckpt" / name)
        assert saved["global_step"] == 12
        assert torch.equal(saved["state_dict"]["layer.weight"], model.layer.weight)


# -- anybody's own


def _vault(tree: Any) -> Any:
    """Return a CheckpointIO with parameter names, options and a teardown of its own, that keeps files in a dict."""

    class Vault(tree.fabric.plugins.CheckpointIO):  # type: ignore[misc]
        def __init__(self) -> None:
            self.saved: dict[str, Any] = {}
            self.options: list[Any] = []
            self.loads: list[dict[str, Any]] = []
            self.teardowns = 0

        def save_checkpoint(
            self, state: Any, target: Any, storage_options: Any = None, *, shelf: str = "top"
        ) -> None:
            self.options.append((storage_options, shelf))
            self.saved[str(target)] = state

        def load_checkpoint(self, target: Any, **anything: Any) -> Any:
            self.loads.append(anything)
            return self.saved[str(target)]

        def remove_checkpoint(self, target: Any) -> None:
            del self.saved[str(target)]

        def teardown(self) -> None:
            self.teardowns += 1

    return Vault()


@pytest.mark.parametrize("given_to", ["trainer", "strategy"])
def test_a_custom_base_in_a_training(tree: Any, tmp_path: Path, given_to: str) -> None:
    """A CheckpointIO with names and keywords of its own works, given to the Trainer or to a Strategy."""
    vault = _vault(tree)
    plugin = AsyncCheckpointIO(vault)
    where: dict[str, Any] = {"plugins": [plugin]}
    if given_to == "strategy":
        where = {"strategy": tree.module("strategies").SingleDeviceStrategy("cpu", checkpoint_io=plugin)}
    model = tree.model()
    trainer = tree.trainer(tmp_path, max_epochs=3, callbacks=[tree.checkpoints(tmp_path / "ckpt")], **where)
    trainer.fit(model)
    newest = str(tmp_path / "ckpt" / "epoch=2-step=12.ckpt")
    assert vault.saved.keys() == {newest}
    assert torch.equal(vault.saved[newest]["state_dict"]["layer.weight"], model.layer.weight)
    assert vault.options == [(None, "top")] * 3
    assert vault.teardowns == 1


def test_storage_options_of_a_trainer_reach_the_base(tree: Any, tmp_path: Path) -> None:
    """``trainer.save_checkpoint(storage_options=…)`` gives them to the base, and a resume asks the base."""
    vault = _vault(tree)
    plugin = AsyncCheckpointIO(vault)
    trainer = tree.trainer(tmp_path, plugins=[plugin])
    trainer.fit(tree.model())
    trainer.save_checkpoint("vault/1", storage_options={"zone": 3})
    resumed = tree.trainer(tmp_path, max_epochs=2, plugins=[plugin])
    resumed.fit(tree.model(), ckpt_path="vault/1")
    assert resumed.global_step == 8
    assert vault.options == [({"zone": 3}, "top")]
    assert len(vault.loads) == 1


def test_calls_by_place_and_by_name_with_keywords_of_its_own(tree: Any) -> None:
    """A strategy's and a user's own calls of the plugin reach a custom base unchanged, in either form."""
    vault = _vault(tree)
    plugin = AsyncCheckpointIO(vault)
    weight = torch.ones(3)
    plugin.save_checkpoint({"w": weight}, "vault://1", {"zone": 1}, shelf="low")
    plugin.save_checkpoint(state={"w": weight}, target="vault://2", storage_options={"zone": 2}, shelf="high")
    plugin.save_checkpoint({"w": weight}, target="vault://3")
    weight.zero_()
    for target in ("vault://1", "vault://2"):
        assert torch.equal(plugin.load_checkpoint(target, weights_only=True)["w"], torch.ones(3))
    plugin.remove_checkpoint(target="vault://2")
    plugin.teardown()
    assert vault.options == [({"zone": 1}, "low"), ({"zone": 2}, "high"), (None, "top")]
    assert vault.loads == [{"weights_only": True}] * 2
    assert vault.saved.keys() == {"vault://1", "vault://3"}


# -- wrappers, from outside in


def _wrapper(tree: Any, name: str, log: list[str]) -> Callable[..., Any]:
    """Return a class like those that users derive from Lightning's wrapper; it logs and hands teardown on."""

    class Wrapper(tree.module("plugins.io.wrapper")._WrappingCheckpointIO):  # type: ignore[misc]
        def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            super().save_checkpoint(*args, **kwargs)
            log.append(f"{name} has saved")

        def teardown(self) -> None:
            log.append(f"{name} is torn down")
            self.checkpoint_io.teardown()

    return Wrapper


def _base(tree: Any, log: list[str], go: threading.Event) -> Any:
    class Base(tree.fabric.plugins.TorchCheckpointIO):  # type: ignore[misc]
        def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            assert go.wait(WAIT_SECONDS)
            super().save_checkpoint(*args, **kwargs)
            log.append("base has saved")

        def teardown(self) -> None:
            log.append("base is torn down")

    return Base()


def _fit_then_go(tree: Any, folder: Path, plugin: Any, go: threading.Event) -> None:
    """Train; saves are held until training is about to end, so only what ends the run can have flushed them."""

    class Goes(tree.pl.Callback):  # type: ignore[misc]
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            go.set()

    trainer = tree.trainer(folder, plugins=[plugin], callbacks=[Goes(), tree.checkpoints(folder)])
    trainer.fit(tree.model())
    assert torch.load(folder / "epoch=0-step=4.ckpt")["global_step"] == 4


def _ends(log: list[str]) -> list[str]:
    """Return who was torn down, in order."""
    return [line.split()[0] for line in log if line.endswith("is torn down")]


def test_ours_outside_of_a_wrapper(tree: Any, tmp_path: Path) -> None:
    """Ours outside: at the end of a fit it flushes through the wrapper below, then tears that down, then the base."""
    log: list[str] = []
    go = threading.Event()
    inner = _wrapper(tree, "inner", log)(_base(tree, log, go))
    _fit_then_go(tree, tmp_path, AsyncCheckpointIO(inner), go)
    assert log == ["base has saved", "inner has saved", "inner is torn down", "base is torn down"]


def test_ours_inside_of_a_wrapper(tree: Any, tmp_path: Path) -> None:
    """Ours inside: the wrapper's teardown comes first, hands on to ours, which flushes and tears the base down."""
    log: list[str] = []
    go = threading.Event()
    outer = _wrapper(tree, "outer", log)(AsyncCheckpointIO(_base(tree, log, go)))
    _fit_then_go(tree, tmp_path, outer, go)
    assert log[0] == "outer has saved"
    assert _ends(log) == ["outer", "base"]
    assert log.index("base has saved") < log.index("base is torn down")


def test_ours_between_two_wrappers(tree: Any, tmp_path: Path) -> None:
    """Two deep: the end of a fit goes from outside in, and what is pending is written on its way past ours."""
    log: list[str] = []
    go = threading.Event()
    inner = _wrapper(tree, "inner", log)(_base(tree, log, go))
    outer = _wrapper(tree, "outer", log)(AsyncCheckpointIO(inner))
    _fit_then_go(tree, tmp_path, outer, go)
    assert log[0] == "outer has saved"
    assert _ends(log) == ["outer", "inner", "base"]
    assert log.index("base has saved") < log.index("inner has saved") < log.index("inner is torn down")


@pytest.mark.parametrize("deep", [False, True], ids=["at once", "behind a wrapper"])
def test_an_asynchronous_base_is_refused(tree: Any, deep: bool) -> None:
    """Ours does not take as its base what returns before it has written: its saves would pass for durable (D1)."""
    for asynchronous in (AsyncCheckpointIO(), _theirs(tree)()):
        base = _wrapper(tree, "between", [])(asynchronous) if deep else asynchronous
        with pytest.raises((TypeError, OptionError), match="asynchronous"):
            AsyncCheckpointIO(base)


# -- Lightning's own AsyncCheckpointIO, the thing replaced


def _theirs(tree: Any) -> Any:
    return tree.module("plugins.io.async_plugin").AsyncCheckpointIO


@pytest.fixture(params=["ours", "theirs"])
def async_io(request: pytest.FixtureRequest, tree: Any) -> Any:
    """The class that is imported, from here or from Lightning: what follows holds for both."""
    return AsyncCheckpointIO if request.param == "ours" else _theirs(tree)


def _skip_where_upstream_lacks(name: str, async_io: Any) -> None:
    """Skip what older versions of Lightning's plugin do not do; ours does it with all of them."""
    upstream = async_io is not AsyncCheckpointIO
    if upstream and not hasattr(async_io, name) and not hasattr(sys.modules[async_io.__module__], name):
        pytest.skip(f"this Lightning's own plugin does not do so: it has no {name}")


def test_the_import_is_all_that_changes(tree: Any, async_io: Any, tmp_path: Path, names: Any) -> None:
    """A training with each of the three ways to make Lightning's plugin needs another import and no other change."""
    torch_io = tree.fabric.plugins.TorchCheckpointIO
    made = async_io(), async_io(torch_io()), async_io(checkpoint_io=torch_io())
    for number, plugin in enumerate(made):
        assert isinstance(plugin, tree.fabric.plugins.CheckpointIO)
        folder = tmp_path / str(number)
        callbacks = [tree.checkpoints(folder, save_top_k=-1)]
        tree.trainer(tmp_path, max_epochs=2, plugins=[plugin], callbacks=callbacks).fit(tree.model())
        assert names(folder) == ["epoch=0-step=4.ckpt", "epoch=1-step=8.ckpt"]
        assert torch.load(folder / "epoch=1-step=8.ckpt")["global_step"] == 8


def test_every_public_name_of_lightnings_is_there(tree: Any) -> None:
    """What Lightning's plugin offers by a public name, ours offers by the same."""
    assert {name for name in dir(_theirs(tree)) if not name.startswith("_")} <= set(dir(AsyncCheckpointIO))


def test_upstream_save_does_not_block(tree: Any, async_io: Any, tmp_path: Path) -> None:
    """Upstream's first behaviour: ``save_checkpoint`` returns while the base still writes."""
    log: list[str] = []
    go = threading.Event()
    plugin = async_io(_base(tree, log, go))
    plugin.save_checkpoint({"a": 1}, tmp_path / "a.ckpt")
    assert log == []
    go.set()
    plugin.teardown()
    assert log[0] == "base has saved"
    assert torch.load(tmp_path / "a.ckpt") == {"a": 1}


@pytest.mark.parametrize("seen_at", ["next save", "teardown"])
def test_upstream_error_is_raised(tree: Any, async_io: Any, tmp_path: Path, seen_at: str) -> None:
    """Upstream's second behaviour: an error of the base is raised, as it is, at the next save or at teardown."""
    go = threading.Event()

    class Broken(tree.fabric.plugins.TorchCheckpointIO):  # type: ignore[misc]
        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            assert go.wait(WAIT_SECONDS)
            if Path(path).name == "bad.ckpt":
                raise ValueError("the base broke")
            super().save_checkpoint(checkpoint, path, storage_options)

    plugin = async_io(Broken())
    plugin.save_checkpoint({"a": 1}, tmp_path / "bad.ckpt")
    go.set()
    with pytest.raises(ValueError, match="the base broke"):
        plugin.teardown() if seen_at == "teardown" else _save_until_it_raises(plugin, tmp_path / "good.ckpt")
    # Upstream raises its error for ever.
    with nullcontext() if async_io is AsyncCheckpointIO else suppress(ValueError):
        plugin.teardown()


def _save_until_it_raises(plugin: Any, path: Path) -> None:
    """Save again; the next save is enough unless it comes before the worker has failed."""
    for _ in range(10_000):
        plugin.save_checkpoint({"a": 1}, path)


def test_upstream_teardown_ends_the_threads(tree: Any, async_io: Any, tmp_path: Path) -> None:
    """Upstream's third behaviour: after ``teardown`` all is written, no thread is left, and it works again."""
    _skip_where_upstream_lacks("_ensure_setup", async_io)
    before = set(threading.enumerate())
    plugin = async_io(tree.fabric.plugins.TorchCheckpointIO())
    for number in range(2):
        plugin.save_checkpoint({"number": number}, tmp_path / f"{number}.ckpt")
        assert set(threading.enumerate()) - before
        plugin.teardown()
        assert set(threading.enumerate()) <= before
        assert torch.load(tmp_path / f"{number}.ckpt") == {"number": number}


def test_upstream_clone_is_deep_enough(tree: Any, async_io: Any, tmp_path: Path) -> None:
    """Upstream's fourth behaviour: what tensors hold, however deep in the state, is that of the moment of the save."""
    _skip_where_upstream_lacks("_clone_tensor", async_io)
    log: list[str] = []
    go = threading.Event()
    plugin = async_io(_base(tree, log, go))
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    state = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict()],
        "nested": [{"t": torch.ones(3)}],
    }
    expected = [tensor.clone() for tensor in _tensors(state)]
    plugin.save_checkpoint(checkpoint=state, path=tmp_path / "a.ckpt")
    with torch.no_grad():
        for tensor in _tensors(state):
            tensor.fill_(7)
    go.set()
    plugin.teardown()
    saved = _tensors(torch.load(tmp_path / "a.ckpt"))
    assert len(saved) == len(expected) > 6
    assert all(torch.equal(one, other) for one, other in zip(saved, expected, strict=True))


def _tensors(state: Any) -> list[torch.Tensor]:
    """Return the tensors of nested dicts and lists, in order."""
    if isinstance(state, torch.Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
    return [tensor for value in values for tensor in _tensors(value)]
