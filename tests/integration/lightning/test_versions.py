"""Which Lightning the tests run with: tox has environments for older ones."""

from __future__ import annotations

import importlib
import os

import pytest

ASKED_FOR = os.environ.get("ASYNC_CKPT_LIGHTNING", "2")  # set by tox


@pytest.mark.parametrize(
    "distribution",
    ["pytorch_lightning", "lightning_fabric", "lightning", "lightning.pytorch", "lightning.fabric"],
)
def test_version_is_the_one_asked_for(distribution: str) -> None:
    """What the tests import, of both distributions, is the version that the environment is named after."""
    assert f"{importlib.import_module(distribution).__version__}.".startswith(f"{ASKED_FOR}.")
