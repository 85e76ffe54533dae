"""Prompts: problems templated and tokenized, endless for training, and those that are held out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from transformers import PreTrainedTokenizerBase

from mispo.data.mixture import MixedSettings, open_mixture
from mispo.data.sources import Problem, Source, SourceSettings, open_source
from rollouts.trajectory import Prompt


class DataSettings(SourceSettings, Protocol):
    """The section `data`: a source, and what holds for all sources.

    max_prompt_tokens: a longer prompt is an error. seed: of the stream. eval_size: problems that are held out.
    """

    @property
    def max_prompt_tokens(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def eval_size(self) -> int: ...


class PromptStream:
    """Draws endless prompts for training; the cursor, a position of the source, is the whole state."""

    def __init__(self, source: Source, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int) -> None:
        self._source = source
        self._tokenizer = tokenizer
        self._max_prompt_tokens = max_prompt_tokens
        self.cursor = 0

    def take(self, count: int) -> list[Prompt]:
        """Return the next prompts and advance the cursor. ValueError for a row that makes none."""
        prompts: list[Prompt] = []
        while len(prompts) < count:
            position = self.cursor
            self.cursor += 1
            problem = self._source.problem(position)
            if problem is not None:
                prompts.append(make_prompt(position, problem, self._tokenizer, self._max_prompt_tokens))
        return prompts

    def state(self) -> dict[str, int]:
        """Return {"cursor": position of the next prompt}."""
        return {"cursor": self.cursor}

    def restore(self, state: Mapping[str, int]) -> None:
        """Continue where `state` was taken."""
        self.cursor = state["cursor"]


@dataclass(frozen=True)
class Data:
    """The prompts of training and evaluation. name: of the held-out problems, in metrics."""

    stream: PromptStream
    heldout: list[Prompt]
    name: str


def build_data(
    config: DataSettings, tokenizer: PreTrainedTokenizerBase, mixture: Mapping[str, MixedSettings] | None = None
) -> Data:
    """Open the source that `data` names, or the mixture. ValueError that names the field or file, and the fix.

    The held-out problems are named after the task or file, or "mixture" if several sources are mixed.
    """
    if not mixture:
        source = open_source(config, seed=config.seed, held_out=config.eval_size)
        name = config.task or Path(str(config.path)).stem
    elif config.task is not None or config.path is not None:
        raise ValueError("data.mixture: cannot be combined with data.task and data.path; set both to null")
    else:
        source = open_mixture(mixture, seed=config.seed, held_out=config.eval_size)
        name = next(iter(mixture)) if len(mixture) == 1 else "mixture"
    # Negative indices: a held-out prompt never shares its seeds with a training prompt.
    heldout = [
        make_prompt(-1 - number, problem, tokenizer, config.max_prompt_tokens)
        for number, problem in enumerate(source.heldout)
    ]
    return Data(PromptStream(source, tokenizer, config.max_prompt_tokens), heldout, name)


def make_prompt(index: int, problem: Problem, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int) -> Prompt:
    """Apply the chat template and tokenize. ValueError for a prompt over the budget."""
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": problem.text}], add_generation_prompt=True, return_dict=False
    )
    if len(chat) > max_prompt_tokens:
        raise ValueError(
            f"data.max_prompt_tokens: row {index} has {len(chat)} tokens, {max_prompt_tokens} are allowed; "
            "raise the limit or drop the row"
        )
    return Prompt(torch.tensor(chat, dtype=torch.int64), problem.text, problem.answer, problem.row, index)
