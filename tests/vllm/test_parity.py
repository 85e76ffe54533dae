"""One directory, two engines: what the native engine sampled has the same log-probs in vLLM."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig

from model.moe.routers import find_routers, keep_router_fp32
from model.presets import preset_config
from model.step.step import StepForCausalLM
from model.tokenizer import character_tokenizer
from rollouts.engine import Request, run_all
from rollouts.native.engine import NativeEngine
from support.vllm_process import Pairs, vllm_logprobs

SETTINGS = {"tiny": {}, "limits": {"swiglu_limits_shared": [0.0, 0.5, 0.0, 2.0]}}
"""vLLM has no limit on routed experts on a CPU."""


@dataclass(frozen=True)
class Sampled:
    """pairs: prompt and completion ids. logprobs: as the native engine recorded them while sampling."""

    policy: StepForCausalLM
    pairs: Pairs
    logprobs: list[Tensor]

    def scored_by(self, change: Callable[[PreTrainedModel], None]) -> Tensor:
        """|Δ log-prob| of all tokens under a changed copy of the policy."""
        other = deepcopy(self.policy)
        with torch.no_grad():
            change(other)
        engine = NativeEngine(other, [1], 0, 32)
        scores = engine.score([(torch.tensor(p), torch.tensor(c)) for p, c in self.pairs], 1.0)
        return (torch.cat(scores) - torch.cat(self.logprobs)).abs()


@pytest.fixture(scope="module", params=SETTINGS)
def sampled(request: pytest.FixtureRequest) -> Sampled:
    """64 completions of up to 96 tokens, three windows long. The weights are wide and the selection bias is not zero,
    so that the routers decide something."""
    tokenizer = character_tokenizer()
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    shape = preset_config("tiny", vocab_size=len(tokenizer), **ends).to_dict() | SETTINGS[request.param]
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        policy = StepForCausalLM(Step3p7TextConfig(**shape)).eval()
        for name, parameter in policy.named_parameters():
            if "norm" not in name:
                parameter.mul_(3)
        for router in find_routers(policy):
            bias = router.module.e_score_correction_bias
            bias.copy_(torch.randn(bias.shape, generator=generator) * 0.1)
    lengths = torch.randint(4, 20, (64,), generator=generator).tolist()
    prompts = [torch.randint(7, len(tokenizer), (length,), generator=generator) for length in lengths]
    engine = NativeEngine(policy, [tokenizer.eos_token_id], tokenizer.pad_token_id, 32)
    samples = run_all(engine, [Request(ids, seed, 96, 1.0) for seed, ids in enumerate(prompts)])
    pairs = [(ids.tolist(), sample.completion_ids.tolist()) for ids, sample in zip(prompts, samples, strict=True)]
    return Sampled(policy, pairs, [sample.logprobs for sample in samples])


def saved(policy: StepForCausalLM, directory: Path) -> Path:
    policy.save_pretrained(directory)
    character_tokenizer().save_pretrained(directory)
    return directory


def test_log_probs_agree_in_float32(sampled: Sampled, tmp_path: Path) -> None:
    theirs = vllm_logprobs(saved(sampled.policy, tmp_path / "model"), "float32", sampled.pairs, tmp_path)
    ours = torch.cat(sampled.logprobs)
    difference = (torch.tensor([x for row in theirs for x in row]) - ours).abs()
    assert len(sampled.pairs) == 64
    assert len(ours) > 2000
    assert difference.max() <= 1e-4


@pytest.mark.parametrize("sampled", ["tiny"], indirect=True)
def test_the_comparison_would_notice_a_wrong_router(sampled: Sampled) -> None:
    def without_bias(policy: PreTrainedModel) -> None:
        for router in find_routers(policy):
            router.module.e_score_correction_bias.zero_()

    def without_scaling(policy: PreTrainedModel) -> None:
        for layer in policy.model.layers[1:]:
            layer.mlp.routed_scaling_factor = 1.0

    assert sampled.scored_by(lambda _: None).max() < 1e-4
    assert sampled.scored_by(without_bias).max() > 0.1
    assert sampled.scored_by(without_scaling).max() > 0.1


@pytest.mark.parametrize("sampled", ["limits"], indirect=True)
def test_the_comparison_would_notice_missing_limits(sampled: Sampled) -> None:
    def without_limits(policy: PreTrainedModel) -> None:
        for layer in policy.model.layers[1:]:
            layer.mlp.shared_experts.limit = float("inf")

    assert sampled.scored_by(without_limits).max() > 0.1


@pytest.mark.parametrize("sampled", ["tiny"], indirect=True)
def test_a_checkpoint_saved_in_bfloat16_opens(sampled: Sampled, tmp_path: Path) -> None:
    """Half the digits: the mean over tokens is near, single tokens may be routed otherwise."""
    policy = deepcopy(sampled.policy).to(torch.bfloat16)
    keep_router_fp32(policy)
    few = sampled.pairs[:8]
    theirs = vllm_logprobs(saved(policy, tmp_path / "model"), "auto", few, tmp_path)
    difference = (torch.tensor([x for row in theirs for x in row]) - torch.cat(sampled.logprobs[:8])).abs()
    assert difference.mean() < 0.2
