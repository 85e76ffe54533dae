"""StepForCausalLM against transformers' own Step layers; caching, padding, saving, opening."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts, Step3p7TextModel

from model.build import build_policy
from model.step.experts import GroupedExperts
from model.step.step import StepForCausalLM

IDS = torch.randint(5, 90, (2, 50), generator=torch.Generator().manual_seed(3))
"""Three times as long as the micro preset's window of 16."""


@pytest.fixture(scope="module")
def policy() -> StepForCausalLM:
    model, _ = build_policy("micro", None, seed=0)
    assert isinstance(model, StepForCausalLM)
    return model.eval()


@pytest.fixture(scope="module")
def reference(policy: StepForCausalLM) -> Step3p7TextModel:
    """transformers' own model, with its own experts and the policy's weights."""
    model = Step3p7TextModel(policy.config).eval()
    assert any(isinstance(m, Step3p7Experts) for m in model.modules())
    assert not any(isinstance(m, GroupedExperts) for m in model.modules())
    model.load_state_dict(policy.model.state_dict())
    return model


def decoded(model: PreTrainedModel) -> torch.Tensor:
    """Logits, or last hidden states, [2, 50, …] of IDS with a cache: ten tokens at once, then one at a time."""
    outputs = [model(input_ids=IDS[:, :10], use_cache=True)]
    for t in range(10, IDS.shape[1]):
        outputs.append(model(input_ids=IDS[:, t : t + 1], past_key_values=outputs[-1].past_key_values, use_cache=True))
    return torch.cat([output[0] for output in outputs], 1)


def test_logits_are_those_of_transformers_layers_with_their_own_experts(
    policy: StepForCausalLM, reference: Step3p7TextModel
) -> None:
    with torch.no_grad():
        expected = policy.lm_head(reference(input_ids=IDS, use_cache=False).last_hidden_state)
        logits = policy(input_ids=IDS, use_cache=False).logits
    assert (logits - expected).abs().max() < 1e-5


def test_with_a_cache_too_across_the_window_edge(policy: StepForCausalLM, reference: Step3p7TextModel) -> None:
    with torch.no_grad():
        expected = policy.lm_head(decoded(reference))
        assert (decoded(policy) - expected).abs().max() < 1e-5


def test_decoding_with_a_cache_equals_one_forward_across_the_window_edge(policy: StepForCausalLM) -> None:
    with torch.no_grad():
        assert (decoded(policy) - policy(input_ids=IDS, use_cache=False).logits).abs().max() < 1e-5


def test_packed_sequences_score_as_padded_ones(policy: StepForCausalLM, reference: Step3p7TextModel) -> None:
    """Lengths on both sides of the window; positions start at 0 in each sequence."""
    lengths = [50, 7, 30, 16, 17]
    padded = torch.randint(5, 90, (len(lengths), 50), generator=torch.Generator().manual_seed(4))
    packed = torch.cat([row[:n] for row, n in zip(padded, lengths, strict=True)])[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        one = policy(input_ids=packed, position_ids=positions, use_cache=False).logits[0]
        hidden = reference(input_ids=packed, position_ids=positions, use_cache=False).last_hidden_state[0]
        other = policy(input_ids=padded, use_cache=False).logits
        unaware = policy(input_ids=packed, use_cache=False).logits[0]
    expected = torch.cat([row[:n] for row, n in zip(other, lengths, strict=True)])
    assert (one - expected).abs().max() < 1e-5
    assert (one - policy.lm_head(hidden)).abs().max() < 1e-5
    assert (unaware - expected).abs().max() > 1e-2


def test_generate_takes_the_most_likely_tokens(policy: StepForCausalLM) -> None:
    ids = IDS[:, :12]
    out = policy.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        logits = policy(input_ids=out, use_cache=False).logits
    assert torch.equal(out[:, 12:], logits[:, 11:-1].argmax(-1))


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model, _ = build_policy("micro", None, seed=0)
    gradients, forwards = [], []
    model.model.layers[1].self_attn.register_forward_pre_hook(lambda *_: forwards.append(len(gradients)))
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert forwards == [0, 1, 1]
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-7), name


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
