"""Models that many tests of this room share."""

import pytest
from transformers import PreTrainedModel

from support.tiny_models import tiny_model


@pytest.fixture(params=["step", "qwen", "qwen-sliding", "llama"])
def any_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(request.param)


@pytest.fixture
def step_model() -> PreTrainedModel:
    return tiny_model("step")
