"""The supervised steps on generated traces."""

import pytest
import torch

from mispo.config.schema import WarmStartConfig
from mispo.data.prompts import build_data
from mispo.warm_start.traces import careful_writer
from mispo.warm_start.train import backward_traces, schedule, warm_start
from model.build import build_policy, let_drafts_learn
from rollouts.trajectory import Prompt
from support.data_files import gym


def prompts() -> list[Prompt]:
    return build_data(gym(), build_policy("micro", None)[1]).stream.take(50)


def test_the_schedule_rises_stays_and_falls_to_nearly_0() -> None:
    config = WarmStartConfig(steps=100, warmup_steps=10)
    factors = [schedule(step, config) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:50] == [1.0] * 41
    assert factors[75] == pytest.approx(0.5)
    assert 0 < factors[99] < 0.05


def test_the_loss_is_one_mean_over_all_trace_tokens_whatever_the_parts() -> None:
    """Not a mean of means: that would let few long traces weigh as much as many short ones."""
    model, tokenizer = build_policy("micro", None)
    pairs = [
        (p.ids, torch.tensor(tokenizer(careful_writer("count_bits")(p.row), add_special_tokens=False).input_ids))
        for p in prompts()[:6]
    ]
    losses, gradients = [], []
    for parts in ((pairs, []), (pairs[:1], pairs[1:])):
        model.zero_grad()
        losses.append(backward_traces(model, parts, tokenizer.pad_token_id))
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    total = tokens = 0.0
    for prompt, trace in pairs:
        with torch.no_grad():
            logp = model(input_ids=torch.cat([prompt, trace])[None]).logits[0].log_softmax(-1)
        total -= logp[len(prompt) - 1 : -1].gather(1, trace[:, None]).sum().item()
        tokens += len(trace)
    assert losses == pytest.approx([total / tokens] * 2, rel=1e-5)
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_draft_heads_learn_with_their_weight_and_then_rest() -> None:
    """The gradient is that of the loss plus the weighted loss of the heads; what is reported stays the model's own."""
    model, tokenizer = build_policy("micro", None, mtp=2)
    let_drafts_learn(model, True)
    pairs = [(p.ids, torch.tensor(tokenizer("12", add_special_tokens=False).input_ids * 4)) for p in prompts()[:6]]
    losses, gradients = [], []
    for weight in (0.0, 0.5, 1.0):
        model.zero_grad()
        losses.append(backward_traces(model, (pairs, []), tokenizer.pad_token_id, weight))
        gradients.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()])
    assert losses[0] == losses[1] == losses[2]
    assert all(torch.allclose((a + c) / 2, b, atol=1e-6) for a, b, c in zip(*gradients, strict=True))
    assert not torch.allclose(gradients[0][0], gradients[1][0], atol=1e-4)  # the embeddings learn from them too

    before = {name: tensor.clone() for name, tensor in model.mtp.state_dict().items()}
    config = WarmStartConfig(steps=1, batch_size=4)
    stream = build_data(gym(), tokenizer).stream
    warm_start(model, tokenizer, stream, config, task="count_bits", seed=0, on_step=lambda step, loss: None)
    assert not any(torch.equal(tensor, before[name]) for name, tensor in model.mtp.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.mtp.parameters())


def test_it_learns_and_a_second_time_does_the_same() -> None:
    runs = []
    for _ in range(2):
        model, tokenizer = build_policy("micro", None, seed=3)
        stream = build_data(gym(), tokenizer).stream
        losses: list[float] = []
        warm_start(
            model,
            tokenizer,
            stream,
            WarmStartConfig(steps=12, batch_size=16, lr=3e-3, warmup_steps=3),
            task="count_bits",
            seed=0,
            on_step=lambda step, loss, losses=losses: losses.append(loss),
        )
        runs.append((losses, stream.cursor))
    assert runs[0] == runs[1]
    assert len(runs[0][0]) == 12
    assert runs[0][0][-1] < 0.75 * runs[0][0][0]
