"""One training step of MIS-PO, from prompts to gradients: `python docs/one_step.py`.

Read it beside the Step 3.5 Flash report (arXiv 2602.10604), whose sections the docstrings name; "ours" marks what the
report leaves open. There is a tensor for each trajectory, and every formula is written out. mispo computes the same on
flat batches, in micro-batches and over ranks; tests/end_to_end/test_one_step.py compares this file with a run.

A trajectory has a prompt of P tokens and a completion of T tokens a_0 … a_{T−1}. State s_t is the prompt and the tokens
before a_t: after position P + t − 1 the policy chooses a_t, and the critic says V(s_t). s_T is everything.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from model.build import build_policy
from model.critic import Critic
from model.moe.routers import keep_router_fp32

TOKEN_BOUNDS, TRAJECTORY_BOUNDS = (0.5, 2.0), (0.996, 1.001)  # report §5.2.1
GAMMA, LAM = 1.0, 1.0  # report: both 1
REWARD_RANGE = (0.0, 1.0)
MIN_STD = 0.01  # ours


@torch.no_grad()
def sample(policy, prompt: Tensor, max_new_tokens: int, end: int) -> tuple[Tensor, Tensor, bool]:
    """Draw a completion at temperature 1. Return its tokens [T], their log-probs [T], and whether the limit cut it."""
    ids, logprobs = prompt, []
    for _ in range(max_new_tokens):
        logprobs_V = policy(ids[None]).logits[0, -1].float().log_softmax(-1)
        token = torch.multinomial(logprobs_V.exp(), 1)
        ids = torch.cat([ids, token])
        logprobs.append(logprobs_V[token])
        if token == end:
            return ids[len(prompt) :], torch.cat(logprobs), False
    return ids[len(prompt) :], torch.cat(logprobs), True


def log_pi(policy, prompt: Tensor, completion: Tensor) -> Tensor:
    """log π(a_t | s_t) of a completion, [T], in one forward: the logits after position P + t − 1 belong to a_t."""
    logits_SV = policy(torch.cat([prompt, completion])[None]).logits[0].float()
    return logits_SV[len(prompt) - 1 : -1].log_softmax(-1).gather(1, completion[:, None])[:, 0]


def values(critic, prompt: Tensor, completion: Tensor) -> Tensor:
    """V(s_0) … V(s_T), [T+1]: the last one is the value after the last token (§5.2.2)."""
    columns = torch.arange(len(prompt) - 1, len(prompt) + len(completion))
    return critic(torch.cat([prompt, completion])[None], torch.zeros_like(columns), columns)


def token_test(log_x: Tensor) -> Tensor:
    """I(x_t): whether 0.5 ≤ x_t ≤ 2, with x_t = π_old(a_t)/π_rollout(a_t); [T] bool (§5.2.1)."""
    low, high = TOKEN_BOUNDS
    return (log_x >= math.log(low)) & (log_x <= math.log(high))


def trajectory_test(log_rho: Tensor) -> bool:
    """I(ρ̄): whether 0.996 ≤ ρ̄ ≤ 1.001, with log ρ̄ = 1/T Σ_t log x_t over all T tokens (§5.2.1)."""
    low, high = TRAJECTORY_BOUNDS
    return math.log(low) <= log_rho <= math.log(high)


def gae(value: Tensor, reward: float, truncated: bool) -> Tensor:
    """Â_t = δ_t + γλ·Â_{t+1}, with δ_t = γ·V(s_{t+1}) − V(s_t) and at the end δ_{T−1} = R̂ − V(s_{T−1}); [T] (§5.2.2).

    R̂ is the reward; of a truncated trajectory γ·V(s_T), clipped to the reward's range: being cut is no failure.
    """
    value = value.double()
    last = GAMMA * value[-1].clamp(*REWARD_RANGE) if truncated else torch.tensor(reward).double()
    following = torch.cat([GAMMA * value[1:-1], last[None]])
    deltas = following - value[:-1]
    advantages = torch.zeros_like(deltas)
    ahead = 0.0
    for t in reversed(range(len(deltas))):
        ahead = deltas[t] + GAMMA * LAM * ahead
        advantages[t] = ahead
    return advantages


def whiten(advantages: list[Tensor]) -> list[Tensor]:
    """(Â − mean)/max(std, 0.01), with mean and std over all tokens of the step. Ours."""
    everything = torch.cat(advantages)
    mean, std = everything.mean(), everything.std(correction=0)
    return [(each - mean) / std.clamp_min(MIN_STD) for each in advantages]


def actor_loss(policy, prompts, completions, kept: list[Tensor], advantages: list[Tensor]) -> Tensor:
    """L = −1/N Σ_τ I(ρ̄) Σ_t I(x_t)·Â_t·log π_θ(a_t | s_t) (§5.2.1). N counts all tokens, rejected ones too (ours).

    A sample counts fully or not at all. There is no ratio, so its gradient is the plain score function's.
    """
    total = torch.zeros(())
    for prompt, completion, keep, advantage in zip(prompts, completions, kept, advantages, strict=True):
        total = total - (keep * advantage.float() * log_pi(policy, prompt, completion)).sum()
    return total / sum(map(len, completions))


def critic_loss(critic, prompts, completions, returns: list[Tensor]) -> Tensor:
    """1/N Σ (V(s_t) − R̂_t)² over all tokens (§5.2.2); those that the filter rejects teach the critic too (ours)."""
    total = torch.zeros(())
    for prompt, completion, target in zip(prompts, completions, returns, strict=True):
        total = total + (values(critic, prompt, completion)[:-1] - target.float()).square().sum()
    return total / sum(map(len, completions))


def one_step(policy, critic, prompts, completions, rollout: list[Tensor], rewards: list[float], cut: list[bool]):
    """Score, select, and leave the gradients in both models. Return what mispo also writes of such a step, by name.

    prompts, completions: token ids of each trajectory. rollout: log π_rollout of its tokens. cut: by the token limit.
    """
    with torch.no_grad():  # before any update: the policy is π_old
        old = [log_pi(policy, *tokens) for tokens in zip(prompts, completions, strict=True)]
        value = [values(critic, *tokens) for tokens in zip(prompts, completions, strict=True)]
    log_x = [o.double() - r.double() for o, r in zip(old, rollout, strict=True)]
    log_rho = [x.mean() for x in log_x]
    accepted = [trajectory_test(rho) for rho in log_rho]
    kept = [token_test(x) & accept for x, accept in zip(log_x, accepted, strict=True)]
    estimates = [gae(*one) for one in zip(value, rewards, cut, strict=True)]
    returns = [a + v[:-1].double() for a, v in zip(estimates, value, strict=True)]
    advantages = whiten(estimates)
    numbers = {
        "log_rho": [rho.item() for rho in log_rho],
        "multiplicity": [int(accept) for accept in accepted],
        "advantage_mean": [a.mean().item() for a in advantages],
        "target_mean": [r.mean().item() for r in returns],
        "bootstrap": [v[-1].item() for v in value],
    }
    actor = actor_loss(policy, prompts, completions, kept, advantages)
    critics = critic_loss(critic, prompts, completions, returns)
    for name, model, loss in (("actor", policy, actor), ("critic", critic, critics)):
        model.zero_grad()
        loss.backward()
        norms = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
        numbers |= {f"{name}/loss": loss.item(), f"{name}/grad_norm": torch.stack(norms).norm().item()}
    return numbers


def main() -> None:
    """Run a step of a policy with random weights, whose rollouts are drawn in bfloat16 as an inference engine would."""
    torch.manual_seed(0)
    policy, tokenizer = build_policy("micro", None, seed=0)
    critic = Critic.from_policy(policy, head_init_std=0.3, seed=0)
    engine = copy.deepcopy(policy).bfloat16()
    keep_router_fp32(engine)

    prompts, completions, rollout, rewards, cut = [], [], [], [], []
    for a, b in 4 * ((1, 2), (3, 4), (2, 6), (5, 4)):
        chat = [{"role": "user", "content": f"{a} + {b}?"}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        prompts.append(torch.tensor(tokenizer.encode(text, add_special_tokens=False)))
        completion, logprobs, truncated = sample(engine, prompts[-1], 48, tokenizer.eos_token_id)
        completions.append(completion)
        rollout.append(logprobs)
        cut.append(truncated)
        # A generous verifier: random weights never give just the answer.
        rewards.append(float(str(a + b) in tokenizer.decode(completion.tolist())))

    numbers = one_step(policy, critic, prompts, completions, rollout, rewards, cut)
    for i, completion in enumerate(completions):
        print(
            f"{len(completion):>2} tokens, {'cut  ' if cut[i] else 'ended'}  R {rewards[i]:.0f}"
            f"  V(s_T) {numbers['bootstrap'][i]:+.3f}  mean Â {numbers['advantage_mean'][i]:+.3f}"
            f"  log ρ̄ {numbers['log_rho'][i]:+.5f} {'accepted' if numbers['multiplicity'][i] else 'rejected'}"
        )
    for name in ("actor", "critic"):
        print(f"{name}: loss {numbers[f'{name}/loss']:+.4f}, gradient norm {numbers[f'{name}/grad_norm']:.4f}")


if __name__ == "__main__":
    main()
