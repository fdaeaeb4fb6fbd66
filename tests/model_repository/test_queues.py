"""Requests that meet in a queue must not wait for nothing."""

import pytest

from export.repository import read_config
from tests.conftest import ROOT

REPOSITORY = ROOT / "model_repository"
MODELS = sorted(path.parent.name for path in REPOSITORY.glob("*/config.pbtxt"))


@pytest.mark.parametrize("model", MODELS)
def test_no_model_limits_its_queue(model: str) -> None:
    """With a bound or a timeout, Triton leaves requests waiting for up to half a second."""
    batching = read_config(REPOSITORY, model).dynamic_batching
    assert not batching.HasField("default_queue_policy")
    assert not batching.priority_queue_policy
    assert batching.priority_levels == 0
