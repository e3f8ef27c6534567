"""What hooks add to a checkpoint, and how it is loaded: the same with our plugin as with synchronous checkpoints."""

from __future__ import annotations

import collections
import inspect
import pickle
from typing import Any

import pytest
import torch

from tests.integration.lightning.both_ways import BOTH_WAYS, ONE_TREE, Both, validation_step

pytestmark = BOTH_WAYS


class Odd:
    """An object of a class that nobody knows, equal by its content."""

    def __init__(self, *content: Any) -> None:
        self.content = list(content)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Odd) and self.content == other.content

    __hash__ = None  # type: ignore[assignment]  # it changes


def odd_objects() -> dict[str, Any]:
    """Return objects of many kinds, each of which the test changes after each save."""
    return {
        "object": Odd(1, {"two": 2}),
        "list": [[1], (2,)],
        "set": {1},
        "deque": collections.deque([1], maxlen=3),
        "array": pytest.importorskip("numpy").zeros(3),
        "tensor": torch.zeros(3),
        "module": torch.nn.Linear(2, 2, bias=False),
        "bytes": bytearray(b"ab"),
    }


def change(objects: dict[str, Any], step: int) -> None:
    """Change every object in place."""
    objects["object"].content.append(step)
    objects["list"][0].append(step)
    objects["set"].add(step)
    objects["deque"].append(step)
    objects["array"] += 1
    objects["tensor"].add_(1)
    with torch.no_grad():
        objects["module"].weight.fill_(step)
    objects["bytes"].append(step)


@ONE_TREE
def test_hooks(both: Both, tree: Any) -> None:
    """Objects of any kind that module, data module and callback add are written as they were; and all come back."""
    loaded: list[dict[str, Any]] = []

    def hooks(key: str) -> dict[str, Any]:
        def on_save_checkpoint(self: Any, *args: Any) -> None:
            args[-1][key] = self.objects

        def on_load_checkpoint(self: Any, *args: Any) -> None:
            loaded.append(args[-1][key])

        return {"on_save_checkpoint": on_save_checkpoint, "on_load_checkpoint": on_load_checkpoint}

    def state_dict(self: Any) -> dict[str, Any]:
        return dict(self.objects)

    def load_state_dict(self: Any, state: dict[str, Any]) -> None:
        loaded.append(state)

    methods = {"state_dict": state_dict, "load_state_dict": load_state_dict}  # what a data module has instead

    def train(options: dict[str, Any]) -> list[dict[str, Any]]:
        loaded.clear()
        torch.manual_seed(1)
        holders = [
            tree.model(objects=odd_objects(), **hooks("from the module")),
            type("Data", (tree.pl.LightningDataModule,), methods)(),
            type("Own", (tree.pl.Callback,), hooks("from the callback"))(),
        ]
        holders[1].objects, holders[2].objects = odd_objects(), odd_objects()
        module, data, own = holders
        data.train_dataloader = data.val_dataloader = module.train_dataloader

        def on_train_batch_end(trainer: Any, *args: Any) -> None:
            trainer.save_checkpoint(both.folder / f"{trainer.global_step}.ckpt")
            for holder in holders:
                change(holder.objects, trainer.global_step)

        own.on_train_batch_end = on_train_batch_end
        for path in (None, both.folder / "2.ckpt"):
            trainer = tree.trainer(
                both.folder, plugins=options["plugins"], callbacks=[own, *options["callbacks"]]
            )
            known = "weights_only" in inspect.signature(trainer.fit).parameters
            trainer.fit(module, datamodule=data, ckpt_path=path, **({"weights_only": False} if known else {}))
            trainer.fit_loop.max_epochs = 1
        return [dict(objects) for objects in loaded]

    expected, actual = both.run(train)
    assert len(actual) == len(expected) == 3
    assert actual[0]["object"] == Odd(1, {"two": 2}, 1)
    for one, other in zip(actual, expected, strict=True):
        assert pickle.dumps({**one, "module": None, "tensor": None}) == pickle.dumps(
            {**other, "module": None, "tensor": None}
        )


@pytest.mark.parametrize("weights_only", [True, False, None])
@pytest.mark.parametrize("method", ["fit", "validate", "test", "predict"])
@ONE_TREE
@pytest.mark.parametrize("companion", [False], indirect=True, ids=["plugin alone"])
def test_weights_only(both: Both, tree: Any, method: str, weights_only: bool | None) -> None:
    """``weights_only`` decides with ours as with synchronous checkpoints whether an unknown class is an error."""
    if "weights_only" not in inspect.signature(tree.pl.Trainer.fit).parameters:
        pytest.skip("this Lightning's Trainer has no weights_only")

    def on_save_checkpoint(self: Any, checkpoint: Any) -> None:
        checkpoint["odd"] = Odd(1)

    def train(options: dict[str, Any]) -> type[BaseException] | None:
        module = tree.model(on_save_checkpoint=on_save_checkpoint)
        trainer = tree.trainer(both.folder, **options)
        trainer.fit(module)
        trainer.save_checkpoint(both.folder / "a.ckpt")
        trainer.fit_loop.max_epochs = 2
        data = module.train_dataloader()
        try:
            getattr(trainer, method)(
                tree.model(predict_step=lambda *_: 0),
                data,
                ckpt_path=both.folder / "a.ckpt",
                weights_only=weights_only,
            )
        except pickle.UnpicklingError as error:
            return type(error)
        finally:
            for plugin in options["plugins"]:
                plugin.teardown()
        return None

    expected, actual = both.run(train)
    assert actual is expected
    assert (actual is None) == (weights_only is False)


@ONE_TREE
@pytest.mark.parametrize("method", ["validate", "test", "predict"])
def test_best_right_after_fit(both: Both, tree: Any, method: str) -> None:
    """``ckpt_path="best"`` loads the best checkpoint for each of the other entry points, as synchronous IO does."""

    def train(options: dict[str, Any]) -> Any:
        checkpoint = tree.checkpoints(both.folder / "ckpt", monitor="val_loss", save_top_k=1)
        module = tree.model(validation_step=validation_step, predict_step=lambda *_: 0)
        trainer = tree.trainer(
            both.folder,
            max_epochs=3,
            plugins=options["plugins"],
            callbacks=[checkpoint, *options["callbacks"]],
        )
        trainer.fit(module)
        getattr(trainer, method)(dataloaders=module.train_dataloader(), ckpt_path="best")
        return trainer.ckpt_path, module.state_dict()

    expected, actual = both.run(train)
    assert actual[0] == expected[0] == str(both.folder / "ckpt" / "epoch=1-step=8.ckpt")
    for name, weight in expected[1].items():
        assert torch.equal(actual[1][name], weight)
