"""Every default of mispo, once. YAML recipes only override; class defaults are the report's numbers.

Torch-free. Each field carries its unit, range and source underneath. "Report" is the Step 3.5 Flash report,
arXiv 2602.10604; "ours" marks what the report leaves open.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class LoraConfig:
    """Low-rank adapters instead of all weights, through peft (pip install 'mispo[lora]'). The model itself and the
    critic's backbone are frozen, in the compute precision: in bf16 2 bytes per parameter and model, else 16."""

    rank: int = 0
    """Rank of the adapters; 0 = off, all weights learn. Ours."""
    alpha: float = 32.0
    """Their output is multiplied by alpha/rank, > 0."""
    targets: list[str] = field(default_factory=list)
    """Layers with an adapter, by name or end of the name, for example [q_proj, v_proj]; empty = all linear layers but
    the output head. Experts that are one stacked tensor, as in Step, have none."""


@dataclass
class ModelConfig:
    """The policy. Exactly one of `preset` and `path` is set."""

    preset: str | None = None
    """Random weights of a built-in shape: micro, tiny, small (93 M parameters), base (1 B) or flash (197 B: Step 3.5
    Flash). Needs `warm_start.steps` to be of any use."""
    path: str | None = "stepfun-ai/Step-3.5-Flash"
    """A Hugging Face causal LM: a directory, or a hub id."""
    mtp: int = 0
    """Heads of a preset that draft the tokens after the next one, 0 to 3 (Step 3.5 Flash: 3); a checkpoint has what it
    has. They learn in the warm start, and in RL with `trainer.mtp_weight`."""
    trust_remote_code: bool = False
    """Run the modeling code that a checkpoint carries (checkpoints written by mispo need no such code here)."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    attention: str = "sdpa"
    """transformers' `attn_implementation` for the trainer: sdpa, eager; on CUDA also flex_attention and
    flash_attention_2, which need no padding. Rollouts use sdpa."""


@dataclass
class DataConfig:
    """Where prompts come from. Exactly one of `task` and `path` is set."""

    task: str | None = None
    """Name of a reasoning-gym generator, for example count_bits."""
    task_args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of that generator, for example {max_n: 4095}."""
    path: str | None = None
    """A .jsonl or .parquet file, or a hub data set id."""
    split: str = "train"
    """Split of a hub data set."""
    prompt: str = "{question}"
    """Format string over the row's columns (for a generator also its metadata) that makes the user's message."""
    answer: str = "answer"
    """Column with the reference answer."""
    max_prompt_tokens: int = 2048
    """Tokens. A longer prompt is an error, never cut."""
    seed: int = 0
    """Seed of the prompt stream and of the held-out split; apart from the run's `seed`."""
    eval_size: int = 512
    """Held-out problems, chosen by a hash of the question, so that none is ever trained on."""


@dataclass
class WarmStartConfig:
    """Supervised steps on generated traces before RL; stands in for a pre-trained model. Ours."""

    steps: int = 0
    """Optimizer steps; 0 = off. Stops early on purpose, so that sampling mixes both habits."""
    batch_size: int = 64
    """Traces per step."""
    lr: float = 2.0e-3
    """Peak learning rate (AdamW, betas 0.9 and 0.98)."""
    warmup_steps: int = 20
    """Linear warm-up; then constant, then linear decay to 0 over the second half."""
    terse_fraction: float = 0.7
    """Share of traces that answer at once, without thinking; in [0, 1]."""
    mtp_weight: float = 0.1
    """Weight of the loss of the draft heads (`model.mtp`), mean over them, ≥ 0; its gradient reaches the whole model.
    Ours."""


@dataclass
class RewardConfig:
    """The verifier."""

    name: str = "gym"
    """gym: reasoning-gym's scorer for `data.task`, exact; exact: text after the thinking equals the answer."""
    format_weight: float = 0.0
    """Reward for a well-formed trace (one closed think block, then an answer), mixed in: (1−w)·task + w·format."""
    timeout_s: float = 10.0
    """Seconds one score may take before its worker is killed; the outcome is then `timeout`, reward 0."""
    workers: int = 1
    """Child processes that score."""
    permute: bool = False
    """Control experiment: shuffle the rewards within each step, so that nothing can be learnt from them."""


@dataclass
class RolloutConfig:
    """Sampling of trajectories."""

    prompts_per_step: int = 256
    """Prompts per training step (report: 256)."""
    samples_per_prompt: int = 16
    """Completions per prompt (report: 16)."""
    max_new_tokens: int = 32768
    """Tokens; a completion that reaches it is truncated (finish_reason `length`). Ours."""
    temperature: float = 1.0
    """Sampling temperature, > 0 (report: 1). Log-probs are taken after it."""
    slots: int = 256
    """Sequences decoded at once by the native engine, per rank."""
    staleness: int = 0
    """Sample from the weights of this many actor updates ago; 0 = current weights. For off-policy studies."""
    dtype: str = "auto"
    """Precision of the rollout copy: auto (bf16 on CUDA, fp32 on CPU), fp32, bf16 or fp16. Routers stay fp32."""
    parity_tolerance: float = 0.1
    """Nats. Mean |Δ log-prob| per token between engine and trainer allowed right after a weight sync, else the run
    stops. bf16 noise is about 0.01; foreign weights are off by 1 and more. Ours."""


@dataclass
class FilterConfig:
    """Metropolis independence filter: which tokens and trajectories are kept."""

    name: str = "bounds"
    """bounds: the report's two tests; quantile: token test, and a window that aims at an acceptance; metropolis: the
    textbook chain over a prompt's samples, which counts some several times; random: as many as bounds, chosen at
    random (control); token_only; none (ablations)."""
    token_bounds: list[float] = field(default_factory=lambda: [0.5, 2.0])
    """Kept tokens have lo ≤ π_old/π_rollout ≤ hi (report: [0.5, 2])."""
    trajectory_bounds: list[float] = field(default_factory=lambda: [0.996, 1.001])
    """Kept trajectories have lo ≤ geometric mean of the token ratios ≤ hi (report: [0.996, 1.001])."""
    target_acceptance: list[float] = field(default_factory=lambda: [0.4, 0.2])
    """quantile: wanted share of accepted trajectories at the first step and after `target_steps`, in [0, 1]. Ours."""
    target_steps: int = 50
    """quantile: steps over which the target moves. Ours."""
    by_length: bool = False
    """quantile: a window of its own for each bucket of lengths (those of mis/accept_len/*). Ours."""
    ratio: str = "trajectory"
    """metropolis: trajectory: product of the token ratios, for which the chain is exact; mean: their geometric mean,
    a heuristic that accepts long traces more easily. Ours."""


@dataclass
class OverlongConfig:
    """Soft punishment of long completions (DAPO)."""

    share: float = 0.0
    """Share of `rollout.max_new_tokens` at the end over which the punishment rises from 0 to `penalty`; 0 = off."""
    penalty: float = 1.0
    """Subtracted from the reward of a completion at the limit (DAPO: 1)."""


@dataclass
class AlgorithmConfig:
    """Which samples count, what they are worth, and the loss. Defaults: MIS-PO, with value bootstrapping."""

    filter: FilterConfig = field(default_factory=FilterConfig)
    mask_policy: str = "old"
    """Whose ratios the filter looks at: old: π_old, once per step (report); current: π_θ anew before each mini-batch,
    for one more forward. Ours."""
    loss: str = "mispo"
    """mispo: score function, no ratio (report §5.2.1); ppo; gspo: PPO's clip on trajectories; cispo: clipped weights
    of the score function."""
    clip: list[float] = field(default_factory=lambda: [0.2, 0.2])
    """ppo, gspo, cispo: π_θ/π_old is clipped to [1 − first, 1 + second] (PPO: 0.2 and 0.2)."""
    dual_clip: float | None = 3.0
    """ppo: where Â < 0 a token's loss is at most this times |Â|; > 1; None = off."""
    correction: str = "none"
    """Weight of a token for the mismatch x = π_old/π_rollout: none; tis: min(x, cap); icepop: x inside the bounds,
    else 0."""
    correction_cap: float = 2.0
    """tis: largest weight, > 0; inf (in YAML .inf) = plain importance weights."""
    correction_bounds: list[float] = field(default_factory=lambda: [0.5, 5.0])
    """icepop: lo ≤ x ≤ hi is kept (IcePop: [0.5, 5])."""
    advantage: str = "gae"
    """gae: from a critic (report); from the other samples of the prompt, without a critic: group_std (GRPO),
    group_mean (Dr. GRPO), rloo."""
    gamma: float = 1.0
    """gae: discount, in (0, 1] (report: 1)."""
    lam: float = 1.0
    """gae: λ of the advantages, in [0, 1] (report: 1)."""
    whiten: str = "batch"
    """Advantage scale: batch: (A − mean)/max(std, 0.01) over the generated tokens of the step; none. Ours."""
    truncation: str = "bootstrap"
    """A truncated trajectory's return: bootstrap: V(s_T) (report §5.2.2); zero: 0; mask: left out everywhere."""
    loss_norm: str = "tokens"
    """Denominator of the actor loss, over the whole mini-batch and all ranks: tokens: all generated tokens, so
    that acceptance scales the step; accepted: kept tokens only; sequence: trajectories, each the mean of its tokens;
    constant: trajectories times rollout.max_new_tokens. Ours."""
    kl: float = 0.0
    """Coefficient of the unbiased KL to a reference policy, ≥ 0 (report: 0.001, in the last stage only). 0 = no
    reference is loaded."""
    reference: str | None = None
    """The reference policy, a Hugging Face directory or hub id; None = the policy at the start of the run."""
    entropy: float = 0.0
    """Coefficient of an entropy bonus, ≥ 0."""
    dynamic_sampling: bool = False
    """Replace prompts whose samples all have the same reward by further prompts (DAPO)."""
    max_rounds: int = 10
    """dynamic_sampling: rounds of sampling per step; what is missing then is filled with such prompts."""
    overlong: OverlongConfig = field(default_factory=OverlongConfig)


@dataclass
class CriticConfig:
    """The value model. Methods without one refuse what is set here."""

    kind: str = "separate"
    """separate: a backbone of its own with a scalar head (report); shared: a scalar head on the policy's trunk, one
    joint loss: another method, with as many critic as actor mini-batches, trainer.actor_lr for both. Ours."""
    model: str | None = None
    """separate: the backbone, a Hugging Face directory or hub id with the policy's tokenizer; None = the policy at the
    start, copied."""
    loss_weight: float = 0.5
    """shared: weight of the value loss in the joint loss, > 0. Ours."""

    pretrain_steps: int = 0
    """Rollouts of the initial policy, each as large as a step's, on whose Monte-Carlo returns the critic learns before
    step 1; truncated trajectories are left out. Ours."""
    warmup_steps: int = 0
    """Steps at the beginning in which only the critic learns."""
    lam: float = 1.0
    """λ of the critic's targets, in [0, 1] (report: 1)."""
    value_clip: float | None = None
    """PPO's value clip: how far a value may move from its old one within a step, in reward units; None = off."""
    head_init_std: float = 1.0e-5
    """Standard deviation of the value head at the start."""
    train_on_truncated: bool = True
    """Whether truncated trajectories are in the critic's loss (their target is their own V(s_T))."""


@dataclass
class TrainerConfig:
    """Two DeepSpeed engines, actor and critic."""

    steps: int = 1000
    """Training steps of this run, counted from the beginning, also after a resume. Ours."""
    actor_minibatches: int = 4
    """Actor optimizer updates per step; near-equal parts of the step's trajectories (report: 4)."""
    critic_minibatches: int = 12
    """Critic optimizer updates per step (report: 12)."""
    tokens_per_microbatch: int = 65536
    """Tokens, padding included, in one forward; bounds memory, never changes the result."""
    layout: str = "auto"
    """padded: a row for each trajectory, sorted by length and cut for little padding; packed: one after the other in
    one row, without padding, which pays with flex_attention or flash_attention_2 (with sdpa the time of attention grows
    with the square of the micro-batch); auto: packed with these two. Never changes the result. Ours."""
    optimizer: str = "muon"
    """muon (report), with AdamW for embeddings, heads and vectors; or adamw. Updates are of one size, so a learning
    rate means the same for both; actor/grad_norm under Muon and ZeRO 1 to 3 is the norm of the update."""
    actor_lr: float = 2.0e-6
    """Actor learning rate (report: 2e-6)."""
    actor_warmup_updates: int = 20
    """Linear warm-up, in actor updates (report: 20)."""
    critic_lr: float = 5.0e-6
    """Critic learning rate (report: 5e-6)."""
    critic_warmup_updates: int = 50
    """Linear warm-up, in critic updates (report: 50)."""
    mtp_weight: float = 0.0
    """Weight of the draft heads' loss beside the actor's, ≥ 0, for example 0.1; 0 = they stay as they are. They learn
    from what the rollouts wrote; the policy does not feel it, but that they share `max_grad_norm`. Ours."""
    weight_decay: float = 0.1
    """Decoupled, on matrices only (report: 0.1)."""
    max_grad_norm: float = 1.0
    """adamw: the gradient norm is clipped to this, per model, > 0. Muon's update does not depend on it. Ours."""
    zero_stage: int = 0
    """DeepSpeed ZeRO stage: 0, 1, 2 or 3."""
    offload: str = "none"
    """What lies in the host's memory: none; optimizer: its states (ZeRO 1 to 3); parameters: these too (ZeRO 3)."""
    gradient_checkpointing: bool = False
    """Keep no activations of the layers, compute them anew in the backward pass: less memory, more time."""
    deepspeed: str | None = None
    """A DeepSpeed JSON file of your own, merged into the generated one; it cannot set what a field here decides."""
    dtype: str = "auto"
    """Compute precision: auto (bf16 on CUDA, fp32 on CPU), fp32 or bf16. Parameters and routers stay fp32."""
    all_must_learn: bool = True
    """Stop if a trainable tensor has no gradient in the first update: it would stay as it is for ever. Ours."""
    max_skipped_updates: int = 3
    """Consecutive updates with a non-finite gradient before the run stops."""


@dataclass
class RouterConfig:
    """The routers of a MoE: which experts the trainer activates, what is learnt and what is measured. Ours, but for
    `replay`."""

    replay: str = "off"
    """Which experts the actor activates: off: its routers decide; rollout: those of the rollout, in scoring and in the
    updates (R3; report §5.2.3: for models of low routing confidence); old: those of π_old, in the updates (R2). Their
    weights always come from the actor's own logits. Never in the critic."""
    record: bool = True
    """Keep which experts the rollout activated at every position: for moe/expert_agreement, advice and replay.
    MoE layers × top-k × 1 byte per token (2 with more than 256 experts); `--dry-run` tells how much that is."""
    freeze: bool = False
    """Leave the routers as they are. Weights of the experts still change with what comes before them."""
    bias_update_rate: float = 0.0
    """Loss-free balancing: after each step the selection bias of an expert with less than the mean load rises by this,
    that of one with more falls; ≥ 0. Routers without such a bias refuse it."""
    attribute_every: int = 0
    """Steps between mismatch attributions (attribution/*, RUN/attribution/); the last step has one too. 0 = only one,
    at the first step. More than 0 with stale weights (rollout.staleness): old weights are kept in the trainer's
    precision, and a copy of the policy takes its memory meanwhile."""
    attribute_trajectories: int = 128
    """Trajectories that an attribution looks at, over all ranks; up to six more forwards for each."""


@dataclass
class EvalConfig:
    """Held-out accuracy. Row 0 of the metrics is the state before RL."""

    every: int = 0
    """Steps between evaluations; 0 = only before and after."""
    samples: int = 1
    """Sampled completions per held-out problem (k of avg@k); the greedy one comes on top; 0 = greedy only."""
    traces: int = 10
    """Sample traces kept before and after for the report."""


@dataclass
class CheckpointConfig:
    """Atomic checkpoints: the actor is a plain Hugging Face directory, trainer state beside it."""

    every: int = 50
    """Steps between checkpoints; the last step always writes one; 0 = only the last."""
    keep_last: int = 2
    """Checkpoints kept; ≥ 1."""
    keep_best: int = 0
    """Kept besides: those with the highest greedy held-out accuracy, of the steps with an evaluation."""


@dataclass
class AlarmConfig:
    """Signs that a run has gone wrong. Each alarm names its metric, a likely cause and what to do. Ours."""

    action: str = "warn"
    """warn: a line on the screen; stop: the run ends with a checkpoint; off."""
    patience: int = 5
    """Steps in a row that a sign must be seen, ≥ 1."""
    min_acceptance: float = 0.01
    """Share of accepted trajectories below which the filter starves the actor, in [0, 1]."""
    max_mismatch: float = 0.1
    """mismatch/k3, nats per token, above which rollout and trainer are different policies, > 0."""
    max_low_confidence: float = 0.3
    """moe/low_confidence/mean, share of tokens below the confidence that a tenth lay below in step 1 of the run, above
    which the routers have become unsure, in [0, 1]. Ours."""
    min_agreement: float = 0.9
    """moe/expert_agreement, share of the rollout's experts that the trainer's own routers choose, below which they are
    different routers, in [0, 1]. Ours."""
    stall_s: float = 1800.0
    """Seconds that one phase of a step may take before the stacks of all threads are shown, > 0; it ends nothing."""
    max_failed_rewards: float = 0.5
    """Share of completions whose verifier failed (error, timeout, value outside of its range), in [0, 1]."""


@dataclass
class TrackingConfig:
    """Where metrics go. metrics.jsonl is always written."""

    wandb: str = "auto"
    """auto: online with a key, else offline; online; offline; disabled."""
    project: str = "mispo"
    """Weights & Biases project."""
    entity: str | None = None
    """Weights & Biases team; None = your default."""
    rollouts_every: int = 1
    """Steps between saved rollouts/step_N.parquet; 0 = never."""


@dataclass
class MispoConfig:
    """The whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    alarms: AlarmConfig = field(default_factory=AlarmConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    seed: int = 0
    """Seeds weights, sampling and mini-batches. Same seed, same machine: same run, bit for bit on CPU."""
    run_dir: str | None = None
    """Where everything is written; None = runs/<recipe>-<date-time>/ of the working directory."""
