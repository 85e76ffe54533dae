"""Supervised steps on generated traces: a model that can do a task in two ways, before RL chooses between them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mispo.config.schema import WarmStartConfig
from mispo.data.prompts import PromptStream
from mispo.warm_start.traces import careful_writer, terse
from model.build import let_drafts_learn
from model.step.mtp import draft_loss

BETAS = (0.9, 0.98)
MAX_GRAD_NORM = 1.0
IGNORE = -100


def warm_start(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    stream: PromptStream,
    config: WarmStartConfig,
    *,
    task: str | None,
    seed: int,
    on_step: Callable[[int, float], None],
) -> None:
    """Train `model` in place, its draft heads too, on `config.steps` batches of traces of the stream's problems.

    Terse and careful traces share a batch and one mean over all their tokens: batches of one kind, or a mean
    per trace, would skew the mixture that sampling shows. on_step(step, loss) is called after each step.
    """
    careful = careful_writer(task)
    choose = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=BETAS, weight_decay=0.0, fused=True)
    let_drafts_learn(model, True)
    model.train()
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * schedule(step, config)
        short, long = [], []
        for _ in range(config.batch_size):
            (prompt,) = stream.take(1)
            writer, pairs = (terse, short) if choose.random() < config.terse_fraction else (careful, long)
            trace = tokenizer(writer(prompt.row) + tokenizer.eos_token, add_special_tokens=False).input_ids
            pairs.append((prompt.ids, torch.tensor(trace)))
        loss = backward_traces(model, (short, long), tokenizer.pad_token_id, config.mtp_weight)
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        on_step(step + 1, loss)
    let_drafts_learn(model, False)


def schedule(step: int, config: WarmStartConfig) -> float:
    """Return the factor on the peak rate: linear warm-up, constant, linear to 0 over the second half."""
    warm = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    return warm * min(1.0, 2 * (config.steps - step) / config.steps)


def backward_traces(
    model: PreTrainedModel, parts: Sequence[list[tuple[Tensor, Tensor]]], pad_token_id: int, mtp_weight: float = 0.0
) -> float:
    """Add the gradient of the mean negative log-likelihood over all trace tokens of the batch; return that mean.

    parts: lists of (prompt [P], trace [T]) ids; each list is padded separately, and all are divided by the token count
    of the whole batch. mtp_weight: of the draft heads' loss, which is added to the gradient if the model has heads.
    """
    device = next(model.parameters()).device
    tokens = sum(len(trace) for part in parts for _, trace in part)
    drafting = mtp_weight > 0 and getattr(model, "mtp", None) is not None
    total = 0.0
    for part in filter(None, parts):
        ids = torch.nn.utils.rnn.pad_sequence(
            [torch.cat(pair) for pair in part], batch_first=True, padding_value=pad_token_id
        )
        targets = torch.full_like(ids, IGNORE)
        for row, (prompt, trace) in enumerate(part):
            targets[row, len(prompt) : len(prompt) + len(trace)] = trace
        ids, targets = ids.to(device), targets.to(device)
        logits, drafts = model.draft(ids) if drafting else (model(input_ids=ids, use_cache=False).logits, [])
        loss = F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), targets[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
        )
        extra = mtp_weight * draft_loss(drafts, targets) if drafting else 0.0
        ((loss + extra) / tokens).backward()
        total += loss.item() / tokens
    return total
