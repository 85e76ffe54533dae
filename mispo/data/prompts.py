"""Prompts: reasoning-gym generators, JSONL and parquet files, hub data sets; and the held-out split.

Held out by a hash of the question, never by luck: whether a problem is trained on depends on nothing else.
"""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from mispo.config.schema import DataConfig
from rollouts.trajectory import Prompt

HELD_OUT_SHARE = 1 / 6
"""Share of a generator's questions that is held out."""

MAX_DRAWS = 1_000_000
"""Generated problems looked at for a held-out set before a generator counts as too small."""


class Source(Protocol):
    """Rows by position, endless; `heldout` are the rows for evaluation, which never come up here."""

    heldout: list[dict[str, Any]]

    def row(self, position: int) -> dict[str, Any] | None:
        """The row at a position of the stream, None where a held-out problem was skipped."""
        ...


class PromptStream:
    """Endless prompts for training; the cursor is the whole state."""

    def __init__(self, source: Source, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._source = source
        self._config = config
        self._tokenizer = tokenizer
        self.cursor = 0

    def state(self) -> dict[str, int]:
        """Return what `restore` takes."""
        return {"cursor": self.cursor}

    def restore(self, state: Mapping[str, int]) -> None:
        """Continue at the place of a checkpoint."""
        self.cursor = state["cursor"]

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(position, row) from the cursor on; advances it."""
        while True:
            position = self.cursor
            self.cursor += 1
            row = self._source.row(position)
            if row is not None:
                yield position, row

    def take(self, count: int) -> list[Prompt]:
        """The next prompts. ValueError for a row that makes none."""
        rows = self.rows()
        return [self.prompt(*next(rows)) for _ in range(count)]

    def prompt(self, index: int, row: dict[str, Any]) -> Prompt:
        """A row as a prompt: formatted, templated, tokenized, checked against the budget."""
        return make_prompt(index, row, self._config, self._tokenizer)


@dataclass(frozen=True)
class Data:
    """What training and evaluation read."""

    stream: PromptStream
    heldout: list[Prompt]


def build_data(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Data:
    """Open the source that `data` names. ValueError that names the field or file, and the fix."""
    if (config.task is None) == (config.path is None):
        raise ValueError("data: set exactly one of data.task and data.path")
    source: Source = GymSource(config) if config.task is not None else FileSource(config)
    stream = PromptStream(source, config, tokenizer)
    # Negative indices: a held-out prompt never shares its seeds with a training prompt.
    heldout = [stream.prompt(-1 - number, row) for number, row in enumerate(source.heldout)]
    return Data(stream, heldout)


def make_prompt(index: int, row: dict[str, Any], config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """ValueError for a row without its columns or a prompt over the budget."""
    answer = row.get(config.answer)
    if answer is None or str(answer) == "":
        raise ValueError(f"data.answer: row {index} has no answer in column {config.answer!r}; {_columns(row)}")
    try:
        text = config.prompt.format(**row)
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"data.prompt: {config.prompt!r} asks for a column {error} that row {index} lacks; {_columns(row)}"
        ) from error
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
    )
    if len(chat) > config.max_prompt_tokens:
        raise ValueError(
            f"data.max_prompt_tokens: row {index} has {len(chat)} tokens, {config.max_prompt_tokens} are allowed; "
            "raise the limit or drop the row"
        )
    return Prompt(torch.tensor(chat, dtype=torch.int64), text, str(answer), row, index)


def question_hash(question: str) -> float:
    """Uniform in [0, 1), the same everywhere."""
    return int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big") / 2**64


class GymSource:
    """An endless reasoning-gym generator; a problem's metadata become columns."""

    def __init__(self, config: DataConfig) -> None:
        from reasoning_gym import create_dataset  # a second to import, needed by this source only

        from rewards.gym import check_task

        assert config.task is not None
        try:
            self._dataset = create_dataset(
                check_task(config.task), size=2**31 - 1, seed=config.seed, **config.task_args
            )
        except (TypeError, AssertionError) as error:
            raise ValueError(
                f"data.task_args: {config.task} does not take {dict(config.task_args)} ({error})"
            ) from error
        self.heldout = self._held_out(config)

    def row(self, position: int) -> dict[str, Any] | None:
        entry = self._dataset[position]
        return None if question_hash(entry["question"]) < HELD_OUT_SHARE else _flat(entry)

    def _held_out(self, config: DataConfig) -> list[dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for position in range(min(MAX_DRAWS, 2000 * max(config.eval_size, 1))):
            if len(found) == config.eval_size:
                break
            entry = self._dataset[position]
            if question_hash(entry["question"]) < HELD_OUT_SHARE:
                found.setdefault(entry["question"], _flat(entry))
        if len(found) < config.eval_size:
            raise ValueError(
                f"data.eval_size: {config.eval_size} held-out problems, but {config.task} has only {len(found)} "
                "different ones to hold out; lower it or widen data.task_args"
            )
        return list(found.values())


class FileSource:
    """Rows of a file or hub data set, in a new seeded order each epoch."""

    def __init__(self, config: DataConfig) -> None:
        assert config.path is not None
        rows = _load_rows(config)
        fields = [name for _, name, _, _ in string.Formatter().parse(config.prompt) if name]
        for number, row in enumerate(rows):
            lacking = [name for name in [*fields, config.answer] if row.get(name.split("[")[0]) in (None, "")]
            if lacking:
                field = "data.answer" if config.answer in lacking else "data.prompt"
                raise ValueError(f"{field}: row {number} of {config.path!r} has no {lacking[0]!r}; {_columns(row)}")
        texts = [config.prompt.format(**row) for row in rows]
        questions = sorted(set(texts), key=question_hash)
        if config.eval_size > len(questions) // 2:
            raise ValueError(
                f"data.eval_size: {config.eval_size} of only {len(questions)} different problems in "
                f"{config.path!r}; hold out at most half"
            )
        chosen = set(questions[: config.eval_size])
        first = {text: row for text, row in reversed(list(zip(texts, rows, strict=True)))}
        self.heldout = [first[text] for text in questions[: config.eval_size]]
        self._rows = [row for text, row in zip(texts, rows, strict=True) if text not in chosen]
        self._seed = config.seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def row(self, position: int) -> dict[str, Any] | None:
        epoch, place = divmod(position, len(self._rows))
        if epoch != self._epoch:
            generator = np.random.default_rng([self._seed, epoch])
            self._epoch, self._order = epoch, generator.permutation(len(self._rows))
        return self._rows[self._order[place]]


def _load_rows(config: DataConfig) -> list[dict[str, Any]]:
    path = Path(str(config.path)).expanduser()
    if path.suffix == ".jsonl":
        rows = _jsonl_rows(path)
    elif path.suffix == ".parquet":
        rows = _parquet_rows(path)
    else:
        rows = _hub_rows(config)
    if not rows:
        raise ValueError(f"data.path: {config.path!r} is empty; give at least one row")
    return rows


def _jsonl_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(_existing(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"data.path: {str(path)!r} line {number} is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"data.path: {str(path)!r} line {number} is no object of columns")
        rows.append(row)
    return rows


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    from datasets import Dataset

    try:
        return Dataset.from_parquet(str(_existing(path))).to_list()
    except Exception as error:  # datasets and pyarrow raise many kinds for a broken file
        raise ValueError(f"data.path: {str(path)!r} does not open as parquet ({error})") from error


def _hub_rows(config: DataConfig) -> list[dict[str, Any]]:
    from datasets import load_dataset

    try:
        return load_dataset(config.path, split=config.split).to_list()
    except Exception as error:  # hub, network and format errors share no base class
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"data.path: {config.path!r} (data.split {config.split!r}) does not load: {reason}; "
            "give a .jsonl or .parquet file, or a hub id"
        ) from error


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"data.path: no such file {str(path)!r}; give a .jsonl or .parquet file, or a hub id")
    return path


def _flat(entry: dict[str, Any]) -> dict[str, Any]:
    return {**entry["metadata"], **entry}


def _columns(row: dict[str, Any]) -> str:
    return f"its columns are {', '.join(row)}"
