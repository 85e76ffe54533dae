"""What a run leaves in its directory and shows on the screen: the real tracker, files and console, and two ranks."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from mispo.algorithm.filter import Selection
from mispo.algorithm.method import Targets, ValueTargets
from mispo.algorithm.objective import Samples
from mispo.algorithm.variance_shares import Attribution, Part
from mispo.config.schema import AlarmConfig, MispoConfig, TrackingConfig
from mispo.metrics.diagnosis import Diagnosis
from mispo.monitor.alarms import Alarms
from mispo.monitor.console import StepPrinter, make_console
from mispo.monitor.journal import Clock, Journal, JournalSettings
from mispo.monitor.rows import read_rows
from mispo.monitor.tracking import Tracker
from mispo.system.rundir import RunDir
from mispo.trainer.batch import Batch, Packing, pack
from mispo.trainer.engine import Update
from mispo.trainer.ranks import Ranks
from mispo.trainer.scoring import PolicyScores, Scores, Values
from rollouts.records import load_rollouts
from support.trajectories import made_trajectory

SETTINGS = JournalSettings(steps=5, pretrain_steps=2, rollouts_every=2, lag=0)
PACKING = Packing("bootstrap", prompts_per_step=2, samples_per_prompt=1, penalty=lambda length: 0.0)
GRADED = {"reward": 1.0, "reward_info": {"outcome": "ok", "message": ""}, "reward_parts": {"task": 1.0}}
TRACE = {"question": "q", "answer": "a", "completion": "c", "reward": 1.0}
FINE = {"mis/traj_accept": 1.0, "mis/token_accept": 1.0, "mismatch/k3": 0.0, "reward/failed": 0.0}
BAD = FINE | {"reward/failed": 0.9}


def journal(root: Path, *, first: bool = True, action: str = "warn", **changed: Any) -> tuple[Journal, io.StringIO]:
    """A journal and its screen; only the first rank of a run has tracker and printer."""
    screen = io.StringIO()
    tracking = TrackingConfig(wandb="disabled")
    tracker = Tracker(root, settings=tracking, config={}, resume_step=None, wandb_id=None) if first else None
    alarms = Alarms(MispoConfig(alarms=AlarmConfig(action=action, patience=2)))
    printer = StepPrinter(SETTINGS.steps, make_console(screen)) if first else None
    settings = replace(SETTINGS, **changed)
    return Journal(RunDir(root), settings, tracker=tracker, printer=printer, alarms=alarms), screen


def step_of(step: int, ranks: Ranks, *, critic: bool) -> tuple[Batch, Scores, Targets]:
    """Trajectories of 2 and 4 tokens, written at positions 1 and 0 of the step."""
    trajectories = [made_trajectory(b, length=length, **GRADED) for b, length in enumerate((2, 4))]
    batch = pack(trajectories, torch.tensor([1, 0]), PACKING, step=step, version=9, ranks=ranks)
    advantages, everything = torch.tensor([1.0, 2.0, 0.0, 4.0, 4.0, 4.0]), torch.ones(6, dtype=torch.bool)
    log_rho_B = torch.tensor([0.25, -0.5], dtype=torch.float64)
    values = Values(torch.zeros(6), torch.tensor([0.5, 0.75])) if critic else None
    targets = Targets(
        samples=Samples(torch.zeros(6), advantages, torch.ones(6), everything),
        values=ValueTargets(torch.zeros(6), advantages / 2, everything) if critic else None,
        selection=Selection(everything, torch.tensor([0, 3]), log_rho_B),
        log_x_N=torch.zeros(6, dtype=torch.float64),
    )
    return batch, Scores(PolicyScores(torch.zeros(6), torch.zeros(6), None), values, None), targets


@pytest.mark.parametrize("critic", [True, False])
def test_kept_rollouts_say_what_was_decided(tmp_path: Path, critic: bool) -> None:
    kept, _ = journal(tmp_path)
    batch, scores, targets = step_of(2, Ranks(0, 1, torch.device("cpu")), critic=critic)
    kept.keep(batch, scores, targets)
    path = tmp_path / "rollouts" / "step_2.parquet"
    decided = {
        "position": [1, 0],
        "advantage_mean": [1.5, 3.0],
        "log_rho": [0.25, -0.5],
        "multiplicity": [0, 3],
    }
    if critic:
        decided |= {"target_mean": [0.75, 1.5], "bootstrap": [0.5, 0.75]}
    table = pq.read_table(path)
    assert {name: table[name].to_pylist() for name in decided} == decided
    assert ("bootstrap" in table.column_names) == critic
    assert [len(t) for t in load_rollouts(path)] == [2, 4]


def test_rollouts_are_kept_every_so_many_steps_and_on_every_rank(tmp_path: Path) -> None:
    for rank in range(2):
        kept, _ = journal(tmp_path, first=rank == 0)
        for step in range(1, 5):
            kept.keep(*step_of(step, Ranks(rank, 2, torch.device("cpu")), critic=False))
        kept.close(0)
    names = sorted(path.name for path in (tmp_path / "rollouts").iterdir())
    assert names == [f"step_{step}.rank{rank}.parquet" for step in (2, 4) for rank in (0, 1)]
    never, _ = journal(tmp_path / "never", rollouts_every=0)
    never.keep(*step_of(2, Ranks(0, 1, torch.device("cpu")), critic=False))
    assert not (tmp_path / "never" / "rollouts").exists()


def test_row_0_is_the_state_before_rl(tmp_path: Path) -> None:
    kept, screen = journal(tmp_path)
    metrics = {"eval/t/greedy": 0.25, "eval/response_length": 7.0, "reference/constant_guess": 0.1}
    kept.baseline(metrics, [TRACE], ["a note"])
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 0, **metrics, "response_length/mean": 7.0}]
    assert json.loads((tmp_path / "notes.json").read_text()) == ["a note"]
    assert json.loads((tmp_path / "samples_before.jsonl").read_text()) == TRACE
    assert screen.getvalue().split() == ["0/5", "eval", "t/greedy", "0.250"]
    assert metrics.keys() == {"eval/t/greedy", "eval/response_length", "reference/constant_guess"}


def test_without_an_evaluation_row_0_is_empty_and_says_nothing(tmp_path: Path) -> None:
    kept, screen = journal(tmp_path)
    kept.baseline({}, [], [])
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 0}]
    assert screen.getvalue() == ""


def test_a_step_is_a_line_an_evaluation_and_a_row(tmp_path: Path) -> None:
    kept, screen = journal(tmp_path)
    kept.line(3, {"reward/mean": 0.5})
    assert kept.step == 3
    kept.evaluation(3, {"eval/t/greedy": 0.75}, [TRACE, TRACE])
    assert kept.row(3, FINE) is None
    header, line, evaluated = screen.getvalue().splitlines()
    assert header.split()[:2] == ["step", "reward"]
    assert line.split()[:2] == ["3/5", "0.500"]
    assert evaluated.split() == ["3/5", "eval", "t/greedy", "0.750"]
    assert len((tmp_path / "samples_after.jsonl").read_text().splitlines()) == 2
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 3, **FINE}]


def test_pretraining_is_one_line_for_each_rollout(tmp_path: Path) -> None:
    kept, screen = journal(tmp_path)
    kept.pretraining(1, [Update(0.25, 1.0, 1e-3, True), Update(0.75, 1.0, 1e-3, True)])
    kept.pretraining(2, [])
    assert screen.getvalue().splitlines() == [
        "critic pre-training 1/2  loss 0.5000",
        "critic pre-training 2/2  loss 0.0000",
    ]


@pytest.mark.parametrize(("action", "stops"), [("warn", False), ("stop", True), ("off", False)])
@pytest.mark.parametrize("first", [True, False])
def test_an_alarm_warns_on_one_rank_and_stops_all(tmp_path: Path, action: str, stops: bool, first: bool) -> None:
    """Due in the second bad step in a row; every rank gets the same reason."""
    kept, screen = journal(tmp_path, action=action, first=first)
    reasons = [kept.row(step, row) for step, row in enumerate([BAD, FINE, BAD, BAD, BAD], 1)]
    assert [reason is not None for reason in reasons] == [False, False, False, stops, False]
    assert stops == ("reward/failed: the verifier failed on 90%" in (reasons[3] or ""))
    told = screen.getvalue().replace("\n", " ").count("alarm: reward/failed")
    assert told == int(first and action != "off")


def test_a_resumed_run_counts_its_alarms_on(tmp_path: Path) -> None:
    before, _ = journal(tmp_path / "before", action="stop")
    before.row(1, BAD)
    state = json.loads(json.dumps(before.state()))
    assert state == {
        "alarms": {"acceptance": 0, "mismatch": 0, "critic": 0, "rewards": 1, "routing": 0},
        "wandb_id": None,
    }
    after, _ = journal(tmp_path / "after", action="stop")
    after.restore(state)
    assert after.row(2, BAD) is not None


def test_other_ranks_write_and_show_nothing_but_their_rollouts(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    kept, screen = journal(tmp_path, first=False)
    kept.say("a line")
    kept.baseline({"eval/t/greedy": 0.25}, [TRACE], ["a note"])
    kept.line(1, {"reward/mean": 0.5})
    kept.evaluation(1, {"eval/t/greedy": 0.75}, [TRACE])
    kept.row(1, FINE)
    kept.pretraining(1, [])
    kept.attribution(1, *attributed(stale=False))
    assert kept.state()["wandb_id"] is None
    kept.close(0)
    assert screen.getvalue() == ""
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def attributed(*, stale: bool) -> tuple[Attribution, Diagnosis]:
    """Of a dense model, all of whose mismatch is precision."""
    nan = float("nan")
    part = Part(share=1.0, share_error=0.0, mediated=nan, mediated_error=nan, mean=0.0, rms=1e-3)
    attribution = Attribution(
        {"precision": part}, nan, nan, 1e-6, 0.0, 0.0, 100, 0, 10, replayed=False, identical=False
    )
    measured: dict[str, Any] = {declared.name: nan for declared in fields(Diagnosis)}
    measured |= {"tokens": 100, "trajectories": 10, "replaying": False, "stale": stale, "window": (0.99, 1.01)}
    return attribution, Diagnosis(**measured)


def test_the_first_attribution_says_its_conclusion_and_later_ones_are_files(tmp_path: Path) -> None:
    kept, screen = journal(tmp_path, lag=3)
    kept.attribution(1, *attributed(stale=False))
    kept.attribution(2, *attributed(stale=False))
    assert screen.getvalue().count("routing: ") == 1
    assert "those of later steps lag by rollout.lag=3" in screen.getvalue()
    names = sorted(path.name for path in (tmp_path / "attribution").iterdir())
    assert names == ["step_1.json", "step_1.png", "step_2.json", "step_2.png"]


def test_the_clock_adds_a_phase_up_and_tells_who_watches() -> None:
    watched = []

    @contextmanager
    def watch(phase: str) -> Iterator[None]:
        watched.append(phase)
        yield

    clock = Clock(watch)
    with clock("step"):
        for _ in range(2):
            with clock("actor"):
                pass
    seconds = clock.take()
    assert watched == ["step", "actor", "actor"]
    assert set(seconds) == {"timing_s/step", "timing_s/actor"}
    assert seconds["timing_s/step"] >= seconds["timing_s/actor"] >= 0
    assert clock.take() == {}
