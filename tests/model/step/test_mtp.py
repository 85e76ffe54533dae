"""Draft heads: what they read, what they may not see, that they learn, and that nothing else depends on them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from model.build import build_policy, let_drafts_learn
from model.lora import add_lora
from model.presets import VOCABULARY, preset_config
from model.step.mtp import draft_loss
from model.step.step import StepForCausalLM

HEADS = 3
IDS = torch.randint(5, 90, (2, 41), generator=torch.Generator().manual_seed(3))
"""More than twice as long as the micro preset's window of 16."""


def policy(mtp: int = HEADS) -> StepForCausalLM:
    model, _ = build_policy("micro", None, seed=0, mtp=mtp)
    assert isinstance(model, StepForCausalLM)
    return model.eval()


def test_names_are_those_of_the_checkpoint_format() -> None:
    names = {name.removeprefix("mtp.layers.2.") for name in policy().state_dict() if name.startswith("mtp.layers.2.")}
    own = {"enorm.weight", "hnorm.weight", "eh_proj.weight", "norm.weight", "head.weight"}
    assert own <= names
    assert {name.split(".")[0] for name in names - own} == {"block"}
    assert not any("experts" in name or "gate.weight" in name for name in names)


def test_the_model_is_the_same_bit_for_bit_with_and_without_heads() -> None:
    with_heads, without = policy(), policy(0)
    for name, tensor in without.state_dict().items():
        assert torch.equal(tensor, with_heads.state_dict()[name]), name
    expected = without(input_ids=IDS).logits
    assert torch.equal(with_heads(input_ids=IDS).logits, expected)
    assert torch.equal(with_heads.draft(IDS)[0], expected)
    assert without.draft(IDS)[1] == []


def test_heads_slide_as_the_published_ones_do() -> None:
    with torch.device("meta"):
        model = StepForCausalLM(preset_config("flash", pad_token_id=1, eos_token_id=2, mtp=3))
    for head in model.mtp.layers:
        assert head.block.self_attn.q_proj.weight.shape == (96 * 128, 4096)
        assert head.block.self_attn.sliding_window == 512
        assert head.block.mlp.gate_proj.weight.shape == (11264, 4096)
        assert (head.eh_proj.weight.shape, head.head.weight.shape) == ((4096, 8192), (VOCABULARY, 4096))


@pytest.mark.parametrize("head", range(HEADS))
def test_a_draft_sees_the_token_that_it_is_given_and_none_after_it(head: int) -> None:
    model, t = policy(), 20
    with torch.no_grad():
        before = model.draft(IDS)[1][head]
        assert before.shape == (2, IDS.shape[1] - 1 - head, model.config.vocab_size)
        for changed, sees in ((t + head + 1, True), (t + head + 2, False)):
            other = IDS.clone()
            other[:, changed:] = (other[:, changed:] + 7) % 90
            after = model.draft(other)[1][head]
            assert torch.allclose(before[:, :t], after[:, :t], atol=1e-6)
            assert torch.allclose(before[:, t], after[:, t], atol=1e-6) != sees


def test_a_head_is_norms_projection_layer_and_head_over_the_state_before_the_final_norm() -> None:
    """Embedding first, then state; the second head reads the first one's state. By hand, on a prefix without a mask."""
    model, length = policy(), 12
    ids, trunk = IDS[:, :length], model.model
    for parameter in model.mtp.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.3)  # else a forgotten norm weight would not show

    def normed(x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * (1 + norm.weight)

    with torch.no_grad():
        _, drafts = model.draft(ids)
        seen: list[torch.Tensor] = []
        with trunk.layers[-1].register_forward_hook(lambda module, args, output: seen.append(output)):
            trunk(input_ids=ids)
        state = seen[0]
        for i, head in enumerate(model.mtp.layers[:2]):
            n = length - 1 - i
            joined = torch.cat(
                [normed(trunk.embed_tokens.weight[ids[:, i + 1 :]], head.enorm), normed(state[:, :n], head.hnorm)], -1
            )
            mask = torch.full((n, n), -torch.inf).triu(1)[None, None]
            rotary = trunk.rotary_emb(joined, torch.arange(n)[None], "sliding_attention")
            state = head.block(joined @ head.eh_proj.weight.T, attention_mask=mask, position_embeddings=rotary)
            expected = normed(state, head.norm) @ head.head.weight.T
            assert torch.allclose(drafts[i], expected, atol=1e-5)


def test_the_loss_is_the_mean_over_heads_of_the_cross_entropy_of_the_tokens_after_the_next() -> None:
    labels = IDS.clone()
    labels[:, :7] = -100
    model = policy()
    with torch.no_grad():
        _, drafts = model.draft(IDS)
        total = 0.0
        for i, logits in enumerate(drafts):
            for row in range(2):
                for t in range(IDS.shape[1] - 2 - i):
                    if labels[row, t + 2 + i] != -100:
                        total -= logits[row, t].log_softmax(-1)[labels[row, t + 2 + i]].item()
        assert draft_loss(drafts, labels).item() == pytest.approx(total / HEADS, rel=1e-5)


def test_trained_alone_the_heads_learn_and_the_model_stays() -> None:
    model = policy()
    assert not any(parameter.requires_grad for parameter in model.mtp.parameters())
    model.requires_grad_(False)
    let_drafts_learn(model, True)
    before = model(input_ids=IDS).logits
    optimizer = torch.optim.AdamW(model.mtp.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = draft_loss(model.draft(IDS)[1], IDS)
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.mtp.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(model(input_ids=IDS).logits, before)


def test_saved_and_opened_the_heads_are_the_same_and_frozen(tmp_path: Path) -> None:
    model, tokenizer = build_policy("micro", None, seed=4, mtp=2)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"] == 2
    assert (tmp_path / "mtp.py").is_file()  # the model's own code, for processes without this package
    assert "model.layers.5.transformer.shared_head.output.weight" in load_file(tmp_path / "model.safetensors")
    again, _ = build_policy(None, str(tmp_path))
    assert model.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert all(a.equal(b) for a, b in zip(model.draft(IDS)[1], again.draft(IDS)[1], strict=True))
    assert not any(parameter.requires_grad for parameter in again.mtp.parameters())
    foreign = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert len(foreign.mtp.layers) == 2


def test_adapters_pass_the_heads_by() -> None:
    model = policy()
    add_lora(model, 4, 8.0, (), torch.float32, seed=1)
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert learning
    assert not any("mtp." in name for name in learning)
