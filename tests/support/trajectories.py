"""Prompts and trajectories made by hand, and a tokenizer of four tokens."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rollouts.trajectory import Prompt, Trajectory, Turn


def letters() -> PreTrainedTokenizerFast:
    """Tokens: 0 the end, 1 a space, 2 to 4 the letters a to c."""
    words = Tokenizer(models.WordLevel({"<end>": 0, " ": 1, "a": 2, "b": 3, "c": 4}))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")


def letter_prompts(count: int = 3) -> list[Prompt]:
    """Prompts that end with a, b, c, a, …"""
    return [
        Prompt(torch.tensor([4, 2 + n % 3]), f"question {n}", f"answer {n}", {"level": n}, index=10 + n)
        for n in range(count)
    ]


def made_trajectory(index: int = 0, *, length: int = 3, **fields: Any) -> Trajectory:
    """One turn of `length` tokens index, index + 1, …; other fields as given."""
    given = {
        "prompt": Prompt(torch.tensor([5, 6]), "ones in 5?", "2", {}, index),
        "sample": 0,
        "seed": 2**62 + index,
        "completion_ids": torch.arange(length) + index,
        "action_mask": torch.ones(length, dtype=torch.bool),
        "rollout_logprobs": -torch.arange(1, length + 1) / 10,
        "turns": (Turn((0, length), 9, "stop"),),
        "finish_reason": "stop",
        "weight_version": 9,
        "routing_confidence": None,
        "routed_experts": None,
        "completion": "<think>5",
    }
    return Trajectory(**(given | fields))
