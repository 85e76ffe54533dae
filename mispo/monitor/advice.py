"""Advice from a diagnosis: which regime a run is in, and what follows for its training, in one paragraph.

No level of confidence is set from outside. Replay, or current weights, count if they bring a gain above two standard
errors of this run: more trajectories that its window accepts, or a smaller rms of log x where the filter has no window.
"""

from __future__ import annotations

import math

from mispo.metrics.diagnosis import Diagnosis

ON_POLICY, REPLAY, FREE, UNDECIDED = "on-policy only", "replay", "free", "undecided"

LEAST_TRAJECTORIES = 20
"""With fewer trajectories nothing is said about the regime."""

ERRORS = 2.0
"""Standard errors that count as more than chance."""


ROUNDING = 1e-4
"""Nats. Without a window, a smaller rms of log x counts as rounding, and there is nothing to gain."""

LEAST_REDUCTION = 0.1
"""Without a window, a smaller relative reduction of the rms does not count: its error is small where hardly anything is
gained. Ours."""


def regime(diagnosis: Diagnosis) -> str:
    """Return ON_POLICY, REPLAY or FREE, by the larger significant gain; UNDECIDED if neither was tested."""
    untested = not diagnosis.stale and math.isnan(diagnosis.replay_gain)
    if diagnosis.trajectories < LEAST_TRAJECTORIES or untested:
        return UNDECIDED
    gains = {
        REPLAY: (diagnosis.replay_gain, diagnosis.replay_gain_error, diagnosis.rms_free),
        ON_POLICY: (diagnosis.fresh_gain, diagnosis.fresh_gain_error, diagnosis.rms),
    }
    real = {
        name: gain
        for name, (gain, error, rms) in gains.items()
        if gain > ERRORS * error and (diagnosis.window is not None or (gain >= LEAST_REDUCTION and rms >= ROUNDING))
    }
    return max(real, key=lambda name: real[name], default=FREE)


def paragraph(diagnosis: Diagnosis) -> str:
    """Say what was measured, by which measure it is judged, and what to do; plain text, about 120 words at most."""
    if not diagnosis.tokens:
        return "Undecided: no generated token was measured."
    name = regime(diagnosis)
    if math.isnan(diagnosis.confidence) and not diagnosis.stale:
        return "Nothing to say: a dense model has no routing to be sure of or to replay."
    return " ".join([f"{name[0].upper()}{name[1:]}:", *_routing(diagnosis), _gains(diagnosis), _advice(diagnosis)])


def _routing(diagnosis: Diagnosis) -> list[str]:
    if math.isnan(diagnosis.confidence):
        return ["a dense model, without routing to be sure of or to replay."]
    agreed = (
        "" if math.isnan(diagnosis.agreement) else f", and choose {diagnosis.agreement:.1%} of the rollout's experts"
    )
    return [
        f"the routers give their experts {diagnosis.confidence:.3f} of the probability "
        f"({diagnosis.confidence_norm:.3f} from chance to certainty){agreed}.",
        _prediction(diagnosis),
    ]


def _prediction(diagnosis: Diagnosis) -> str:
    if diagnosis.mean_abs == 0:
        return "Rollout and trainer agree bit for bit."
    r, error = diagnosis.correlation, diagnosis.correlation_error
    if math.isnan(r) or math.isnan(error):
        return "How confidence and mismatch correlate is not defined here."
    numbers = f"correlation with |log x| {r:+.2f} ± {error:.2f}"
    if abs(r) <= ERRORS * error:
        return f"Confidence does not predict mismatch here ({numbers})."
    split = ""
    if not math.isnan(diagnosis.threshold):
        split = (
            f": mean |log x| is {diagnosis.below:.2g} on the {diagnosis.share_below:.0%} of tokens below "
            f"{diagnosis.threshold:.3f} (fitted), {diagnosis.above:.2g} on the others"
        )
    return f"{'Low' if r < 0 else 'High'} confidence goes with mismatch ({numbers}){split}."


def _gains(diagnosis: Diagnosis) -> str:
    """Say what the window accepts, or without one the rms of log x: as the run is, and in the other variants."""
    if diagnosis.window is None:
        shown, (free, replayed, fresh) = _nats, (diagnosis.rms_free, diagnosis.rms_replayed, diagnosis.rms_fresh)
        head = f"The rms of log x is {diagnosis.rms:.2g} nats over {diagnosis.trajectories} trajectories"
    else:
        shown, (free, replayed, fresh) = _share, (diagnosis.free, diagnosis.replayed, diagnosis.fresh)
        low, high = diagnosis.window
        head = f"The window [{low:.4g}, {high:.4g}] accepts {diagnosis.accepted:.1%} of {diagnosis.trajectories} "
        head += "trajectories"
    parts = [head + " (with replay)" * diagnosis.replaying]
    gain = _gain(diagnosis, diagnosis.replay_gain, diagnosis.replay_gain_error)
    if math.isnan(diagnosis.replay_gain):
        parts += ["replay was not measured"] * (not math.isnan(diagnosis.confidence))
    elif diagnosis.replaying:
        parts.append(f"without replay {shown(free)} (replay brings {gain})")
    else:
        parts.append(f"with the rollout's routing replayed {shown(replayed)} ({gain})")
    if diagnosis.stale:
        gain = _gain(diagnosis, diagnosis.fresh_gain, diagnosis.fresh_gain_error)
        parts.append(f"with current weights {shown(fresh)} ({gain})")
    else:
        parts.append("the weights were current, so staleness was not tested")
    return f"{'; '.join(parts)}."


def _share(value: float) -> str:
    return f"{value:.1%}"


def _nats(value: float) -> str:
    return f"{value:.2g}"


def _gain(diagnosis: Diagnosis, gain: float, error: float) -> str:
    """Write a gain in points of acceptance, or without a window as the change of the rms, negative where it falls."""
    if diagnosis.window is None:
        return f"{0.0 - 100 * gain:+.1f}% ± {100 * error:.1f}"
    return f"{100 * gain:+.1f} ± {100 * error:.1f} points"


def _advice(diagnosis: Diagnosis) -> str:
    name = regime(diagnosis)
    if diagnosis.trajectories < LEAST_TRAJECTORIES:
        return f"Too few to judge: at least {LEAST_TRAJECTORIES} trajectories are needed."
    if name == REPLAY:
        do = "keep" if diagnosis.replaying else "set"
        return f"Replay's gain is the largest above two standard errors: {do} router.replay=rollout."
    if name == ON_POLICY:
        return (
            "Current weights bring the largest gain above two standard errors: set rollout.lag=0, or take fewer "
            "updates per sampling."
        )
    if name == UNDECIDED:
        return "Neither staleness nor replay was tested, so nothing follows."
    found = ["off-policy training costs nothing measurable"] * diagnosis.stale
    if not math.isnan(diagnosis.replay_gain):
        found.append("replay can be switched off" if diagnosis.replaying else "no replay is needed")
    if diagnosis.window is None and diagnosis.rms < ROUNDING:
        found.append(f"log x is within rounding, {ROUNDING:g} nats")
    elif diagnosis.window is None or diagnosis.accepted < 1:
        what = "what is left" if diagnosis.window is None else "what is still rejected"
        found.append(f"{what} has another cause, precision or the engine")
    level = f" and {LEAST_REDUCTION:.0%}" if diagnosis.window is None else ""
    return f"No gain exceeds two standard errors{level}: {'; '.join(found)}."
