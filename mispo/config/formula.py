"""The objective of a config, as one line of mathematics that its parts write together."""

from __future__ import annotations

from mispo.config.schema import AlgorithmConfig, MispoConfig

NORMS = {
    "tokens": "1/N Σ_τ Σ_t",
    "accepted": "1/N_kept Σ_τ Σ_t",
    "sequence": "1/B Σ_τ 1/T Σ_t",
    "constant": "1/(B·T_max) Σ_τ Σ_t",
}


def formula(config: MispoConfig) -> str:
    """Write the loss that the actor minimises, then what Â and R̂ are.

    x = π_old/π_rollout, ρ̄ its geometric mean over a trajectory, r = π_θ/π_old (s: its geometric mean), N tokens, B
    trajectories.
    """
    algorithm = config.algorithm
    current = algorithm.mask_policy == "current"
    kept = algorithm.filter.formula(*(("π_θ/π_rollout", "ρ̄_θ") if current else ("x", "ρ̄")))
    loss = f"L = −{NORMS[algorithm.loss_norm]} {kept}{algorithm.correction.formula()}{algorithm.loss.formula()}"
    if algorithm.kl:
        loss += f" + {algorithm.kl:g}·KL(π_θ‖π_ref)"
    if algorithm.entropy:
        loss += f" − {algorithm.entropy:g}·H(π_θ)"
    advantage = algorithm.advantage.formula()
    scaled = f"whiten({advantage})" if algorithm.whiten == "batch" else advantage
    return f"{loss}{config.critic.formula()},  Â = {scaled},  {_returns(algorithm)}"


def _returns(algorithm: AlgorithmConfig) -> str:
    punished = " − overlong" if algorithm.overlong.share else ""
    cut = {"bootstrap": "V(s_T) if cut", "zero": f"0{punished} if cut", "mask": "left out if cut"}
    return f"R̂ = R{punished}, {cut[algorithm.truncation]}"
