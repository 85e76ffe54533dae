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
    "moe/low_confidence/mean": 0.1,
    "moe/expert_agreement": 0.98,
}

SICK = {
    "acceptance": {"mis/traj_accept": 0.001},
    "mismatch": {"mismatch/k3": 0.5},
    "critic": {"critic/vf_explained_var": -0.1, "trunc/bootstrap_gap": 0.4},
    "rewards": {"reward/failed": 0.75},
    "routing": {"moe/low_confidence/mean": 0.4},
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


def test_a_resumed_run_continues_counting() -> None:
    config, sick = load_config(["alarms.patience=2"]), HEALTHY | SICK["rewards"]
    first, resumed, fresh = Alarms(config), Alarms(config), Alarms(config)
    assert first.check(sick) == []
    state = first.state()
    first.check(HEALTHY)
    resumed.restore(state)
    assert [alarm.name for alarm in resumed.check(sick)] == ["rewards"]
    assert fresh.check(sick) == []


@pytest.mark.parametrize(
    ("override", "cause"),
    [
        ("rollout.lag=3", "stale weights"),
        ("rollout.dtype=bf16", "precision (rollout.dtype=bf16"),
        ("rollout.temperature=0.7", "temperature"),
    ],
)
def test_a_mismatch_names_the_cause_that_the_settings_admit(override: str, cause: str) -> None:
    (alarm,) = Alarms(load_config(["alarms.patience=1", override])).check(HEALTHY | SICK["mismatch"])
    assert f"Suspected: {cause}" in alarm.text


@pytest.mark.parametrize(
    ("sign", "words"),
    [
        ({"moe/low_confidence/mean": 0.4}, "less sure of 40% of the tokens"),
        ({"moe/expert_agreement": 0.85}, "choose 85.0% of the rollout's experts, less than 90.0%"),
    ],
)
def test_routing_that_drifts_is_named_with_a_remedy(sign: dict[str, float], words: str) -> None:
    (alarm,) = Alarms(load_config(["alarms.patience=1"])).check(HEALTHY | sign)
    assert alarm.name == "routing"
    assert words in alarm.text
    assert "Suspected: " in alarm.text
    assert "router.replay=rollout" in alarm.text
    dense = {key: value for key, value in HEALTHY.items() if not key.startswith("moe/")}
    relaxed = load_config(["alarms.patience=1", "alarms.max_low_confidence=0.5", "alarms.min_agreement=0.8"])
    assert Alarms(relaxed).check(HEALTHY | sign) == []
    assert Alarms(load_config(["alarms.patience=1"])).check(dense) == []


def test_both_signs_of_routing_are_told_together() -> None:
    both = {"moe/low_confidence/mean": 0.4, "moe/expert_agreement": 0.5}
    (alarm,) = Alarms(load_config(["alarms.patience=1"])).check(HEALTHY | both)
    assert "moe/expert_agreement" in alarm.text
    assert "moe/low_confidence" in alarm.text
    unknown = {"moe/low_confidence/mean": float("nan"), "moe/expert_agreement": float("nan")}
    assert Alarms(load_config(["alarms.patience=1"])).check(HEALTHY | unknown) == []
