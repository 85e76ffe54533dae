"""What you set is what runs: the objective of a config, in one line of mathematics."""

from __future__ import annotations

from mispo.config.schema import AlgorithmConfig, MispoConfig

NORMS = {
    "tokens": "1/N Σ_τ Σ_t",
    "accepted": "1/N_kept Σ_τ Σ_t",
    "sequence": "1/B Σ_τ 1/T Σ_t",
    "constant": "1/(B·T_max) Σ_τ Σ_t",
}


def objective(config: MispoConfig) -> str:
    """The loss that the actor minimises, then what Â and R̂ are.

    x = π_old/π_rollout, ρ̄ its geometric mean over a trajectory, r = π_θ/π_old (s: its geometric mean), N tokens, B
    trajectories.
    """
    algorithm = config.algorithm
    loss = f"L = −{NORMS[algorithm.loss_norm]} {_weights(algorithm)}{_term(algorithm)}"
    if algorithm.kl:
        loss += f" + {algorithm.kl:g}·KL(π_θ‖π_ref)"
    if algorithm.entropy:
        loss += f" − {algorithm.entropy:g}·H(π_θ)"
    if config.critic.kind == "shared":
        loss += f" + {config.critic.loss_weight:g}·1/N Σ (V − R̂)²"
    return f"{loss},  {_advantage(config)},  {_returns(config)}"


def _weights(algorithm: AlgorithmConfig) -> str:
    chosen, top = algorithm.filter, "π_θ/π_rollout" if algorithm.mask_policy == "current" else "x"
    mean = "ρ̄_θ" if algorithm.mask_policy == "current" else "ρ̄"
    token = f"1[{_range(chosen.token_bounds, top)}]·"
    shown = {
        "bounds": token + f"1[{_range(chosen.trajectory_bounds, mean)}]·",
        "quantile": token + "1[|log ρ̄| ≤ b_k]·",
        "metropolis": f"multiplicity(w = {'∏x' if chosen.ratio == 'trajectory' else 'ρ̄'})·",
        "random": token + f"1[random, as many as {_range(chosen.trajectory_bounds, 'ρ̄')}]·",
        "token_only": token,
        "none": "",
    }[chosen.name]
    corrected = {
        "none": "",
        "tis": f"min(x, {algorithm.correction_cap:g})·",
        "icepop": f"x·1[{_range(algorithm.correction_bounds, 'x')}]·",
    }[algorithm.correction]
    return shown + corrected


def _term(algorithm: AlgorithmConfig) -> str:
    low, high = (f"{bound:g}" for bound in (1 - algorithm.clip[0], 1 + algorithm.clip[1]))
    if algorithm.loss == "mispo":
        return "Â·log π_θ"
    if algorithm.loss == "cispo":
        return f"sg[clip(r, {low}, {high})]·Â·log π_θ"
    ratio = "s" if algorithm.loss == "gspo" else "r"
    clipped = f"min({ratio}·Â, clip({ratio}, {low}, {high})·Â)"
    if algorithm.loss == "ppo" and algorithm.dual_clip is not None:
        return f"max({clipped}, −{algorithm.dual_clip:g}·|Â|)"
    return clipped


def _advantage(config: MispoConfig) -> str:
    algorithm = config.algorithm
    shown = {
        "gae": f"GAE(γ={algorithm.gamma:g}, λ={algorithm.lam:g})",
        "group_std": "(R̂ − mean_group)/std_group",
        "group_mean": "R̂ − mean_group",
        "rloo": "R̂ − mean of the others",
    }[algorithm.advantage]
    return f"Â = {'whiten(' + shown + ')' if algorithm.whiten == 'batch' else shown}"


def _returns(config: MispoConfig) -> str:
    algorithm = config.algorithm
    punished = " − overlong" if algorithm.overlong.share else ""
    cut = {"bootstrap": "V(s_T) if cut", "zero": f"0{punished} if cut", "mask": "left out if cut"}
    return f"R̂ = R{punished}, {cut[algorithm.truncation]}"


def _range(bounds: list[float], name: str) -> str:
    return f"{bounds[0]:g} ≤ {name} ≤ {bounds[1]:g}"
