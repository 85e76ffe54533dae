"""The house keeps its measures: sizes of files, functions and classes, counted in the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("mispo", "rollouts", "rewards", "recipes", "model")

FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

LONGEST = {"mispo/cli.py": 120, "mispo/loop.py": 150, "mispo/run.py": 80}
"""Lines of the files that one reads first."""


RECORDS = ("mispo/config/", "model/presets.py", "mispo/metrics/diagnosis.py", "rollouts/trajectory.py")
"""Where a field is a setting or a measured number: these may have more than 12."""


def definitions(kinds: tuple[type, ...]) -> Iterator[tuple[str, ast.AST]]:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, kinds):
                yield f"{path.relative_to(ROOT)}:{node.name}", node


def fields(node: ast.ClassDef) -> int:
    """Annotated names of the class body, or what __init__ assigns to self, whichever is more."""
    annotated = sum(
        isinstance(item, ast.AnnAssign) and "ClassVar" not in ast.unparse(item.annotation) for item in node.body
    )
    assigned = {
        target.attr
        for function in node.body
        if isinstance(function, ast.FunctionDef) and function.name == "__init__"
        for statement in ast.walk(function)
        if isinstance(statement, ast.Assign | ast.AnnAssign)
        for target in (statement.targets if isinstance(statement, ast.Assign) else [statement.target])
        if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self"
    }
    return max(annotated, len(assigned))


def test_no_function_is_longer_than_50_lines() -> None:
    functions = definitions((ast.FunctionDef, ast.AsyncFunctionDef))
    long = {name: node.end_lineno - node.lineno + 1 for name, node in functions}
    assert {name: lines for name, lines in long.items() if lines > 50} == {}


def test_no_class_has_more_than_12_fields() -> None:
    classes = {name: fields(node) for name, node in definitions((ast.ClassDef,)) if not name.startswith(RECORDS)}
    assert {name: count for name, count in classes.items() if count > 12} == {}


def test_files_are_small() -> None:
    lines = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: count for name, count in lines.items() if count > LONGEST.get(name, 400)} == {}


def test_few_files_lie_at_the_root() -> None:
    assert len(list((ROOT / "mispo").glob("*.py"))) <= 6


@pytest.mark.parametrize("package", PACKAGES)
def test_every_folder_of_modules_is_a_package(package: str) -> None:
    folders = {path.parent for path in (ROOT / package).rglob("*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []
