"""StepForCausalLM against transformers' own Step layers; caching, padding, saving, opening."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts, Step3p7TextModel

from model.build import build_policy
from model.experts import GroupedExperts
from model.step import StepForCausalLM

IDS = torch.randint(5, 90, (2, 50), generator=torch.Generator().manual_seed(3))
"""Three times as long as the micro preset's window of 16."""


@pytest.fixture(scope="module")
def policy() -> StepForCausalLM:
    model, _ = build_policy("micro", None, seed=0)
    assert isinstance(model, StepForCausalLM)
    return model.eval()


def test_logits_are_those_of_transformers_layers_with_their_own_experts(policy: StepForCausalLM) -> None:
    reference = Step3p7TextModel(policy.config).eval()
    assert any(isinstance(m, Step3p7Experts) for m in reference.modules())
    assert not any(isinstance(m, GroupedExperts) for m in reference.modules())
    reference.load_state_dict(policy.model.state_dict())
    with torch.no_grad():
        expected = policy.lm_head(reference(input_ids=IDS, use_cache=False).last_hidden_state)
        logits = policy(input_ids=IDS, use_cache=False).logits
    assert (logits - expected).abs().max() < 1e-5


def test_decoding_with_a_cache_equals_one_forward_across_the_window_edge(policy: StepForCausalLM) -> None:
    with torch.no_grad():
        whole = policy(input_ids=IDS, use_cache=False).logits
        output = policy(input_ids=IDS[:, :10], use_cache=True)
        steps = [output.logits]
        for t in range(10, IDS.shape[1]):
            output = policy(input_ids=IDS[:, t : t + 1], past_key_values=output.past_key_values, use_cache=True)
            steps.append(output.logits)
    assert (torch.cat(steps, 1) - whole).abs().max() < 1e-4


def test_padding_on_the_right_is_never_seen(policy: StepForCausalLM) -> None:
    padded = torch.nn.functional.pad(IDS, (0, 7))
    with torch.no_grad():
        assert torch.allclose(policy(input_ids=padded).logits[:, :-7], policy(input_ids=IDS).logits, atol=1e-5)


def test_eager_and_sdpa_attention_agree(policy: StepForCausalLM) -> None:
    eager, _ = build_policy("micro", None, seed=0, attention="eager")
    assert eager.config._attn_implementation == "eager"
    with torch.no_grad():
        assert torch.allclose(eager.eval()(input_ids=IDS).logits, policy(input_ids=IDS).logits, atol=1e-4)


def test_the_loss_is_the_mean_of_shifted_cross_entropy(policy: StepForCausalLM) -> None:
    labels = IDS.clone()
    labels[:, :5] = -100
    with torch.no_grad():
        output = policy(input_ids=IDS, labels=labels)
    logp = output.logits[:, :-1].log_softmax(-1).gather(2, IDS[:, 1:, None])[..., 0]
    assert output.loss.item() == pytest.approx(-logp[:, 4:].mean().item(), rel=1e-5)


def test_saving_and_loading_changes_nothing(policy: StepForCausalLM, tmp_path: Path) -> None:
    policy.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is StepForCausalLM
    for name, tensor in policy.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_every_parameter_gets_a_gradient(policy: StepForCausalLM) -> None:
    policy(input_ids=IDS, labels=IDS).loss.backward()
    without = [name for name, p in policy.named_parameters() if p.grad is None]
    policy.zero_grad()
    assert without == []


def test_the_seed_fixes_the_weights_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, other = (build_policy("micro", None, seed=seed)[0].state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize(
    ("preset", "path", "words"),
    [
        (None, None, "model.preset"),
        ("tinny", None, "did you mean tiny"),
        (None, "./nowhere", "model.path: no directory"),
    ],
)
def test_a_wrong_model_is_named(preset: str | None, path: str | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_policy(preset, path)


def test_a_directory_that_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.path: .* does not open as a causal LM"):
        build_policy(None, str(tmp_path))


def test_a_checkpoint_that_lacks_tensors_is_refused(policy: StepForCausalLM, tmp_path: Path) -> None:
    weights = policy.state_dict()
    kept = {name: t.contiguous() for name, t in weights.items() if "layers.2" not in name}
    policy.save_pretrained(tmp_path, state_dict=kept)
    build_policy("micro", None)[1].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks \d+ tensors"):
        build_policy(None, str(tmp_path))
