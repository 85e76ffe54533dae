"""The experts of stock models: which implementation runs, and that it computes what transformers' loop does."""

from pathlib import Path
from typing import cast

import pytest
import torch
from accelerate import Accelerator
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from mispo.build.models import Policy, build_models, build_modules
from mispo.build.setup import Setup
from mispo.config.parts import Native
from mispo.config.schema import MispoConfig, RolloutConfig
from mispo.system.rundir import RunDir
from mispo.trainer.ranks import Ranks
from model.build import build_policy
from model.moe.dispatch import GROUPED, experts_in_use, use_grouped_experts
from model.step.experts import grouped_forward

SMALL = {
    "vocab_size": 110,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
FAMILIES: dict[str, PreTrainedConfig] = {
    "qwen": Qwen3MoeConfig(**SMALL, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=16),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=6, num_experts_per_tok=2),
    "olmoe": OlmoeConfig(**SMALL, num_experts=6, num_experts_per_tok=2),
}
IDS = torch.randint(5, 100, (2, 19), generator=torch.Generator().manual_seed(0))


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def loss_and_gradients(model: PreTrainedModel) -> list[torch.Tensor]:
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return [loss, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.fixture(params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A directory with a stock MoE and a tokenizer."""
    random_model(FAMILIES[request.param]).save_pretrained(tmp_path)
    build_policy("micro", None)[1].save_pretrained(tmp_path)
    return tmp_path


def test_a_stock_models_experts_run_grouped_and_equal_the_loop(checkpoint: Path) -> None:
    model, _ = build_policy(None, str(checkpoint))
    assert experts_in_use(model) == GROUPED
    ours = loss_and_gradients(model)
    model.set_experts_implementation("eager")
    assert experts_in_use(model) == "eager"
    loop = loss_and_gradients(model)
    assert len(ours) == len(loop) == len(list(model.parameters())) + 1
    for a, b in zip(ours, loop, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max().clamp_min(1)


def test_the_rollout_copy_computes_as_the_trainer_does_and_a_checkpoint_says_nothing(
    checkpoint: Path, tmp_path: Path
) -> None:
    policy, tokenizer = build_policy(None, str(checkpoint))
    config = MispoConfig(rollout=RolloutConfig(dtype="bf16"), engine=Native(slots=2))
    setup = Setup(config, RunDir(tmp_path), None, cast(Accelerator, None), Ranks(0, 1, torch.device("cpu")), None)
    models = build_models(setup, Policy(policy, tokenizer), samples=True)
    assert models.engine is not None
    assert experts_in_use(models.engine.model) == GROUPED
    about = build_modules(setup, models, packed=False).about
    assert "2 MoE layers (experts: grouped), 1 × cpu" in about
    policy.save_pretrained(tmp_path / "again")
    assert "experts_implementation" not in (tmp_path / "again/config.json").read_text()


def test_under_autocast_the_products_are_those_of_a_bf16_copy() -> None:
    """Else trainer and rollouts would be different policies before any update."""
    experts = random_model(FAMILIES["qwen"]).model.layers[0].mlp.experts
    x, index = torch.randn(16, 32), torch.stack([torch.randperm(6)[:2] for _ in range(16)])
    weights = torch.rand(16, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trainer = grouped_forward(experts, x, index, weights)
    rollout = grouped_forward(experts.bfloat16(), x.bfloat16(), index, weights)
    assert torch.equal(trainer.bfloat16(), rollout)


def test_experts_with_biases_stay_with_transformers() -> None:
    config = GptOssConfig(**SMALL, head_dim=8, num_local_experts=6, num_experts_per_tok=2, layer_types=None)
    model = random_model(config)
    use_grouped_experts(model)
    assert experts_in_use(model) == "grouped_mm"


def test_step_and_dense_models_are_named_too() -> None:
    assert experts_in_use(build_policy("micro", None)[0]) == GROUPED
    assert experts_in_use(random_model(LlamaConfig(**SMALL))) is None
