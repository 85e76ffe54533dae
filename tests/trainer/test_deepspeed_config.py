"""DeepSpeed's JSON: generated from a few fields, extended by a user's own file, never contradicted by it."""

import json
from pathlib import Path

import pytest

from mispo.config.load import load_config
from mispo.config.parts import AdamW, Muon
from mispo.config.schema import TrainerConfig
from mispo.trainer.engine import deepspeed_config


def test_the_fields_make_the_json() -> None:
    config = TrainerConfig(zero_stage=3, offload="parameters")
    made = deepspeed_config(config, AdamW(max_grad_norm=0.5))
    assert made["gradient_clipping"] == 0.5
    assert made["zero_optimization"] == {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
    }
    # What Muon would clip is its update; and DeepSpeed has it under ZeRO-3 with whole gradients only.
    muon = deepspeed_config(config, Muon())
    assert muon["gradient_clipping"] == 0
    assert muon["zero_optimization"]["reduce_scatter"] is False
    assert "offload_optimizer" not in deepspeed_config(TrainerConfig(zero_stage=2), Muon())["zero_optimization"]


def test_a_file_of_the_users_own_is_merged_in(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"zero_optimization": {"overlap_comm": True}, "steps_per_print": 5, "comms_logger": {}}))
    made = deepspeed_config(TrainerConfig(zero_stage=2, deepspeed=str(path)), Muon())
    assert made["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert made["steps_per_print"] == 5
    assert made["comms_logger"] == {}
    assert made["gradient_accumulation_steps"] == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"gradient_clipping": 2}', "sets 'gradient_clipping'; leave it out, optimizer decides it"),
        ('{"zero_optimization": {"stage": 1}}', "sets 'zero_optimization.stage'; leave it out, trainer.zero_stage"),
        ('{"bf16": {"enabled": true}}', "trainer.dtype decides it"),
        ("{", "cannot be read as JSON"),
        ("[]", "is not a JSON object"),
    ],
)
def test_what_contradicts_a_field_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "own.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"^trainer\.deepspeed: ") as error:
        deepspeed_config(TrainerConfig(deepspeed=str(path)), Muon())
    assert words in str(error.value)
    with pytest.raises(ValueError, match=r"trainer\.deepspeed: .* cannot be read as JSON"):
        deepspeed_config(TrainerConfig(deepspeed=str(tmp_path / "gone.json")), Muon())


def test_offloading_needs_its_zero_stage() -> None:
    with pytest.raises(ValueError, match=r"offload: parameters needs trainer\.zero_stage to be at least 3 \(is 2\)"):
        load_config(["trainer.offload=parameters", "trainer.zero_stage=2"])
