"""Train on real digits with asynchronous checkpoints, lose a run to SIGKILL in mid-save, and get it back.

Six short acts, each of which proves something or makes the script exit with 1:

1. train, with ``Trainer(plugins=[AsyncCheckpointIO(queue_depth=2)])``
2. resume from ``last.ckpt``, and train on
3. start a second run in a process of its own, and kill it in the middle of a save
4. resume that one too
5. open what was written with plain ``torch.load``
6. the same training with this plugin, with Lightning's own, and with none: what does a save cost?

``python -m demo.train_digits --help`` lists the options. No GPU, a minute or two on two cores. Everything goes to a
local directory, or with ``--store s3`` (or ``gcs``, ``azure``) to a bucket on a real server, started on this machine: a
URL in place of a path is all the difference. Without ``tox -e demo``, which installs all it needs, install the packages
``lightning`` and ``scikit-learn``.

The model and the Trainer are in ``digits.py``, the run that is killed in ``killed.py``, the comparison in ``costs.py``.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from async_ckpt import AsyncCheckpointIO
from async_ckpt.events import Event, Swept
from demo.costs import NONE, OURS, measure, table
from demo.digits import FirstWeights, ProgressLine, prepare_process, train
from demo.killed import kill_in_mid_save
from demo.places import STORES, Place, files, intact, load, place
from demo.printing import Proofs, say, title
from stress.servers.install import ServersMissing


def play(where: Place, epochs: int, rounds: int) -> list[str]:
    """Play the six acts in *where*; return the claims that did not hold."""
    proofs = Proofs()
    first, second = f"{where.root}/first", f"{where.root}/second"
    train_anew(proofs, first, epochs)
    train_on(proofs, first, epochs)
    left = lose_in_mid_save(proofs, where, second, epochs)
    if proofs.failed:
        return proofs.failed  # there may be nothing to resume
    resume_the_lost(proofs, where, second, epochs, left)
    open_with_torch(proofs, f"{first}/last.ckpt")
    compare(proofs, where.root, epochs, rounds)
    return proofs.failed


def train_anew(proofs: Proofs, folder: str, epochs: int) -> None:
    """Act 1."""
    title("1. Train")
    plugin = AsyncCheckpointIO(queue_depth=2)
    train(folder, epochs, plugins=[plugin], callbacks=[ProgressLine(plugin)])
    proofs.show("the two best checkpoints and last.ckpt are there, nothing else", len(files(folder)) == 3)


def train_on(proofs: Proofs, folder: str, epochs: int) -> None:
    """Act 2."""
    title("2. Resume from last.ckpt and train on")
    saved = load(f"{folder}/last.ckpt")
    began = FirstWeights()
    plugin = AsyncCheckpointIO(queue_depth=2)
    trainer = train(
        folder, epochs + 2, plugins=[plugin], callbacks=[began, ProgressLine(plugin)], resume=True
    )
    steps, steps_an_epoch = saved["global_step"], saved["global_step"] // epochs
    proofs.show(
        "it began with the weights of the file, bit for bit", same(began.weights, saved["state_dict"])
    )
    proofs.show(
        f"it went on at step {steps}, to {trainer.global_step}",
        trainer.global_step == steps + 2 * steps_an_epoch,
    )


def lose_in_mid_save(proofs: Proofs, where: Place, folder: str, epochs: int) -> list[str]:
    """Act 3; return what the killed run has left that nobody should ever see."""
    title("3. Kill a second run in the middle of a save")
    code = kill_in_mid_save(folder, epochs)
    proofs.show("the run was ended by SIGKILL", code == -signal.SIGKILL)
    if proofs.failed:
        return []
    left = where.unfinished(folder) if where.unfinished else []
    if where.unfinished:
        proofs.show(f"what it had not finished is still there, out of sight: {len(left)}", bool(left))
    proofs.show("every checkpoint has all its bytes", all(intact(file) for file in files(folder)))
    saved = load(f"{folder}/last.ckpt")
    proofs.show(f"last.ckpt is the one before, of epoch {saved['epoch'] + 1}", saved["epoch"] == 1)
    return left


def resume_the_lost(proofs: Proofs, where: Place, folder: str, epochs: int, left: list[str]) -> None:
    """Act 4."""
    title("4. Resume the killed run")
    saved = load(f"{folder}/last.ckpt")
    swept: list[str] = []

    def observer(event: Event) -> None:
        if isinstance(event, Swept):
            swept.extend(event.names)

    began = FirstWeights()
    plugin = AsyncCheckpointIO(queue_depth=2, observer=observer)
    trainer = train(folder, epochs, plugins=[plugin], callbacks=[began, ProgressLine(plugin)], resume=True)
    proofs.show(
        "it began with the weights of the file, bit for bit", same(began.weights, saved["state_dict"])
    )
    proofs.show("it trained to the end", trainer.current_epoch == epochs)
    if where.unfinished:
        proofs.show(
            "its first save swept away what the killed run had left",
            len(swept) == len(left) and where.unfinished(folder) == [],
        )


def open_with_torch(proofs: Proofs, file: str) -> None:
    """Act 5."""
    title("5. Open the file with plain torch.load")
    say(f"torch.load(file, weights_only=True) → {', '.join(load(file))}")
    proofs.show("it is an ordinary checkpoint, and its checksums are right", intact(file))


def compare(proofs: Proofs, root: str, epochs: int, rounds: int) -> None:
    """Act 6."""
    title("6. What does a save cost?")
    costs = measure(root, epochs, rounds)
    say()
    for line in table(costs):
        say(line)
    say()
    say("Times are medians, but for the worst.")
    say("stall: inside save_checkpoint, as the training loop sees it.")
    if "://" in root:
        say("until written: from the call on, until the object is there.")
    else:
        say("until written: from the call on. With async_ckpt the file is on the disk by then (fsync) and")
        say("  survives a loss of power; with the others the operating system has it, and writes it later.")
    say("training: all of fit, to the end of the last save; the writer shares its cores.")
    stall = {name: median(cost.stalls) for name, cost in costs.items()}
    proofs.show(
        f"a save stalls training {stall[NONE] / stall[OURS]:.1f} times less than with no plugin",
        stall[OURS] < stall[NONE],
    )


def same(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    """Return whether two sets of weights are equal, bit for bit."""
    return weights.keys() == others.keys() and all(
        torch.equal(weights[name], others[name]) for name in weights
    )


def options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--epochs", type=int, default=5, help="epochs of each training, 3 or more (default 5)"
    )
    parser.add_argument("--store", choices=STORES, default="local", help="what to save to (default local)")
    parser.add_argument(
        "--rounds", type=int, help="trainings a contestant in act 6 (default 3, on a server 1)"
    )
    parser.add_argument("--directory", type=Path, help="where local ones go (default: a temporary directory)")
    parser.add_argument("--keep", action="store_true", help="leave local ones there")
    chosen = parser.parse_args()
    if chosen.epochs < 3:
        parser.error("--epochs must be 3 or more: the run that is killed dies in its third")
    if chosen.rounds is None:
        chosen.rounds = 3 if chosen.store == "local" else 1
    return chosen


def main() -> int:
    """Play the six acts; return the exit code."""
    chosen = options()
    prepare_process()
    if chosen.directory is not None:
        chosen.directory.mkdir(parents=True, exist_ok=True)
    begin = perf_counter()
    try:
        with place(chosen.store, chosen.directory, keep=chosen.keep) as where:
            print(f"Checkpoints go to {where.root}")
            failed = play(where, chosen.epochs, chosen.rounds)
    except ServersMissing as missing:
        print(f"{missing}\n`tox -e demo -- --store {chosen.store}` does both.", file=sys.stderr)
        return 2
    outcome = f"{len(failed)} claims FAILED" if failed else "Everything was proven"
    print(f"\n{outcome}, in {perf_counter() - begin:.0f} s.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
