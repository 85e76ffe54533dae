"""Where a model stands: the numbers against plain Python, over ranks; and the advice for planted regimes."""

import json
import math
import statistics
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mispo.metrics.diagnosis import Diagnosis, Evidence, as_json, diagnose, from_json
from mispo.monitor.advice import FREE, ON_POLICY, REPLAY, UNDECIDED, paragraph, regime
from support.threads import in_ranks

WINDOW = (math.log(0.996), math.log(1.001))


@dataclass(frozen=True)
class Planted:
    """Tokens of trajectories of a length each; routing, staleness and noise are the sizes of the parts of log x."""

    lengths: tuple[int, ...] = (40,) * 60
    routing: float = 0.0
    stale: float = 0.0
    noise: float = 1e-4
    seed: int = 0

    def tokens(self) -> dict[str, Any]:
        """The routing part grows where confidence is below 0.4, which holds for about a fifth of the tokens."""
        total = sum(self.lengths)
        generator = torch.Generator().manual_seed(self.seed)
        confidence_N = 0.25 + 0.75 * torch.rand(total, generator=generator)
        routed_N, stale_N, noise_N = (torch.randn(total, generator=generator) for _ in range(3))
        routed_N = routed_N * self.routing * (confidence_N < 0.4)
        rest_N = self.stale * stale_N + self.noise * noise_N
        return {
            "log_x_N": routed_N + rest_N,
            "log_x_replayed_N": rest_N,
            "weights_part_N": self.stale * stale_N,
            "confidence_N": confidence_N,
            "agreement_N": 1 - 0.5 * (confidence_N < 0.4).float(),
            "offsets_B1": torch.tensor([0, *self.lengths]).cumsum(0),
        }


def diagnosis(planted: Planted = Planted(), **changed: Any) -> Diagnosis:
    given = planted.tokens() | {"chance": 0.25, "log_window_B2": torch.tensor(WINDOW), "replaying": False} | changed
    return diagnose(Evidence(**given), everyone=lambda x_B: x_B, reduce=lambda x: x)


def test_every_number_is_that_of_plain_python() -> None:
    planted = Planted((7, 0, 12, 1, 30, 25), routing=0.05, stale=0.005)
    found, given = diagnosis(planted), planted.tokens()
    lists = {name: x.double().tolist() for name, x in given.items()}
    sizes = [abs(x) for x in lists["log_x_N"]]
    confidence = lists["confidence_N"]
    assert (found.tokens, found.trajectories) == (75, 5)
    assert found.confidence == pytest.approx(statistics.fmean(confidence))
    assert found.confidence_norm == pytest.approx((found.confidence - 0.25) / 0.75)
    assert found.agreement == pytest.approx(statistics.fmean(lists["agreement_N"]))
    assert found.mean_abs == pytest.approx(statistics.fmean(sizes))

    def pearson(chosen: list[int]) -> float:
        return statistics.correlation([confidence[i] for i in chosen], [sizes[i] for i in chosen])

    def inside(x: list[float]) -> list[float]:
        pieces = torch.tensor(x, dtype=torch.float64).split(planted.lengths)
        return [float(WINDOW[0] <= p.mean().item() <= WINDOW[1]) for p in pieces if len(p)]

    owner = torch.repeat_interleave(torch.arange(6), torch.tensor(planted.lengths)).tolist()
    left_out = [pearson([i for i in range(75) if owner[i] != b]) for b in (0, 2, 3, 4, 5)]
    assert found.correlation == pytest.approx(pearson(list(range(75))))
    error = math.sqrt(sum((x - statistics.fmean(left_out)) ** 2 for x in left_out) * 4 / 5)
    assert found.correlation_error == pytest.approx(error)
    free, replayed = inside(lists["log_x_N"]), inside(lists["log_x_replayed_N"])
    fresh = inside([x - w for x, w in zip(lists["log_x_N"], lists["weights_part_N"], strict=True)])
    assert (found.free, found.replayed, found.fresh) == pytest.approx(
        tuple(map(statistics.fmean, (free, replayed, fresh)))
    )
    for gain, after in (("replay_gain", replayed), ("fresh_gain", fresh)):
        changes = [b - a for a, b in zip(free, after, strict=True)]
        assert getattr(found, gain) == pytest.approx(statistics.fmean(changes))
        assert getattr(found, f"{gain}_error") == pytest.approx(statistics.stdev(changes) / math.sqrt(5))
    assert found.window == pytest.approx((0.996, 1.001))


def test_the_fitted_threshold_has_the_least_squared_error_of_all_candidates() -> None:
    planted = Planted((100,) * 20, routing=0.05)
    found, given = diagnosis(planted), planted.tokens()
    confidence_N, sizes_N = given["confidence_N"], given["log_x_N"].double().abs()

    def error(threshold: float) -> float:
        below_N = confidence_N < threshold
        return sum(float((x - x.mean()).square().sum()) for x in (sizes_N[below_N], sizes_N[~below_N]))

    ordered = confidence_N.sort().values.tolist()
    best = min((ordered[len(ordered) * percent // 100] for percent in range(5, 96)), key=error)
    assert found.threshold == pytest.approx(best)
    assert found.threshold == pytest.approx(0.4, abs=0.02), "where it was planted"
    below_N = confidence_N < found.threshold
    assert found.share_below == pytest.approx(below_N.double().mean().item())
    assert (found.below, found.above) == pytest.approx(
        (sizes_N[below_N].mean().item(), sizes_N[~below_N].mean().item())
    )


@pytest.mark.parametrize("window", [torch.tensor(WINDOW), None])
def test_ranks_give_the_diagnosis_of_all_trajectories(window: Any) -> None:
    planted = Planted((7, 12, 9, 30, 25), routing=0.05, stale=0.005)
    given, positions = planted.tokens(), [[0, 1], [], [2, 3, 4]]
    cuts = [slice(0, 19), slice(19, 19), slice(19, None)]

    def rank(number: int, reduce: Any) -> Diagnosis:
        mine = {name: x[cuts[number]] for name, x in given.items() if name != "offsets_B1"}
        lengths = [planted.lengths[b] for b in positions[number]]

        def everyone(x_B: Tensor) -> Tensor:
            full = torch.zeros((5, *x_B.shape[1:]), dtype=x_B.dtype)
            full[torch.tensor(positions[number], dtype=torch.int64)] = x_B
            return reduce(full)

        more = {"chance": 0.25, "log_window_B2": window, "replaying": False}
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        return diagnose(Evidence(**mine, **more, offsets_B1=offsets), everyone=everyone, reduce=reduce)

    whole = diagnosis(planted, log_window_B2=window)
    for found in in_ranks(3, rank):
        assert found.window == whole.window
        assert vars(replace(found, window=None)) == pytest.approx(vars(replace(whole, window=None)), nan_ok=True)


REGIMES = {
    REPLAY: (Planted(routing=0.05, stale=1e-4), "set router.replay=rollout"),
    ON_POLICY: (Planted(stale=0.02), "set rollout.lag=0"),
    FREE: (Planted(stale=1e-4), "off-policy training costs nothing measurable; no replay is needed"),
}


@pytest.mark.parametrize("name", REGIMES)
def test_a_planted_regime_is_found(name: str) -> None:
    planted, words = REGIMES[name]
    found = diagnosis(planted)
    assert regime(found) == name
    text = paragraph(found)
    assert text.startswith(f"{name.capitalize()}: ")
    assert words in text
    assert f"{found.accepted:.1%} of 60 trajectories" in text
    assert "the window [0.996, 1.001]" in text.lower()


def test_of_two_gains_the_larger_one_decides() -> None:
    found = replace(diagnosis(), stale=True, replay_gain=0.2, replay_gain_error=0.01, fresh_gain=0.3)
    assert regime(replace(found, fresh_gain_error=0.1)) == ON_POLICY
    assert regime(replace(found, fresh_gain_error=0.2)) == REPLAY, "within the noise it does not count"
    assert regime(replace(found, fresh_gain_error=0.2, replay_gain_error=0.1)) == FREE


def test_low_confidence_that_goes_with_mismatch_is_shown_with_its_threshold() -> None:
    found = diagnosis(REGIMES[REPLAY][0])
    text = paragraph(found)
    assert "Low confidence goes with mismatch" in text
    assert f"below {found.threshold:.3f} (fitted)" in text
    assert found.below > 10 * found.above


def test_a_correlation_within_its_error_is_said_to_be_none() -> None:
    found = diagnosis(Planted(noise=0.01))
    assert abs(found.correlation) <= 2 * found.correlation_error
    assert "Confidence does not predict mismatch here" in paragraph(found)


def test_a_run_that_replays_is_told_what_it_brings() -> None:
    found = diagnosis(Planted(routing=0.05, stale=1e-4), replaying=True)
    assert regime(found) == REPLAY
    assert found.accepted == found.replayed > found.free
    assert "without replay" in paragraph(found)
    assert "keep router.replay=rollout" in paragraph(found)
    assert "replay can be switched off" in paragraph(diagnosis(Planted(stale=1e-4), replaying=True))
    stale = Planted(routing=1e-4, stale=0.02)
    given = stale.tokens()
    found = diagnosis(stale, replaying=True)
    assert regime(found) == ON_POLICY
    assert found.fresh_gain == pytest.approx(found.fresh - found.replayed)
    assert found.mean_abs == pytest.approx(given["log_x_N"].abs().mean().item()), "the trainer's own routing"


def test_too_few_trajectories_decide_nothing() -> None:
    found = diagnosis(Planted((40,) * 19, routing=0.05))
    assert regime(found) == UNDECIDED
    assert "at least 20 trajectories are needed" in paragraph(found)
    assert "of 19 trajectories" in paragraph(found)


DENSE = {"log_x_replayed_N": None, "confidence_N": None, "agreement_N": None}


def test_a_dense_model_has_no_routing_to_speak_of() -> None:
    found = diagnosis(Planted(stale=0.02), **DENSE)
    assert regime(found) == ON_POLICY
    assert "a dense model" in paragraph(found)
    assert "replay" not in paragraph(found).replace("to replay", "")
    assert "nan" not in paragraph(found)
    untested = diagnosis(Planted(), **DENSE)
    assert regime(untested) == UNDECIDED
    assert paragraph(untested) == "Nothing to say: a dense model has no routing to be sure of or to replay."


def test_what_was_not_tested_is_not_claimed() -> None:
    text = paragraph(diagnosis(Planted()))
    assert "staleness was not tested" in text
    assert "off-policy training costs nothing measurable" not in text
    text = paragraph(diagnosis(Planted(stale=1e-4), log_x_replayed_N=None, agreement_N=None))
    assert "replay was not measured" in text
    assert "no replay is needed" not in text


def test_without_a_token_there_is_no_advice() -> None:
    found = diagnosis(Planted(()))
    assert paragraph(found) == "Undecided: no generated token was measured."
    assert math.isnan(found.accepted)
    silent = diagnosis(Planted((0,) * 30))
    assert (silent.tokens, silent.trajectories) == (0, 0)


def test_bit_identical_log_probs_are_called_so() -> None:
    found = diagnosis(Planted(noise=0.0))
    assert math.isnan(found.correlation)
    assert "agree bit for bit" in paragraph(found)


def test_a_ratio_that_is_no_number_is_rejected_and_spoils_nothing_else() -> None:
    given = Planted(stale=1e-4).tokens()
    log_x_N = given["log_x_N"].clone()
    log_x_N[3] = -math.inf
    found, whole = diagnosis(Planted(stale=1e-4), log_x_N=log_x_N), diagnosis(Planted(stale=1e-4))
    assert found.tokens == whole.tokens - 1
    assert found.free == pytest.approx(whole.free - 1 / 60)
    assert math.isfinite(found.correlation)


def test_windows_of_their_own_are_told_by_the_widest() -> None:
    windows = torch.tensor([[-0.001, 0.001]] * 30 + [[-0.01, 0.01]] * 30)
    assert diagnosis(log_window_B2=windows).window == pytest.approx((math.exp(-0.01), math.exp(0.01)))


@pytest.mark.parametrize("changed", [{}, DENSE])
def test_it_survives_json(changed: dict[str, None]) -> None:
    found = diagnosis(Planted(routing=0.05), **changed)
    back = from_json(json.loads(json.dumps(as_json(found), allow_nan=False)))
    assert as_json(back) == as_json(found)
    assert paragraph(back) == paragraph(found)


@pytest.mark.parametrize("replaying", [False, True])
@pytest.mark.parametrize("planted", [planted for planted, _ in REGIMES.values()])
def test_a_paragraph_is_short(planted: Planted, replaying: bool) -> None:
    assert len(paragraph(diagnosis(planted, replaying=replaying)).split()) <= 120


NO_WINDOW = {"log_window_B2": None}


def rms(x_N: Tensor) -> float:
    return math.sqrt(statistics.fmean(x * x for x in x_N.double().tolist()))


@pytest.mark.parametrize("replaying", [False, True])
def test_without_a_window_gains_are_relative_reductions_of_the_rms(replaying: bool) -> None:
    planted = Planted((7, 0, 12, 1, 30, 25), routing=0.05, stale=0.005)
    found, given = diagnosis(planted, replaying=replaying, **NO_WINDOW), planted.tokens()
    assert found.window is None
    assert all(math.isnan(share) for share in (found.free, found.replayed, found.fresh, found.accepted))
    free_N, replayed_N = given["log_x_N"], given["log_x_replayed_N"]
    now_N = replayed_N if replaying else free_N
    fresh_N = now_N.double() - given["weights_part_N"].double()
    assert found.rms_free == pytest.approx(rms(free_N))
    assert found.rms_replayed == pytest.approx(rms(replayed_N))
    assert found.rms_fresh == pytest.approx(rms(fresh_N))
    assert found.rms == pytest.approx(rms(now_N))
    owner_N = torch.repeat_interleave(torch.arange(6), torch.tensor(planted.lengths))
    for gain, before_N, after_N in (("replay_gain", free_N, replayed_N), ("fresh_gain", now_N, fresh_N)):
        assert getattr(found, gain) == pytest.approx(1 - rms(after_N) / rms(before_N))
        left_out = [1 - rms(after_N[owner_N != b]) / rms(before_N[owner_N != b]) for b in (0, 2, 3, 4, 5)]
        error = math.sqrt(sum((x - statistics.fmean(left_out)) ** 2 for x in left_out) * 4 / 5)
        assert getattr(found, f"{gain}_error") == pytest.approx(error)
    assert found.correlation == pytest.approx(diagnosis(planted, replaying=replaying).correlation)


@pytest.mark.parametrize("name", REGIMES)
def test_without_a_window_a_regime_is_found_and_no_window_is_spoken_of(name: str) -> None:
    planted, words = REGIMES[name]
    found = diagnosis(replace(planted, noise=1e-3), **NO_WINDOW)
    assert regime(found) == name
    text = paragraph(found)
    assert words in text
    assert f"The rms of log x is {found.rms:.2g} nats over 60 trajectories" in text
    assert "window" not in text
    assert "accepts" not in text
    assert "nan" not in text
    assert len(text.split()) <= 120


def test_without_a_window_rounding_and_slight_reductions_do_not_count() -> None:
    found = diagnosis(Planted(routing=1e-5, noise=1e-7), **NO_WINDOW)
    assert found.replay_gain > 10 * found.replay_gain_error
    assert regime(found) == FREE
    assert "log x is within rounding, 0.0001 nats" in paragraph(found)
    slight = diagnosis(Planted(stale=1e-4, noise=1e-3), **NO_WINDOW)
    assert slight.fresh_gain > 2 * slight.fresh_gain_error
    assert slight.fresh_gain < 0.1
    assert regime(slight) == FREE
    assert "No gain exceeds two standard errors and 10%" in paragraph(slight)
    identical = diagnosis(Planted(noise=0.0), **NO_WINDOW)
    assert (identical.rms, identical.replay_gain, identical.fresh_gain) == (0.0, 0.0, 0.0)
    assert regime(identical) == FREE


def test_without_a_window_it_survives_json_too() -> None:
    found = diagnosis(Planted(routing=0.05, stale=1e-4), replaying=True, **NO_WINDOW)
    written = as_json(found)
    assert written["window"] is None
    assert written["free"] is None
    back = from_json(json.loads(json.dumps(written, allow_nan=False)))
    assert back.window is None
    assert paragraph(back) == paragraph(found)
    assert "keep router.replay=rollout" in paragraph(back)
