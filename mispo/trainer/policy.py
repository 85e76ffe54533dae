"""The actor as a module under DeepSpeed: from token ids to log-probs at chosen positions."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mispo.trainer.batch import ModelInput
from mispo.trainer.logprob import LogprobHead
from mispo.trainer.ranks import Ranks
from model.critic import Critic, ValueHead
from model.replay import RouterReplay
from model.routing import find_routers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bf16 on CUDA, fp32 on CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Compute in `dtype` over float32 parameters; routers and value head switch it off for themselves."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


class ActorModule(nn.Module):
    """The policy, read as log-probs at chosen positions; their logits never exist as a whole.

    entropy_gradient: whether the entropy is part of a loss; else it has no gradient. value_head: of a critic that
    shares the policy's trunk. replays: whether the routers of a MoE activate the experts that come with the input.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        dtype: torch.dtype,
        *,
        entropy_gradient: bool = False,
        value_head: ValueHead | None = None,
        replays: bool = False,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.value_head = value_head
        self.dtype = dtype
        self.replay = RouterReplay(policy) if replays and find_routers(policy) else None
        self.logprobs = LogprobHead(policy.get_output_embeddings(), dtype, entropy_gradient=entropy_gradient)

    def forward(self, x: ModelInput, temperature: float) -> tuple[Tensor, Tensor, Tensor | None]:
        """log π(target) under softmax(logits/temperature), entropy, V with a value head, at (row, column); [n] fp32.

        With fewer targets than rows, only V is read at the others.
        """
        if self.replay:
            self.replay.set(*x.replay or (None, None))
        with autocast(x.ids.device, self.dtype):
            decoder = self.policy.get_decoder()
            hidden = decoder(input_ids=x.ids, position_ids=x.positions, use_cache=False).last_hidden_state
        hidden_nH = hidden[x.rows, x.columns]
        logprobs_n, entropy_n = self.logprobs(hidden_nH[: len(x.targets)], x.targets, temperature)
        return logprobs_n, entropy_n, self.value_head(hidden_nH) if self.value_head else None


def checkpoint_layers(model: PreTrainedModel, zero_stage: int) -> None:
    """Keep only the layers' inputs for the backward pass. ValueError for a model that does not offer it."""
    if not model.supports_gradient_checkpointing:
        raise ValueError(f"trainer.gradient_checkpointing: {type(model).__name__} does not offer it; set it to false")
    # Re-entrant under ZeRO-3: else torch compares the shapes of weights that are partitioned in between, and fails.
    model.gradient_checkpointing_enable({"use_reentrant": zero_stage == 3})


class Reference:
    """A frozen policy that the actor is held near to: a whole copy on every rank, no optimizer, no gradients."""

    def __init__(self, module: ActorModule, ranks: Ranks) -> None:
        self.module = module.requires_grad_(False)
        self.ranks = ranks

    def forward(self, *args: Any) -> Any:
        """As `ActorModule.forward`."""
        return self.module(*args)

    def eval(self) -> None:
        """Dropout off."""
        self.module.eval()


class CriticModule(nn.Module):
    """The critic under the trainer's precision."""

    def __init__(self, critic: Critic, dtype: torch.dtype) -> None:
        super().__init__()
        self.critic = critic
        self.dtype = dtype

    def forward(self, x: ModelInput) -> Tensor:
        """V at (row, column), [n] fp32. Sampling temperature has no business here."""
        with autocast(x.ids.device, self.dtype):
            return self.critic(x.ids, x.rows, x.columns, x.positions)
