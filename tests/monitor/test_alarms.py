"""Each alarm: when it is due, and which cause it names."""

import pytest

from mispo.config.load import load_config
from mispo.monitor.alarms import RULES, Alarms

HEALTHY = {
    "mis/traj_accept": 0.9,
    "mis/token_accept": 1.0,
    "mismatch/k3": 1e-4,
    "critic/vf_explained_var": 0.5,
    "trunc/bootstrap_mean": 0.5,
    "trunc/bootstrap_gap": 0.0,
    "reward/finished_mean": 0.5,
    "reward/failed": 0.0,
}

SICK = {
    "acceptance": {"mis/traj_accept": 0.001},
    "mismatch": {"mismatch/k3": 0.5},
    "critic": {"critic/vf_explained_var": -0.1, "trunc/bootstrap_gap": 0.4},
    "rewards": {"reward/failed": 0.75},
}


def test_a_healthy_step_raises_none() -> None:
    alarms = Alarms(load_config(["alarms.patience=1"]))
    assert alarms.check(HEALTHY) == []
    assert SICK.keys() == RULES.keys()


@pytest.mark.parametrize("name", SICK)
def test_an_alarm_is_told_once_when_its_sign_was_seen_often_enough_in_a_row(name: str) -> None:
    alarms = Alarms(load_config(["alarms.patience=2"]))
    sick = HEALTHY | SICK[name]
    told = [[alarm.name for alarm in alarms.check(metrics)] for metrics in (sick, HEALTHY, sick, sick, sick)]
    assert told == [[], [], [], [name], []]


@pytest.mark.parametrize(
    ("override", "cause"),
    [
        ("rollout.staleness=3", "stale weights"),
        ("rollout.dtype=bf16", "precision (rollout.dtype=bf16"),
        ("rollout.temperature=0.7", "temperature"),
    ],
)
def test_a_mismatch_names_the_cause_that_the_settings_admit(override: str, cause: str) -> None:
    (alarm,) = Alarms(load_config(["alarms.patience=1", override])).check(HEALTHY | SICK["mismatch"])
    assert f"Suspected: {cause}" in alarm.text
