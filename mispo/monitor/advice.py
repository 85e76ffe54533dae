"""Advice, not only a number: where a model stands, and what follows for its training, in one paragraph.

No level of confidence is set from outside: replay, or current weights, count if they let the run's own window accept
more trajectories, by more than two standard errors of this run.
"""

from __future__ import annotations

import math

from mispo.metrics.diagnosis import Standing

ON_POLICY, REPLAY, FREE, UNDECIDED = "on-policy only", "replay", "free", "undecided"

LEAST_TRAJECTORIES = 20
"""With fewer trajectories nothing is said about the regime."""

ERRORS = 2.0
"""Standard errors that count as more than chance."""


def regime(standing: Standing) -> str:
    """ON_POLICY, REPLAY or FREE, by the larger significant gain in accepted trajectories; UNDECIDED if untested."""
    untested = not standing.stale and math.isnan(standing.replay_gain)
    if standing.trajectories < LEAST_TRAJECTORIES or untested:
        return UNDECIDED
    gains = {
        REPLAY: (standing.replay_gain, standing.replay_gain_error),
        ON_POLICY: (standing.fresh_gain, standing.fresh_gain_error),
    }
    real = {name: gain for name, (gain, error) in gains.items() if gain > ERRORS * error}
    return max(real, key=lambda name: real[name], default=FREE)


def paragraph(standing: Standing) -> str:
    """What was measured, against what it was held, and what to do; plain text, about 120 words at most."""
    if not standing.tokens:
        return "Undecided: no generated token was measured."
    name = regime(standing)
    if math.isnan(standing.confidence) and not standing.stale:
        return "Nothing to say: a dense model has no routing to be sure of or to replay."
    return " ".join([f"{name[0].upper()}{name[1:]}:", *_routing(standing), _acceptance(standing), _advice(standing)])


def _routing(standing: Standing) -> list[str]:
    if math.isnan(standing.confidence):
        return ["a dense model, without routing to be sure of or to replay."]
    agreed = "" if math.isnan(standing.agreement) else f", and choose {standing.agreement:.1%} of the rollout's experts"
    return [
        f"the routers give their experts {standing.confidence:.3f} of the probability ({standing.confidence_norm:.3f} "
        f"from chance to certainty){agreed}.",
        _prediction(standing),
    ]


def _prediction(standing: Standing) -> str:
    if standing.mean_abs == 0:
        return "Rollout and trainer agree bit for bit."
    r, error = standing.correlation, standing.correlation_error
    if math.isnan(r) or math.isnan(error):
        return "How confidence and mismatch correlate is not defined here."
    numbers = f"correlation with |log x| {r:+.2f} ± {error:.2f}"
    if abs(r) <= ERRORS * error:
        return f"Confidence does not predict mismatch here ({numbers})."
    split = ""
    if not math.isnan(standing.threshold):
        split = (
            f": mean |log x| is {standing.below:.2g} on the {standing.share_below:.0%} of tokens below "
            f"{standing.threshold:.3f} (fitted), {standing.above:.2g} on the others"
        )
    return f"{'Low' if r < 0 else 'High'} confidence goes with mismatch ({numbers}){split}."


def _acceptance(standing: Standing) -> str:
    low, high = standing.window
    parts = [
        f"The window [{low:.4g}, {high:.4g}] accepts {standing.accepted:.1%} of {standing.trajectories} trajectories"
        f"{' (with replay)' if standing.replaying else ''}"
    ]
    gain = _points(standing.replay_gain, standing.replay_gain_error)
    if math.isnan(standing.replay_gain):
        parts += ["replay was not measured"] * (not math.isnan(standing.confidence))
    elif standing.replaying:
        parts.append(f"without replay {standing.free:.1%} (replay brings {gain})")
    else:
        parts.append(f"with the rollout's routing replayed {standing.replayed:.1%} ({gain})")
    if standing.stale:
        gain = _points(standing.fresh_gain, standing.fresh_gain_error)
        parts.append(f"with current weights {standing.fresh:.1%} ({gain})")
    else:
        parts.append("the weights were current, so staleness was not tested")
    return f"{'; '.join(parts)}."


def _points(gain: float, error: float) -> str:
    return f"{100 * gain:+.1f} ± {100 * error:.1f} points"


def _advice(standing: Standing) -> str:
    name = regime(standing)
    if standing.trajectories < LEAST_TRAJECTORIES:
        return f"Too few to judge: at least {LEAST_TRAJECTORIES} trajectories are needed."
    if name == REPLAY:
        do = "keep" if standing.replaying else "set"
        return f"Replay's gain is the largest above two standard errors: {do} router.replay=rollout."
    if name == ON_POLICY:
        return (
            "Current weights bring the largest gain above two standard errors: set rollout.lag=0, or take fewer "
            "updates per sampling."
        )
    if name == UNDECIDED:
        return "Neither staleness nor replay was tested, so nothing follows."
    found = ["off-policy training costs nothing measurable"] * standing.stale
    if not math.isnan(standing.replay_gain):
        found.append("replay can be switched off" if standing.replaying else "no replay is needed")
    found += ["what is still rejected has another cause, precision or the engine"] * (standing.accepted < 1)
    return f"No gain exceeds two standard errors: {'; '.join(found)}."
