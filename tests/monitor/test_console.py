"""What a person sees: step lines that fit, missing and broken numbers, the curve, the table."""

import io

import pytest
from rich.console import Console

from mispo.monitor.console import StepPrinter, eval_line, make_console, step_header, step_line, summary
from mispo.monitor.terminal_curve import curve, nice_top

METRICS = {
    "reward/mean": 0.4567,
    "response_length/mean": 17.25,
    "trunc/rate": 0.031,
    "mis/traj_accept": 1.0,
    "mismatch/k1": 3.2e-9,
    "actor/loss": 0.0123,
    "actor/entropy": 0.41,
    "actor/grad_norm": float("nan"),
    "critic/vf_explained_var": None,
    "perf/tokens_per_s": 1234.5,
    "timing_s/step": 4.4,
}


def test_numbers_stand_under_their_titles() -> None:
    header, line = step_header(), step_line(3, 25, METRICS)
    assert len(header.plain) == len(line.plain) <= 120
    for title, cell in (("reward", "0.457"), ("length", "17.2"), ("accept", "100%"), ("routing", "-"), ("grad", "nan")):
        end = header.plain.index(title) + len(title)
        assert line.plain[:end].endswith(f" {cell}"), title
    assert line.plain.strip().startswith("3/25")


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_a_narrow_terminal_loses_the_least_important_columns(width: int) -> None:
    header = step_header(width).plain
    assert len(header) <= max(width, 40)
    assert all(title in header for title in ("reward", "length", "accept"))
    assert len(step_line(1, 2, METRICS, width).plain) == len(header)


def test_a_number_too_long_for_its_column_does_not_break_the_line() -> None:
    line = step_line(1, 2, {**METRICS, "actor/loss": -123456789.0, "response_length/mean": 1e9})
    assert len(line.plain) == len(step_header().plain)


def test_broken_numbers_are_red() -> None:
    styles = [str(span.style) for span in step_line(1, 2, METRICS).spans]
    assert styles.count("bold red") == 2  # gradient norm and explained variance


def test_the_header_comes_again() -> None:
    out = io.StringIO()
    printer = StepPrinter(50, make_console(out))
    for step in range(1, 42):
        printer.step(step, METRICS)
    printer.eval(41, {"eval/bits/greedy": 0.5})
    lines = out.getvalue().splitlines()
    assert sum("reward" in line for line in lines) == 3
    assert lines[-1].split() == ["41/50", "eval", "bits/greedy", "0.500"]
    assert eval_line(0, 9, {}).plain.split() == ["0/9", "eval"]


def test_the_summary_compares_before_and_after() -> None:
    out = io.StringIO()
    before = {"eval/bits/greedy": 0.3, "response_length/mean": 12.0}
    after = {"eval/bits/greedy": 0.95, "eval/bits/avg@4": 0.9}
    Console(file=out, width=100).print(summary(before, after, {"constant guess": 0.207}))
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert ["bits", "greedy", "0.300", "0.950", "+0.650"] in lines
    assert ["bits", "avg@4", "-", "0.900", "-"] in lines
    assert ["constant", "guess", "0.207"] in lines


def test_the_curve_shows_reward_accuracy_and_length() -> None:
    rows = [{"step": 0, "eval/bits/greedy": 0.3, "response_length/mean": 10.0}]
    rows += [{"step": s, "reward/mean": s / 20, "response_length/mean": 3.0 * s} for s in range(1, 21)]
    rows[-1] = {**rows[-1], "eval/bits/greedy": 0.95}
    text = curve(rows, width=100, height=9)
    lines = text.splitlines()
    assert len(lines) == 12
    assert max(map(len, lines)) <= 100
    assert "reward   ◆ bits/greedy" in lines[0]
    assert "mean length" in lines[0]
    assert text.count("◆") == 3  # two evaluations and the legend
    assert lines[1].startswith(" 1.00 │")
    assert "▆◆" in lines[1]
    assert lines[-1].split() == ["0", "step", "20", "0", "step", "20"]


@pytest.mark.parametrize("rows", [[], [{"step": 3, "reward/mean": 0.5}], [{"step": 1, "reward/mean": -2.0}]])
def test_a_curve_of_next_to_nothing_is_drawn_too(rows: list[dict[str, float]]) -> None:
    assert len(curve(rows).splitlines()) == 12


@pytest.mark.parametrize(
    ("values", "top"), [([], 1.0), ([0.0], 1.0), ([17.0], 20.0), ([61.2], 75.0), ([1000.0], 1000.0)]
)
def test_axes_end_at_round_numbers(values: list[float], top: float) -> None:
    assert nice_top(values) == top
