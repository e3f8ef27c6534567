"""Runs Lightning's own tests of checkpointing twice, with synchronous IO and with ours, and prints the difference.

``python -m stress.lightning_suite CHECKOUT [pytest arguments]``: CHECKOUT holds the ``tests`` of the Lightning that
is installed (a tag of its repository). With arguments, those name the tests, relative to CHECKOUT. What passes
first and not then is run again, alone, so that chance does not count; what fails again and is not in ``expected``
is printed and makes the exit status 1. Nothing in the checkout is changed.

``--processors`` chooses the tests of sharded checkpoints, which Lightning runs on GPUs only. Here, they run on two or
four processes on CPUs, each test alone, as Lightning runs them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from stress.lightning_suite.expected import reason
from stress.lightning_suite.swap import MODES, SECONDS

__all__ = ["CHOSEN", "main"]

ROOT = Path(__file__).parents[2]
RUN_SECONDS = 3600
TEST_SECONDS = 120

#: What saves, loads or removes a checkpoint on a CPU, or asks after one.
CHOSEN = (
    "tests/tests_pytorch/checkpointing",
    "tests/tests_pytorch/plugins/test_async_checkpoint.py",
    "tests/tests_pytorch/plugins/test_checkpoint_io_plugin.py",
    "tests/tests_pytorch/models/test_restore.py",
    "tests/tests_pytorch/models/test_hparams.py",
    "tests/tests_pytorch/models/test_hooks.py",
    "tests/tests_pytorch/models/test_cpu.py",
    "tests/tests_pytorch/callbacks/test_callbacks.py",
    "tests/tests_pytorch/callbacks/test_early_stopping.py",
    "tests/tests_pytorch/callbacks/test_finetuning_callback.py",
    "tests/tests_pytorch/callbacks/test_lambda_function.py",
    "tests/tests_pytorch/callbacks/test_lr_monitor.py",
    "tests/tests_pytorch/callbacks/test_model_checkpoint_additional_cases.py",
    "tests/tests_pytorch/callbacks/test_model_checkpoint_edge_cases.py",
    "tests/tests_pytorch/callbacks/test_model_checkpoint_manual_opt.py",
    "tests/tests_pytorch/callbacks/test_model_checkpoint_step_interval_val_metric.py",
    "tests/tests_pytorch/callbacks/test_pruning.py",
    "tests/tests_pytorch/callbacks/test_stochastic_weight_avg.py",
    "tests/tests_pytorch/callbacks/test_timer.py",
    "tests/tests_pytorch/callbacks/test_weight_averaging.py",
    "tests/tests_pytorch/core/test_datamodules.py",
    "tests/tests_pytorch/core/test_saving.py",
    "tests/tests_pytorch/core/test_metric_result_integration.py",
    "tests/tests_pytorch/trainer/test_trainer.py",
    "tests/tests_pytorch/trainer/connectors/test_callback_connector.py",
    "tests/tests_pytorch/trainer/connectors/test_checkpoint_connector.py",
    "tests/tests_pytorch/trainer/connectors/test_signal_connector.py",
    "tests/tests_pytorch/trainer/flags/test_fast_dev_run.py",
    "tests/tests_pytorch/trainer/optimization/test_optimizers.py",
    "tests/tests_pytorch/trainer/properties/test_estimated_stepping_batches.py",
    "tests/tests_pytorch/trainer/properties/test_log_dir.py",
    "tests/tests_pytorch/tuner",
    "tests/tests_pytorch/loops/test_double_iter_in_iterable_dataset.py",
    "tests/tests_pytorch/loops/test_loop_state_dict.py",
    "tests/tests_pytorch/loops/test_loops.py",
    "tests/tests_pytorch/loops/test_training_epoch_loop.py",
    "tests/tests_pytorch/loggers",
    "tests/tests_pytorch/strategies/launchers/test_multiprocessing.py",
    "tests/tests_pytorch/strategies/test_common.py",
    "tests/tests_pytorch/strategies/test_custom_strategy.py",
    "tests/tests_pytorch/strategies/test_ddp_integration.py",
    "tests/tests_pytorch/strategies/test_fsdp.py",
    "tests/tests_pytorch/strategies/test_model_parallel.py",
    "tests/tests_pytorch/accelerators/test_cpu.py",
    "tests/tests_pytorch/utilities/test_upgrade_checkpoint.py",
    "tests/tests_fabric/test_fabric.py",
    "tests/tests_fabric/strategies/test_ddp_integration.py",
    "tests/tests_fabric/strategies/test_fsdp.py",
    "tests/tests_fabric/strategies/test_model_parallel.py",
    "tests/tests_fabric/strategies/test_strategy.py",
    "tests/tests_fabric/utilities/test_cloud_io.py",
    "tests/tests_fabric/utilities/test_load.py",
)
#: Needs checkpoints of old versions, which are no part of a checkout.
_LEFT_OUT = ("tests/tests_pytorch/checkpointing/test_legacy_checkpoints.py",)

_TRAINER = "tests/tests_pytorch/strategies/test_model_parallel_integration.py"
_FABRIC = "tests/tests_fabric/strategies/test_model_parallel_integration.py"
#: What saves or loads a checkpoint of ModelParallelStrategy. FSDP refuses CPUs.
SHARDED = (
    f"{_TRAINER}::test_model_parallel_single_file_checkpoint_with_compile",
    f"{_TRAINER}::test_modules_without_parameters",
    f"{_TRAINER}::test_strategy_state_dict[True]",
    f"{_TRAINER}::test_strategy_state_dict[False]",
    f"{_TRAINER}::test_load_full_state_checkpoint_into_regular_model",
    f"{_TRAINER}::test_load_standard_checkpoint_into_distributed_model",
    f"{_TRAINER}::test_save_load_sharded_state_dict",
    f"{_FABRIC}::test_train_save_load",
    f"{_FABRIC}::test_save_full_state_dict",
    f"{_FABRIC}::test_load_full_state_dict_into_sharded_model",
    f"{_FABRIC}::test_save_filter",
    f"{_FABRIC}::test_save_sharded_and_consolidate_and_load",
    f"{_FABRIC}::test_load_raw_module_state",
)

Outcomes = dict[str, tuple[str, str]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, compare and print; return the exit status."""
    parser = argparse.ArgumentParser(prog="stress.lightning_suite")
    parser.add_argument("checkout", type=Path)
    parser.add_argument(
        "--mode", choices=MODES[1:], default=MODES[1], help="what to compare with synchronous IO"
    )
    parser.add_argument("--report", type=Path, help="a folder for the outcomes; without it they are not kept")
    parser.add_argument("--processors", action="store_true", help="the tests of sharded checkpoints, on CPUs")
    options, rest = parser.parse_known_args(arguments)
    checkout = options.checkout.resolve()
    run = partial(_run_alone if options.processors else _run_together, checkout)
    chosen = rest or (list(SHARDED) if options.processors else _chosen(checkout))
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.report or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        before = run(MODES[0], folder.resolve() / "synchronous.jsonl", chosen)
        after = run(options.mode, folder.resolve() / f"{options.mode}.jsonl", chosen)
        lost = _lost(before, after)
        unexpected = [test for test in lost if reason(test) is None]
        if unexpected:
            again = run(options.mode, folder.resolve() / f"{options.mode}-again.jsonl", unexpected)
            unexpected = _lost(before, again)
    print(f"\nsynchronous: {_counts(before)}\n{options.mode}, {SECONDS:g} s slower: {_counts(after)}")
    expected = [test for test in lost if reason(test) is not None]
    print(f"passed with synchronous IO and not with ours, as expected: {len(expected)}")
    for test in expected:
        print(f"  {test}: {reason(test)}")
    print(f"and beyond that: {len(unexpected)}")
    for test in unexpected:
        print(f"  {test}: {after[test][1]}")
    return 1 if unexpected else 0


def _chosen(checkout: Path) -> list[str]:
    chosen = [path for path in CHOSEN if (checkout / path).exists()]  # other versions of Lightning lack some
    return [*chosen, *(f"--ignore={path}" for path in _LEFT_OUT)]


def _run_together(checkout: Path, mode: str, outcomes: Path, arguments: Sequence[str]) -> Outcomes:
    """Run pytest on the checkout's tests."""
    outcomes.unlink(missing_ok=True)
    _pytest(checkout, mode, outcomes, arguments)
    if not outcomes.exists():
        raise SystemExit("pytest ran no test")
    return _read(outcomes)


def _run_alone(checkout: Path, mode: str, outcomes: Path, tests: Sequence[str]) -> Outcomes:
    """Run pytest once for each test, which starts the other processes; a failure of any of them counts."""
    outcomes.unlink(missing_ok=True)
    for test in tests:
        _pytest(checkout, mode, outcomes, ["--suite-processors", test])
    return _read(outcomes)


def _pytest(checkout: Path, mode: str, outcomes: Path, arguments: Sequence[str]) -> None:
    inherited = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(ROOT), str(checkout / "tests"), *([inherited] if inherited else [])])
    options = [
        "-q",
        "-p",
        "stress.lightning_suite.swap",
        "-p",
        "no:cacheprovider",
        f"--timeout={TEST_SECONDS}",
    ]
    options += [
        f"--suite-mode={mode}",
        f"--suite-outcomes={outcomes}",
        "--color=no",
        "--tb=no",
        "--no-header",
        "-rN",
    ]
    command = [sys.executable, "-m", "pytest", *options, *arguments]
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run(command, cwd=checkout, env=environment, timeout=RUN_SECONDS, check=False)


def _read(outcomes: Path) -> Outcomes:
    """Return each test's outcome and message; a failure outweighs the rest."""
    found: Outcomes = {}
    for line in outcomes.read_text().splitlines():
        entry = json.loads(line)
        known = found.get(entry["test"])
        if known is None or known[0] != "failed":
            found[entry["test"]] = (entry["outcome"], entry["message"])
    return found


def _lost(before: Outcomes, after: Outcomes) -> list[str]:
    return [
        t
        for t, (outcome, _) in before.items()
        if outcome == "passed" and t in after and after[t][0] == "failed"
    ]


def _counts(outcomes: Outcomes) -> str:
    kinds = [outcome for outcome, _ in outcomes.values()]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in ("passed", "failed", "skipped"))


if __name__ == "__main__":
    sys.exit(main())
