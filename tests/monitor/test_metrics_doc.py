"""docs/metrics.md as a table of names: whole rows, names that do not collide, files that exist."""

import re

import pytest

from support.metrics_doc import DOC, documented, matching

TEXT = DOC.read_text(encoding="utf-8")
NAMES = documented(TEXT)


def test_every_row_is_whole_and_every_maker_exists() -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith("| `")]
    assert len(rows) == len(NAMES) > 90
    for row in rows:
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
        assert len(cells) == 4, row
        assert all(cells), row
    sections = TEXT.split("\n## ")[1:]
    for section in sections:
        files = re.findall(r"`((?:mispo|rollouts)/[\w/]+\.py)`", section.split("\n| ")[0])
        assert files, section[:40]
        assert all((DOC.parents[1] / file).is_file() for file in files), files


def test_no_name_without_placeholders_is_one_of_another_pattern_but_for_parts_of_the_reward() -> None:
    patterns = [name for name in NAMES if "<" in name and name != "reward/<part>"]
    for name in NAMES:
        if "<" not in name:
            assert matching(name, patterns) == [], name


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("reward/mean", "reward/mean"),
        ("reward/task", "reward/<part>"),
        ("moe/confidence/layer_12", "moe/confidence/layer_<layer>"),
        ("mis/accept_len/16384", "mis/accept_len/<length>"),
        ("eval/my set/avg@64", "eval/<set>/avg@<k>"),
        ("attribution/weights_mediated", "attribution/<cause>_mediated"),
        ("attribution/mediated", "attribution/mediated"),
    ],
)
def test_a_metric_has_one_name(key: str, name: str) -> None:
    assert matching(key, NAMES) == [name]


@pytest.mark.parametrize("key", ["reward/", "moe/confidence/layer_x", "moe/confidence", "mis/accept_len/", "new/one"])
def test_an_unknown_metric_has_none(key: str) -> None:
    assert matching(key, NAMES) == []


def test_what_not_every_run_has_is_marked_by_row_or_section() -> None:
    first = "## A\n| `a/b` | x | s | w |\n| `a/c` | x; only with y | s | w |\n"
    text = first + "## B\nMade; only with z.\n| `b/d` | x | s | w |"
    assert documented(text) == {"a/b": True, "a/c": False, "b/d": False}
