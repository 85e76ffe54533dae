"""Rows of JSONL and parquet files and of hub data sets. Errors name the setting, `<section>.path`, and the fix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]
"""A data row: column → value, as JSON has it."""


def load_rows(path: str, split: str, section: str) -> list[Row]:
    """Read all rows of a .jsonl or .parquet file, or of a split of a hub data set.

    section: of the config, for errors. ValueError for data that does not load or is empty.
    """
    file, key = Path(path).expanduser(), f"{section}.path"
    if file.suffix == ".jsonl":
        rows = _jsonl_rows(file, key)
    elif file.suffix == ".parquet":
        rows = _parquet_rows(file, key)
    else:
        rows = _hub_rows(path, split, section)
    if not rows:
        raise ValueError(f"{key}: {path!r} is empty; give at least one row")
    return rows


def _jsonl_rows(path: Path, key: str) -> list[Row]:
    rows = []
    for number, line in enumerate(_existing(path, key).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{key}: {str(path)!r} line {number} is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{key}: {str(path)!r} line {number} is not a JSON object of columns")
        rows.append(row)
    return rows


def _parquet_rows(path: Path, key: str) -> list[Row]:
    from datasets import Dataset

    try:
        return Dataset.from_parquet(str(_existing(path, key))).to_list()
    except Exception as error:  # datasets and pyarrow raise many kinds for a broken file
        raise ValueError(f"{key}: {str(path)!r} does not open as parquet ({error})") from error


def _hub_rows(path: str, split: str, section: str) -> list[Row]:
    from datasets import load_dataset

    try:
        return load_dataset(path, split=split).to_list()
    except Exception as error:  # hub, network and format errors share no base class
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{section}.path: {path!r} ({section}.split {split!r}) does not load: {reason}; "
            "give a .jsonl or .parquet file, or a hub id"
        ) from error


def _existing(path: Path, key: str) -> Path:
    if not path.is_file():
        raise ValueError(f"{key}: no such file {str(path)!r}; give a .jsonl or .parquet file, or a hub id")
    return path
