"""The actor as a module under DeepSpeed: from token ids to log-probs at chosen positions."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mispo.trainer.batch import ModelInput
from mispo.trainer.logprob import LogprobHead
from mispo.trainer.ranks import Ranks
from model.critic import Critic, ValueHead
from model.moe.replay import RouterReplay
from model.moe.routers import find_routers, keep_router_fp32
from model.step.mtp import before_norm

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of a name; "auto" is bf16 on CUDA and fp32 on CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Return a context that computes in `dtype` over float32 parameters; routers and value head switch it off."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


class ActorModule(nn.Module):
    """The policy, which returns log-probs at chosen positions without ever holding all logits.

    entropy_gradient: whether the entropy is part of a loss; else it has no gradient. value_head: of a critic that
    shares the policy's trunk. replays: whether the routers of a MoE activate the experts that come with the input.
    drafts: whether the heads that draft further tokens are computed too; the policy gets no gradient from them.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        dtype: torch.dtype,
        *,
        entropy_gradient: bool = False,
        value_head: ValueHead | None = None,
        replays: bool = False,
        drafts: bool = False,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.value_head = value_head
        self.dtype = dtype
        self.replay = RouterReplay(policy) if replays and find_routers(policy) else None
        self.logprobs = LogprobHead(policy.get_output_embeddings(), dtype, entropy_gradient=entropy_gradient)
        mtp: Any = policy.mtp if drafts else None
        heads = mtp.layers if drafts else ()
        self.drafts = nn.ModuleList(LogprobHead(head.head, dtype, entropy_gradient=False) for head in heads)

    def forward(self, x: ModelInput, temperature: float) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Compute log-probs, entropies, values and draft losses at (row, column), each [n] fp32.

        Log-probs log π(target) and entropies are those of softmax(logits/temperature). V is None without a value head.
        The draft loss is −log of the probability that the draft heads give to the tokens after the target, as a mean
        over heads, and 0 past the end; None without drafts or gradients. With fewer targets than rows, only V is read
        at the others.
        """
        if self.replay:
            self.replay.set(*x.replay or (None, None))
        with autocast(x.ids.device, self.dtype):
            decoder = self.policy.get_decoder()
            with before_norm(decoder) if self.drafts else nullcontext() as states:
                hidden = decoder(input_ids=x.ids, position_ids=x.positions, use_cache=False).last_hidden_state
        hidden_nH = hidden[x.rows, x.columns]
        logprobs_n, entropy_n = self.logprobs(hidden_nH[: len(x.targets)], x.targets, temperature)
        values_n = self.value_head(hidden_nH) if self.value_head else None
        # Scoring without gradients needs no draft loss.
        drafts_n = self._drafts(x, states[0].detach()) if states is not None and torch.is_grad_enabled() else None
        return logprobs_n, entropy_n, values_n, drafts_n

    def _drafts(self, x: ModelInput, hidden_BSH: Tensor) -> Tensor:
        trunk, count = self.policy.get_decoder(), len(x.targets)
        rows, columns = x.rows[:count], x.columns[:count]
        # Every head runs, even on a rank with only a pad token: under ZeRO-3 the ranks wait for each other.
        more = max(0, len(self.drafts) + 2 - x.ids.shape[1])
        hidden_BSH, embeds_BSH = (
            nn.functional.pad(part, (0, 0, 0, more)) for part in (hidden_BSH, trunk.embed_tokens(x.ids).detach())
        )
        positions_1S = None if x.positions is None else nn.functional.pad(x.positions, (0, more))
        with autocast(x.ids.device, self.dtype):
            mtp: Any = self.policy.mtp
            states = mtp(trunk, hidden_BSH, embeds_BSH, positions_1S)
        nll_n = hidden_BSH.new_zeros(count, dtype=torch.float32)
        for i, (logprobs, state) in enumerate(zip(self.drafts, states, strict=True)):
            inside = (columns + 2 + i < x.ends[:count]).nonzero()[:, 0]
            targets = x.ids[rows[inside], columns[inside] + 2 + i]
            logp, _ = logprobs(state[rows[inside], columns[inside]], targets, 1.0)
            nll_n = nll_n.index_add(0, inside, -logp / len(self.drafts))
        return nll_n


def checkpoint_layers(model: PreTrainedModel, zero_stage: int) -> None:
    """Keep only the layers' inputs for the backward pass. ValueError for a model that does not support it."""
    if not model.supports_gradient_checkpointing:
        raise ValueError(f"trainer.gradient_checkpointing: {type(model).__name__} does not support it; set it to false")
    # Re-entrant under ZeRO-3: otherwise torch fails as it compares shapes of weights that were partitioned meanwhile.
    model.gradient_checkpointing_enable({"use_reentrant": zero_stage == 3})


class Reference:
    """The frozen policy of the KL term: a whole copy on every rank, without optimizer or gradients."""

    def __init__(self, module: ActorModule, ranks: Ranks) -> None:
        self.module = module.requires_grad_(False)
        self.ranks = ranks

    def forward(self, *args: Any) -> Any:
        """Run `ActorModule.forward`."""
        return self.module(*args)

    def eval(self) -> None:
        """Switch dropout off."""
        self.module.eval()


def copy_of(
    policy: PreTrainedModel, weights: Mapping[str, Tensor], device: torch.device, attention: str
) -> PreTrainedModel:
    """Build a model of the policy's shape with these weights, in float32; the run's random state does not change."""
    shape = copy.deepcopy(policy.config)
    shape._attn_implementation = attention
    with torch.random.fork_rng(), torch.device(device):
        model = type(policy)(shape)
    model.load_state_dict(dict(weights))
    keep_router_fp32(model)
    return model


class CriticModule(nn.Module):
    """The critic, computed in the trainer's precision."""

    def __init__(self, critic: Critic, dtype: torch.dtype) -> None:
        super().__init__()
        self.critic = critic
        self.dtype = dtype

    def forward(self, x: ModelInput) -> Tensor:
        """Compute V at (row, column), [n] fp32; the sampling temperature has no effect."""
        with autocast(x.ids.device, self.dtype):
            return self.critic(x.ids, x.rows, x.columns, x.positions)
