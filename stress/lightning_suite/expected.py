"""What of Lightning's own tests fails with our plugin, and why: that no asynchronous writer can do what they want.

Guarantees: nothing is in here for a defect of ours. What does not belong here: tests that fail with synchronous IO.
"""

from __future__ import annotations

__all__ = ["reason"]

_MOCKED = "counts calls of a torch.save or a TorchCheckpointIO that it has replaced; ours writes without"
_RMTREE = "replaces shutil.rmtree, so the directory in the file's place is not removed; ours finds it there"
_READS = "looks for the file while training goes on, right after the save"
_THEIRS = "is about the inside of Lightning's own plugin: a base that it is given, one wrapped into another"
_CALLBACKS = "wants no other callbacks in the Trainer than its own; ours is one, by its entry point"

_REASONS = {
    "checkpointing/test_checkpoint_callback_frequency.py::test_default_checkpoint_freq": _MOCKED,
    "checkpointing/test_checkpoint_callback_frequency.py::test_top_k": _MOCKED,
    "checkpointing/test_model_checkpoint.py::test_model_checkpoint_no_extraneous_invocations": _MOCKED,
    "checkpointing/test_model_checkpoint.py::test_none_monitor_not_alternating": _READS,
    "checkpointing/test_trainer_checkpoint.py::test_trainer_save_checkpoint_storage_options": _MOCKED,
    "plugins/test_checkpoint_io_plugin.py::test_async_checkpoint_plugin": _THEIRS,
    "plugins/test_checkpoint_io_plugin.py::test_multi_wrapped_checkpoint_io_initialization": _THEIRS,
    "strategies/test_fsdp.py::test_save_checkpoint_path_exists": _RMTREE,
    "strategies/test_model_parallel.py::test_save_checkpoint_path_exists": _RMTREE,
    "trainer/connectors/test_callback_connector.py::test_attach_model_callbacks": _CALLBACKS,
    "trainer/connectors/test_callback_connector.py::test_checkpoint_callbacks_are_last": _CALLBACKS,
    "trainer/connectors/test_callback_connector.py::test_configure_external_callbacks": _CALLBACKS,
}


def reason(test: str) -> str | None:
    """Return why *test*, a pytest node id, fails with any asynchronous writer; ``None`` where it should pass."""
    return _REASONS.get(test.partition("[")[0].removeprefix("tests/tests_pytorch/"))
