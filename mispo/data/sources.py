"""Where problems come from: a reasoning-gym generator, or the rows of a file or hub data set.

A hash of the question decides which problems are held out, so the choice depends on neither chance nor order.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mispo.data.files import Row, load_rows
from rewards.gym import check_task

HELD_OUT_SHARE = 1 / 6
"""Share of a generator's questions that is held out."""

MAX_DRAWS = 1_000_000
"""Generated problems looked at for a held-out set before a generator counts as too small."""


@dataclass(frozen=True)
class Problem:
    """A row as it was read. text: the user's message. answer: the reference answer. row: all columns."""

    text: str
    answer: str
    row: Row


class SourceSettings(Protocol):
    """Names a source, in `data`, `data.mixture.NAME` and `eval.sets.NAME`: exactly one of task and path.

    task, task_args: a reasoning-gym generator and its arguments. path, split: a file, or a hub data set and its split.
    prompt: format string over the columns. answer: column with the reference answer.
    """

    @property
    def task(self) -> str | None: ...
    @property
    def task_args(self) -> Mapping[str, Any]: ...
    @property
    def path(self) -> str | None: ...
    @property
    def split(self) -> str: ...
    @property
    def prompt(self) -> str: ...
    @property
    def answer(self) -> str: ...


class Source(Protocol):
    """An endless sequence of problems by position; `heldout` are those for evaluation, which are not in it."""

    @property
    def heldout(self) -> Sequence[Problem]: ...

    def problem(self, position: int) -> Problem | None:
        """Return the problem at a position of the stream, None where a held-out one was skipped."""
        ...


def open_source(
    settings: SourceSettings, *, seed: int, held_out: int, section: str = "data", size_key: str = "data.eval_size"
) -> Source:
    """Open the source that the settings name, and hold out `held_out` problems.

    section, size_key: of the config, for errors. ValueError that names the setting or file, and the fix.
    """
    if (settings.task is None) == (settings.path is None):
        raise ValueError(f"{section}: set exactly one of {section}.task and {section}.path")
    if settings.task is not None:
        return GymSource(settings, settings.task, seed, held_out, section, size_key)
    return FileSource(settings, seed, held_out, section, size_key)


def evaluation_problems(settings: SourceSettings, size: int | None, *, seed: int, section: str) -> Sequence[Problem]:
    """Read the first `size` problems of a source, None for all, to evaluate on.

    From a file these are the first rows. From a generator they are questions of the share that is held out from all
    training on generators. ValueError as from `open_source`, and for a generator without a size.
    """
    if settings.task is None and settings.path is not None:
        return read_problems(settings, section)[:size]
    if size is None:
        raise ValueError(f"{section}.size: a generator has no end; give a number of problems")
    return open_source(settings, seed=seed, held_out=size, section=section, size_key=f"{section}.size").heldout


class GymSource:
    """Draws from an endless reasoning-gym generator; a problem's metadata become columns."""

    def __init__(
        self, settings: SourceSettings, task: str, seed: int, held_out: int, section: str, size_key: str
    ) -> None:
        from reasoning_gym import create_dataset  # a second to import, needed by this source only

        self._settings, self._section = settings, section
        check_task(task, f"{section}.task")
        try:
            self._dataset = create_dataset(task, size=2**31 - 1, seed=seed, **settings.task_args)
        except (TypeError, AssertionError) as error:
            raise ValueError(
                f"{section}.task_args: {task} does not take {dict(settings.task_args)} ({error})"
            ) from error
        self.heldout = self._held_out(held_out)
        if len(self.heldout) < held_out:
            raise ValueError(
                f"{size_key}: {held_out} held-out problems, but {task} has only {len(self.heldout)} different ones to "
                f"hold out; lower it or widen {section}.task_args"
            )

    def problem(self, position: int) -> Problem | None:
        entry = self._dataset[position]
        return None if question_hash(entry["question"]) < HELD_OUT_SHARE else self._read(entry, position)

    def _held_out(self, count: int) -> Sequence[Problem]:
        problems: dict[str, Problem] = {}
        for position in range(min(MAX_DRAWS, 2000 * max(count, 1))):
            if len(problems) == count:
                break
            entry = self._dataset[position]
            question = entry["question"]
            if question not in problems and question_hash(question) < HELD_OUT_SHARE:
                problems[question] = self._read(entry, position)
        return list(problems.values())

    def _read(self, entry: Row, position: int) -> Problem:
        return read_problem({**entry["metadata"], **entry}, position, self._settings, self._section)


class FileSource:
    """Draws the rows of a file or hub data set in a new seeded order each epoch."""

    def __init__(self, settings: SourceSettings, seed: int, held_out: int, section: str, size_key: str) -> None:
        problems = read_problems(settings, section)
        first = {problem.text: problem for problem in reversed(problems)}
        questions = sorted(first, key=question_hash)
        if held_out > len(questions) // 2:
            raise ValueError(
                f"{size_key}: {held_out} of only {len(questions)} different problems in {settings.path!r}; "
                "hold out at most half"
            )
        chosen = set(questions[:held_out])
        self.heldout: Sequence[Problem] = [first[text] for text in questions[:held_out]]
        self._problems = [problem for problem in problems if problem.text not in chosen]
        self._seed = seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def problem(self, position: int) -> Problem | None:
        epoch, place = divmod(position, len(self._problems))
        if epoch != self._epoch:
            generator = np.random.default_rng([self._seed, epoch])
            self._epoch, self._order = epoch, generator.permutation(len(self._problems))
        return self._problems[self._order[place]]


def read_problems(settings: SourceSettings, section: str) -> list[Problem]:
    """Read all rows of a file or hub data set. ValueError for a row without the columns that the settings name."""
    rows = load_rows(str(settings.path), settings.split, section)
    fields = [name for _, name, _, _ in string.Formatter().parse(settings.prompt) if name]
    for number, row in enumerate(rows):
        lacking = [name for name in [*fields, settings.answer] if row.get(name.split("[")[0]) in (None, "")]
        if lacking:
            key = f"{section}.answer" if settings.answer in lacking else f"{section}.prompt"
            raise ValueError(f"{key}: row {number} of {settings.path!r} has no {lacking[0]!r}; {_columns(row)}")
    return [read_problem(row, number, settings, section) for number, row in enumerate(rows)]


def read_problem(row: Row, number: int, settings: SourceSettings, section: str) -> Problem:
    """Read a row: its message and its answer. ValueError if it lacks their columns."""
    answer = row.get(settings.answer)
    if answer is None or str(answer) == "":
        raise ValueError(f"{section}.answer: row {number} has no answer in column {settings.answer!r}; {_columns(row)}")
    try:
        text = settings.prompt.format(**row)
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"{section}.prompt: {settings.prompt!r} asks for a column {error} that row {number} lacks; {_columns(row)}"
        ) from error
    return Problem(text, str(answer), row)


def question_hash(question: str) -> float:
    """Map a question to [0, 1), uniformly and the same everywhere."""
    return int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big") / 2**64


def _columns(row: Row) -> str:
    return f"its columns are {', '.join(row)}"
