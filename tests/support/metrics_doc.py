"""Read docs/metrics.md: the names of metrics, and which of them not every run has."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

DOC = Path(__file__).parents[2] / "docs" / "metrics.md"

PLACEHOLDERS = {
    "layer": r"\d+",
    "length": r"\d+",
    "lag": r"\d+",
    "k": r"\d+",
    "set": r".+",
    "part": r"\w+",
    "cause": r"weights|precision|rest",
}


def documented(text: str) -> Mapping[str, bool]:
    """Name with placeholders → whether every run has it: its line and the beginning of its section lack "only with"."""
    found: dict[str, bool] = {}
    always = True
    for line in text.splitlines():
        if line.startswith("## "):
            always = True
        elif not line.startswith("|"):
            always &= "only with" not in line
        row = re.match(r"\| `([^`]+)` \| ([^|]+(?:\\\|[^|]+)*) \|", line)
        if row:
            assert row[1] not in found, f"{row[1]} is documented twice"
            found[row[1]] = always and "only with" not in row[2]
    return found


def matching(key: str, names: Iterable[str]) -> list[str]:
    """The documented names of a metric; one without placeholders goes before those with."""
    names = list(names)
    return [key] if key in names else [name for name in names if re.fullmatch(_pattern(name), key)]


def _pattern(name: str) -> str:
    pieces = re.split(r"<(\w+)>", name)
    return "".join(f"(?:{PLACEHOLDERS[piece]})" if i % 2 else re.escape(piece) for i, piece in enumerate(pieces))
