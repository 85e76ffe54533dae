"""What launchers leave in the environment: taken, filled in, or refused with the field that decides."""

import os

import pytest

from mispo.config.parts import AdamW
from mispo.config.schema import TrainerConfig
from mispo.trainer.ranks import prepare_environment


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a launcher of two ranks leaves it; what a test changes is undone."""
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)


def test_what_a_launcher_says_about_ranks_is_taken() -> None:
    prepare_environment(TrainerConfig(), AdamW())
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["MASTER_PORT"]) == ("1", "2", "1")


def test_one_process_alone_is_rank_0_of_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE")
    prepare_environment(TrainerConfig(), AdamW())
    assert (os.environ["RANK"], os.environ["LOCAL_RANK"], os.environ["WORLD_SIZE"]) == ("0", "0", "1")


def test_a_plain_accelerate_launch_is_refused_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves no WORLD_SIZE, and starts one process however many were asked for."""
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "False")
    with pytest.raises(ValueError, match=r"a single process without DeepSpeed, .* add --use_deepspeed"):
        prepare_environment(TrainerConfig(), AdamW())


@pytest.mark.parametrize(
    ("name", "value", "field"),
    [
        ("MIXED_PRECISION", "bf16", "trainer.dtype"),
        ("MIXED_PRECISION", "fp16", "trainer.dtype"),
        ("GRADIENT_ACCUMULATION_STEPS", "4", "trainer.tokens_per_microbatch"),
        ("GRADIENT_CLIPPING", "0.5", "optimizer"),
        ("DEEPSPEED_ZERO_STAGE", "2", "trainer.zero_stage"),
        ("DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none", "trainer.offload"),
        ("DEEPSPEED_OFFLOAD_PARAM_DEVICE", "nvme", "trainer.offload"),
        ("DEEPSPEED_CONFIG_FILE", "zero.json", "trainer.deepspeed"),
        ("USE_FSDP", "true", "trainer.zero_stage"),
    ],
)
def test_what_accelerate_was_told_otherwise_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, field: str
) -> None:
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with pytest.raises(ValueError, match=f"^{field}: ACCELERATE_{name}={value} .*{field} alone decides"):
        prepare_environment(TrainerConfig(zero_stage=3, offload="parameters"), AdamW())


def test_an_accelerate_config_that_agrees_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """It lists its fields, and accelerate would refuse them beside a DeepSpeed configuration of our own."""
    agreeing = {
        "MIXED_PRECISION": "no",
        "GRADIENT_ACCUMULATION_STEPS": "1",
        "GRADIENT_CLIPPING": "1.0",
        "DEEPSPEED_ZERO_STAGE": "2",
        "DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
        "DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
        "CONFIG_DS_FIELDS": "zero_stage,gradient_clipping",
    }
    for name, value in agreeing.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    prepare_environment(TrainerConfig(zero_stage=2, offload="optimizer"), AdamW())
    assert "ACCELERATE_CONFIG_DS_FIELDS" not in os.environ
