"""Small data files and the settings that name them."""

import json
from pathlib import Path
from typing import Any

from mispo.config.schema import DataConfig
from rollouts.trajectory import Prompt

BITS = {"task": "count_bits", "task_args": {"max_n": 255}, "prompt": "ones in {number}?", "max_prompt_tokens": 32}


def gym(**changes: Any) -> DataConfig:
    return DataConfig(**{**BITS, "eval_size": 16, **changes})


def file(path: Path, **changes: Any) -> DataConfig:
    return DataConfig(**{"path": str(path), "eval_size": 0, **changes})


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(prompts: list[Prompt]) -> list[str]:
    return [prompt.text for prompt in prompts]
