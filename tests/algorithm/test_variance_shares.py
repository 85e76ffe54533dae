"""Mismatch attribution: against loops over tokens, a bootstrap, planted causes, and ranks."""

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from torch import Tensor

from mispo.algorithm.segments import offsets_of
from mispo.algorithm.variance_shares import Attribution, attribute, jackknife
from support.ragged import Ragged, ragged

NAMES = ("weights", "precision", "rest")
SCALES = (1.0, 0.5, 0.1)


def planted(batch: Ragged, through: float = 0.5) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parts of unlike size; this share of each vanishes under replay."""
    parts = {name: batch.tokens(name, scale) for name, scale in zip(NAMES, SCALES, strict=True)}
    noise = {name: batch.tokens(f"replayed {name}", 0.01) for name in NAMES}
    return parts, {name: (1 - through) * part + noise[name] for name, part in parts.items()}


def share(part: list[float], log_x: list[float]) -> float:
    """Cov(part, log x)/Var(log x), centred first."""
    a, b = statistics.fmean(part), statistics.fmean(log_x)
    covariance = math.fsum((p - a) * (x - b) for p, x in zip(part, log_x, strict=True))
    return covariance / math.fsum((x - b) ** 2 for x in log_x)


def flat(trajectories: list[list[float]]) -> list[float]:
    return [x for trajectory in trajectories for x in trajectory]


def without_each(estimate: Callable[[list[int]], float], lengths: list[int]) -> tuple[float, float]:
    """(value, jackknife error) by doing everything again without each trajectory that has tokens."""
    members = [b for b, length in enumerate(lengths) if length]
    values = [estimate([b for b in members if b != left]) for left in members]
    centre = statistics.fmean(values)
    spread = math.fsum((value - centre) ** 2 for value in values)
    return estimate(members), math.sqrt(spread * (len(members) - 1) / len(members))


@given(batch=ragged)
def test_shares_and_errors_are_those_of_the_loops(batch: Ragged) -> None:
    used = [length for length in batch.lengths if length]
    if len(used) < 3 or sum(used) - max(used) < 3:
        return
    parts, replayed = planted(batch)
    found = attribute(parts, replayed, batch.offsets, lambda x_B: x_B)
    split = {name: batch.split(part.double()) for name, part in parts.items()}
    gone = {name: batch.split(parts[name].double() - replayed[name].double()) for name in NAMES}
    log_x = batch.split(sum(part.double() for part in parts.values()))

    def estimate(values: list[list[float]], members: list[int]) -> float:
        return share(flat([values[b] for b in members]), flat([log_x[b] for b in members]))

    for name, part in found.parts.items():
        expected = without_each(lambda members, name=name: estimate(split[name], members), batch.lengths)
        assert (part.share, part.share_error) == pytest.approx(expected, rel=1e-6, abs=1e-9)
        expected = without_each(lambda members, name=name: estimate(gone[name], members), batch.lengths)
        assert (part.mediated, part.mediated_error) == pytest.approx(expected, rel=1e-6, abs=1e-9)
        assert part.mean == pytest.approx(statistics.fmean(flat(split[name])))
        assert part.rms == pytest.approx(math.sqrt(statistics.fmean(x * x for x in flat(split[name]))))
    everything = [[sum(token) for token in zip(*rows, strict=True)] for rows in zip(*gone.values(), strict=True)]
    expected = without_each(lambda members: estimate(everything, members), batch.lengths)
    assert (found.mediated, found.mediated_error) == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert sum(part.share for part in found.parts.values()) == pytest.approx(1, abs=1e-9)
    assert found.variance == pytest.approx(statistics.pvariance(flat(log_x)))
    assert found.k1 == pytest.approx(-statistics.fmean(flat(log_x)))
    assert found.k3 == pytest.approx(statistics.fmean(math.exp(x) - 1 - x for x in flat(log_x)))
    assert (found.tokens, found.trajectories, found.left_out) == (sum(used), len(used), 0)


def test_the_error_is_that_of_drawing_trajectories_anew() -> None:
    """Each trajectory has its own scale, so its tokens are no independent samples."""
    batch = Ragged([30] * 200, seed=3)
    parts, _ = planted(batch)
    scales_N = torch.repeat_interleave(batch.trajectories("scale").exp(), 30)
    parts["weights"] = parts["weights"] * scales_N
    found = attribute(parts, None, batch.offsets, lambda x_B: x_B)
    log_x_BT, weights_BT = sum(parts.values()).view(200, 30), parts["weights"].view(200, 30)
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for _ in range(400):
        chosen = torch.randint(200, (200,), generator=generator)
        pair = torch.stack([weights_BT[chosen].flatten(), log_x_BT[chosen].flatten()]).cov()
        drawn.append((pair[0, 1] / pair[1, 1]).item())
    assert found.parts["weights"].share_error == pytest.approx(statistics.stdev(drawn), rel=0.2)


def only(name: str, batch: Ragged) -> dict[str, Tensor]:
    zeros = torch.zeros(sum(batch.lengths))
    return {other: batch.tokens(other) if other == name else zeros for other in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_single_cause_has_the_whole_share(name: str) -> None:
    batch = Ragged([20, 0, 31, 7, 12], seed=1)
    parts = only(name, batch)
    found = attribute(parts, {other: 0 * part for other, part in parts.items()}, batch.offsets, lambda x_B: x_B)
    for other, part in found.parts.items():
        assert part.share == pytest.approx(float(other == name), abs=1e-12)
        assert part.share_error == pytest.approx(0, abs=1e-12)
        assert part.mediated == pytest.approx(part.share, abs=1e-12), "all of it vanishes under replay"
    assert (found.mediated, found.mediated_error) == pytest.approx((1, 0), abs=1e-12)
    kept = attribute(parts, parts, batch.offsets, lambda x_B: x_B)
    assert (kept.mediated, kept.mediated_error) == (0, 0), "nothing goes through the router"


def test_planted_causes_come_back_within_their_errors() -> None:
    """Variances 1, 1/4, 1/100 and half of each through the router."""
    batch = Ragged([50] * 300, seed=5)
    found = attribute(*planted(batch), batch.offsets, lambda x_B: x_B)
    for (_, part), scale in zip(found.parts.items(), SCALES, strict=True):
        expected = scale**2 / sum(scale**2 for scale in SCALES)
        assert abs(part.share - expected) < 4 * part.share_error
        assert abs(part.mediated - expected / 2) < 4 * part.mediated_error
    assert abs(found.mediated - 0.5) < 4 * found.mediated_error


def assert_same(found: Attribution, expected: Attribution) -> None:
    assert found.parts.keys() == expected.parts.keys()
    for name, part in found.parts.items():
        assert vars(part) == pytest.approx(vars(expected.parts[name]), nan_ok=True)
    rest = [{name: value for name, value in vars(x).items() if name != "parts"} for x in (found, expected)]
    assert rest[0] == pytest.approx(rest[1], nan_ok=True)


def test_ranks_give_the_attribution_of_all_trajectories() -> None:
    batch = Ragged([20, 3, 31, 7, 12], seed=1)
    parts, replayed = planted(batch)
    sent: list[Tensor] = []

    def piece(tensors: Mapping[str, Tensor], tokens: slice) -> dict[str, Tensor]:
        return {name: tensor[tokens] for name, tensor in tensors.items()}

    for tokens, lengths in ((slice(0, 23), [20, 3]), (slice(23, 23), []), (slice(23, None), [31, 7, 12])):
        offsets = offsets_of(torch.tensor(lengths, dtype=torch.int64))
        attribute(piece(parts, tokens), piece(replayed, tokens), offsets, lambda x_B: sent.append(x_B) or x_B)
    whole = attribute(parts, replayed, batch.offsets, lambda x_B: x_B)
    assert_same(attribute(parts, replayed, batch.offsets, lambda x_B: torch.cat(sent)), whole)


@pytest.mark.parametrize("constant", [0.0, 0.3])
def test_what_does_not_vary_has_no_shares_and_says_so(constant: float) -> None:
    parts = dict.fromkeys(NAMES, torch.full((12,), constant))
    found = attribute(parts, None, torch.tensor([0, 5, 12]), lambda x_B: x_B)
    assert found.identical
    assert not found.replayed
    assert all(math.isnan(x) for part in found.parts.values() for x in (part.share, part.share_error, part.mediated))
    assert found.variance == pytest.approx(0, abs=1e-12)


def test_without_replay_only_that_column_is_missing() -> None:
    batch = Ragged([20, 3, 31], seed=1)
    parts, replayed = planted(batch)
    both, alone = (attribute(parts, x, batch.offsets, lambda x_B: x_B) for x in (replayed, None))
    assert math.isnan(alone.mediated)
    for name, part in alone.parts.items():
        assert part.share == pytest.approx(both.parts[name].share)
        assert part.share_error == pytest.approx(both.parts[name].share_error)
        assert math.isnan(part.mediated)


def test_tokens_without_a_finite_ratio_are_left_out_and_counted() -> None:
    batch = Ragged([20, 3, 31], seed=1)
    parts, replayed = planted(batch)
    parts["rest"][21] = -math.inf
    replayed["weights"][5] = math.nan
    found = attribute(parts, replayed, batch.offsets, lambda x_B: x_B)
    kept = torch.ones(54, dtype=torch.bool)
    kept[[5, 21]] = False
    rest = [{name: x[kept] for name, x in tensors.items()} for tensors in (parts, replayed)]
    expected = attribute(*rest, torch.tensor([0, 19, 21, 52]), lambda x_B: x_B)
    assert found.left_out == 2
    assert_same(replace(found, left_out=0), expected)


def test_too_little_has_no_error_and_nothing_has_no_number() -> None:
    one = attribute({"rest": torch.randn(9)}, None, torch.tensor([0, 9]), lambda x_B: x_B)
    assert one.parts["rest"].share == pytest.approx(1)
    assert math.isnan(one.parts["rest"].share_error)
    none = attribute({"rest": torch.empty(0)}, None, torch.tensor([0, 0]), lambda x_B: x_B)
    assert (none.tokens, none.trajectories, none.identical) == (0, 0, False)
    assert math.isnan(none.parts["rest"].share)
    with pytest.raises(AssertionError, match="but replayed"):
        attribute({"rest": torch.empty(0)}, {"weights": torch.empty(0)}, torch.tensor([0]), lambda x_B: x_B)


def test_the_jackknife_of_a_mean_is_its_textbook_error() -> None:
    x = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sums = torch.stack([torch.ones_like(x), x], 1)
    value, error = jackknife(sums, lambda sums: sums[..., 1:] / sums[..., :1])
    assert value.item() == pytest.approx(x.mean().item())
    assert error.item() == pytest.approx(x.std().item() / math.sqrt(40))
