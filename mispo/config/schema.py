"""The sections of a config. Every default is here, once: class defaults are the report's numbers, YAML overrides.

Torch-free. Each field has its unit and source underneath, its range in `setting`. A section holds the chosen part of a
group (`mispo.config.parts`, `mispo.config.algorithm_parts`). "Report" is the Step 3.5 Flash report, arXiv 2602.10604;
"ours" marks what the report leaves open.
"""

# ruff: noqa: RUF009  (`setting` declares a field)

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mispo.config.algorithm_parts import (
    AdvantagePart,
    Bounds,
    CorrectionPart,
    FilterPart,
    Gae,
    LossPart,
    Mispo,
    NoCorrection,
)
from mispo.config.parts import (
    CriticPart,
    EnginePart,
    EnvironmentPart,
    Muon,
    Native,
    OptimizerPart,
    SeparateCritic,
    SingleTurn,
)
from mispo.config.setting import setting


@dataclass
class LoraConfig:
    """Low-rank adapters instead of all weights, through peft (pip install 'mispo[lora]'). The model itself and the
    critic's backbone are frozen, in the compute precision: in bf16 2 bytes per parameter and model, else 16."""

    rank: int = setting(0, least=0)
    """Rank of the adapters; 0 = off, all weights learn. Ours."""
    alpha: float = setting(32.0, above=0, needs="model.lora.rank")
    """Their output is multiplied by alpha/rank, > 0."""
    targets: list[str] = setting([], needs="model.lora.rank")
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
    mtp: int = setting(0, choices=(0, 1, 2, 3))
    """Heads of a preset that draft the tokens after the next one, 0 to 3 (Step 3.5 Flash: 3); a checkpoint keeps
    those that it has. They learn in the warm start, and in RL with `trainer.mtp_weight`."""
    trust_remote_code: bool = False
    """Run the modeling code that a checkpoint carries (checkpoints written by mispo need no such code here)."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    attention: str = setting("sdpa", choices=("sdpa", "eager", "flex_attention", "flash_attention_2"))
    """transformers' `attn_implementation` for the trainer: sdpa, eager; on CUDA also flex_attention and
    flash_attention_2, which need no padding. Rollouts use sdpa."""


@dataclass
class SourceConfig:
    """A source of problems. Exactly one of `task` and `path` is set."""

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


@dataclass
class MixtureSourceConfig(SourceConfig):
    """One of several sources of training prompts."""

    weight: float = setting(1.0, above=0)
    """Its share of the prompts is this, divided by the sum over all sources. Ours."""


@dataclass
class DataConfig(SourceConfig):
    """Where prompts come from: the source described here, or a mixture of several."""

    mixture: dict[str, MixtureSourceConfig] = field(default_factory=dict)
    """Sources by name, instead of the one above: then `task` and `path` stay null here. Ours."""
    max_prompt_tokens: int = setting(2048, least=1)
    """Tokens. A longer prompt is an error, never cut."""
    seed: int = 0
    """Seed of the prompt stream and of the held-out split; independent of the run's `seed`."""
    eval_size: int = setting(512, least=0)
    """Held-out problems, chosen by a hash of the question, so that none is ever trained on."""


@dataclass
class WarmStartConfig:
    """Supervised steps on generated traces before RL; stands in for a pre-trained model. Ours."""

    steps: int = setting(0, least=0)
    """Optimizer steps; 0 = off. Stops early on purpose, so that sampling mixes both habits."""
    batch_size: int = setting(64, least=1)
    """Traces per step."""
    lr: float = setting(2.0e-3, above=0)
    """Peak learning rate (AdamW, betas 0.9 and 0.98)."""
    warmup_steps: int = setting(20, least=0)
    """Linear warm-up; then constant, then linear decay to 0 over the second half."""
    terse_fraction: float = setting(0.7, least=0, most=1)
    """Share of traces that answer at once, without thinking; in [0, 1]."""
    mtp_weight: float = setting(0.1, least=0, needs="model.mtp")
    """Weight of the loss of the draft heads (`model.mtp`), mean over them, ≥ 0; its gradient reaches the whole model.
    Ours."""


@dataclass
class RewardPartConfig:
    """One term of the reward."""

    name: str = "gym"
    """gym: reasoning-gym's scorer for `data.task`, exact; exact: text after the thinking equals the answer; format: one
    closed think block, then an answer; package.module:function: a function of yours."""
    weight: float = setting(1.0, least=0)
    """Factor of this part in the sum; 0 = only logged. Ours."""


def _task_reward() -> dict[str, RewardPartConfig]:
    return {"task": RewardPartConfig()}


@dataclass
class RewardConfig:
    """The verifiers: the reward is the sum of weight · part, its range the sum of weight · range."""

    parts: dict[str, RewardPartConfig] = field(default_factory=_task_reward)
    """Terms of the reward by name; each is logged as `reward/NAME`. Ours."""
    timeout_s: float = setting(10.0, above=0)
    """Seconds one score may take before its worker is killed; the outcome is then `timeout`, with the
    lowest reward."""
    workers: int = setting(1, least=1)
    """Child processes that score."""
    permute: bool = False
    """Control experiment: shuffle the rewards within each step, so that nothing can be learnt from them."""


@dataclass
class RolloutConfig:
    """Sampling of trajectories."""

    prompts_per_step: int = setting(256, least=1)
    """Prompts per training step (report: 256)."""
    samples_per_prompt: int = setting(16, least=1)
    """Completions per prompt (report: 16)."""
    max_new_tokens: int = setting(32768, least=1)
    """Tokens; a completion that reaches it is truncated (finish_reason `length`). Ours."""
    temperature: float = setting(1.0, above=0)
    """Sampling temperature, > 0 (report: 1). Log-probs are taken after it."""
    lag: int = setting(0, least=0)
    """Sample from the weights of this many actor updates ago; 0 = current weights. For off-policy studies."""
    dtype: str = setting("auto", choices=("auto", "fp32", "bf16", "fp16"))
    """Precision of the rollout copy: auto (bf16 on CUDA, fp32 on CPU), fp32, bf16 or fp16. Routers stay fp32."""
    parity_tolerance: float = setting(0.1, above=0)
    """Nats. Mean |Δ log-prob| per token between engine and trainer allowed right after a weight sync, else the run
    stops. bf16 noise is about 0.01; foreign weights are off by 1 and more. Ours."""


@dataclass
class OverlongConfig:
    """Soft punishment of long completions (DAPO)."""

    share: float = setting(0.0, least=0, most=1)
    """Share of `rollout.max_new_tokens` at the end over which the punishment rises from 0 to `penalty`; 0 = off."""
    penalty: float = setting(1.0, least=0, needs="algorithm.overlong.share")
    """Subtracted from the reward of a completion at the limit (DAPO: 1)."""


@dataclass
class AlgorithmConfig:
    """Which samples count, what they are worth, and the loss. Defaults: MIS-PO, with value bootstrapping."""

    filter: FilterPart = field(default_factory=Bounds)
    """Which tokens and trajectories are kept."""
    mask_policy: str = setting("old", choices=("old", "current"))
    """Whose ratios the filter looks at: old: π_old, once per step (report); current: π_θ, again before each mini-batch,
    for one more forward. Ours."""
    loss: LossPart = field(default_factory=Mispo)
    """What the actor maximises for a token."""
    correction: CorrectionPart = field(default_factory=NoCorrection)
    """The weight of a token for the mismatch of rollout and trainer."""
    advantage: AdvantagePart = field(default_factory=Gae)
    """What a token is worth."""
    whiten: str = setting("batch", choices=("batch", "none"))
    """Advantage scale: batch: (A − mean)/max(std, 0.01) over the generated tokens of the step; none. Ours."""
    truncation: str = setting("bootstrap", choices=("bootstrap", "zero", "mask"))
    """A truncated trajectory's return: bootstrap: V(s_T) (report §5.2.2); zero: 0; mask: left out everywhere."""
    loss_norm: str = setting("tokens", choices=("tokens", "accepted", "sequence", "constant"))
    """Denominator of the actor loss, over the whole mini-batch and all ranks: tokens: all generated tokens, so
    that acceptance scales the step; accepted: kept tokens only; sequence: trajectories, each the mean of its tokens;
    constant: trajectories times rollout.max_new_tokens. Ours."""
    kl: float = setting(0.0, least=0)
    """Coefficient of the unbiased KL to a reference policy, ≥ 0 (report: 0.001, in the last stage only). 0 = no
    reference is loaded."""
    reference: str | None = setting(None, needs="algorithm.kl")
    """The reference policy, a Hugging Face directory or hub id; None = the policy at the start of the run."""
    entropy: float = setting(0.0, least=0)
    """Coefficient of an entropy bonus, ≥ 0."""
    dynamic_sampling: bool = False
    """Replace prompts whose samples all have the same reward by further prompts (DAPO)."""
    max_rounds: int = setting(10, least=1, needs="algorithm.dynamic_sampling")
    """With dynamic_sampling: rounds of sampling per step; prompts still missing then are filled with such prompts."""
    overlong: OverlongConfig = field(default_factory=OverlongConfig)


@dataclass
class TrainerConfig:
    """Two DeepSpeed engines, actor and critic."""

    steps: int = setting(1000, least=0)
    """Training steps of this run, counted from the beginning, also after a resume. Ours."""
    actor_minibatches: int = setting(4, least=1)
    """Actor optimizer updates per step; near-equal parts of the step's trajectories (report: 4)."""
    critic_minibatches: int = setting(12, least=1)
    """Critic optimizer updates per step (report: 12)."""
    tokens_per_microbatch: int = setting(65536, least=1)
    """Tokens, padding included, in one forward; bounds memory, never changes the result."""
    layout: str = setting("auto", choices=("auto", "padded", "packed"))
    """padded: a row for each trajectory, sorted by length and cut for little padding; packed: one after the other in
    one row, without padding, which pays with flex_attention or flash_attention_2 (with sdpa the time of attention grows
    with the square of the micro-batch); auto: packed with these two. Never changes the result. Ours."""
    actor_lr: float = setting(2.0e-6, least=0)
    """Actor learning rate (report: 2e-6)."""
    actor_warmup_updates: int = setting(20, least=0)
    """Linear warm-up, in actor updates (report: 20)."""
    critic_lr: float = setting(5.0e-6, least=0)
    """Critic learning rate (report: 5e-6)."""
    critic_warmup_updates: int = setting(50, least=0)
    """Linear warm-up, in critic updates (report: 50)."""
    mtp_weight: float = setting(0.0, least=0)
    """Weight of the draft heads' loss beside the actor's, ≥ 0, for example 0.1; 0 = they stay as they are. They learn
    from what the rollouts wrote, without effect on the policy, but both share `optimizer.max_grad_norm`. Ours."""
    zero_stage: int = setting(0, choices=(0, 1, 2, 3))
    """DeepSpeed ZeRO stage: 0, 1, 2 or 3."""
    offload: str = setting("none", choices=("none", "optimizer", "parameters"))
    """What lies in the host's memory: none; optimizer: its states (ZeRO 1 to 3); parameters: these too (ZeRO 3)."""
    gradient_checkpointing: bool = False
    """Keep no activations of the layers, compute them again in the backward pass: less memory, more time."""
    deepspeed: str | None = None
    """Your DeepSpeed JSON file, merged into the generated one; it cannot set what a setting here decides."""
    dtype: str = setting("auto", choices=("auto", "fp32", "bf16"))
    """Compute precision: auto (bf16 on CUDA, fp32 on CPU), fp32 or bf16. Parameters and routers stay fp32."""
    all_must_learn: bool = True
    """Stop if a trainable tensor has no gradient in the first update: it would never change. Ours."""
    max_skipped_updates: int = setting(3, least=1)
    """Consecutive updates with a non-finite gradient before the run stops."""


@dataclass
class RouterConfig:
    """The routers of a MoE: which experts the trainer activates, what is learnt and what is measured. Ours, but for
    `replay`."""

    replay: str = setting("off", choices=("off", "rollout", "old"))
    """Which experts the actor activates: off: its routers decide; rollout: those of the rollout, in scoring and in the
    updates (R3; report §5.2.3: for models of low routing confidence); old: those of π_old, in the updates (R2). Their
    weights always come from the actor's own logits. Never in the critic."""
    record: bool = True
    """Keep which experts the rollout activated at every position: for moe/expert_agreement, advice and replay.
    MoE layers × top-k × 1 byte per token (2 with more than 256 experts); `--dry-run` shows how much that is."""
    freeze: bool = False
    """Leave the routers as they are. Weights of the experts still change with what comes before them."""
    bias_update_rate: float = setting(0.0, least=0)
    """Loss-free balancing: after each step the selection bias of an expert with less than the mean load rises by this,
    that of one with more falls; ≥ 0. Routers without such a bias refuse it."""
    attribute_every: int = setting(0, least=0)
    """Steps between mismatch attributions (attribution/*, RUN/attribution/); the last step has one too. 0 = only one,
    at the first step. More than 0 with rollout.lag: old weights are kept in the trainer's
    precision, and a copy of the policy takes memory during an attribution."""
    attribute_trajectories: int = setting(128, least=2)
    """Trajectories that an attribution looks at, over all ranks; up to six more forwards for each."""


@dataclass
class EvalSetConfig(SourceConfig):
    """A further set of problems for evaluation."""

    size: int | None = setting(None, least=1, null="takes all of them")
    """The first so many problems; None = all of a file."""
    samples: int | None = setting(None, least=0, null="takes eval.samples")
    """Sampled completions per problem (k of avg@k); None = `eval.samples`."""


@dataclass
class EvalConfig:
    """Held-out accuracy. Row 0 of the metrics is the state before RL."""

    every: int = setting(0, least=0)
    """Steps between evaluations; 0 = only before and after."""
    samples: int = setting(1, least=0)
    """Sampled completions per held-out problem (k of avg@k); the greedy one comes on top; 0 = greedy only."""
    traces: int = setting(10, least=0)
    """Sample traces kept before and after for the report."""
    sets: dict[str, EvalSetConfig] = field(default_factory=dict)
    """Sets by name, evaluated besides the held-out problems of the training data (data.eval_size). Ours."""


@dataclass
class CheckpointConfig:
    """Atomic checkpoints: the actor is a plain Hugging Face directory, trainer state beside it."""

    every: int = setting(50, least=0)
    """Steps between checkpoints; the last step always writes one; 0 = only the last."""
    keep_last: int = setting(2, least=1)
    """Checkpoints kept; ≥ 1."""
    keep_best: int = setting(0, least=0)
    """Kept besides: those with the highest greedy held-out accuracy, of the steps with an evaluation."""


@dataclass
class AlarmConfig:
    """Signs that a run has gone wrong. Each alarm names its metric, a likely cause and what to do. Ours."""

    action: str = setting("warn", choices=("warn", "stop", "off"))
    """warn: a line on the screen; stop: the run ends with a checkpoint; off."""
    patience: int = setting(5, least=1)
    """Steps in a row that a sign must be seen, ≥ 1."""
    min_acceptance: float = setting(0.01, least=0, most=1)
    """Share of accepted trajectories below which the filter starves the actor, in [0, 1]."""
    max_mismatch: float = setting(0.1, above=0)
    """mismatch/k3, nats per token, above which rollout and trainer are different policies, > 0."""
    max_low_confidence: float = setting(0.3, least=0, most=1)
    """moe/low_confidence/mean, share of tokens below the confidence that a tenth lay below in step 1 of the run, above
    which the routers have become unsure, in [0, 1]. Ours."""
    min_agreement: float = setting(0.9, least=0, most=1)
    """moe/expert_agreement, share of the rollout's experts that the trainer's own routers choose, below which they are
    different routers, in [0, 1]. Ours."""
    stall_s: float = setting(1800.0, above=0)
    """Seconds that one phase of a step may take before the stacks of all threads are shown, > 0; it ends nothing."""
    max_failed_rewards: float = setting(0.5, least=0, most=1)
    """Share of completions whose verifier failed (error, timeout, value outside its range), in [0, 1]."""


@dataclass
class TrackingConfig:
    """Where metrics go. metrics.jsonl is always written."""

    wandb: str = setting("auto", choices=("auto", "online", "offline", "disabled"))
    """auto: online with a key, else offline; online; offline; disabled."""
    project: str = "mispo"
    """Weights & Biases project."""
    entity: str | None = None
    """Weights & Biases team; None = your default."""
    rollouts_every: int = setting(1, least=0)
    """Steps between saved rollouts/step_N.parquet; 0 = never."""


@dataclass
class MispoConfig:
    """The whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    environment: EnvironmentPart = field(default_factory=SingleTurn)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    engine: EnginePart = field(default_factory=Native)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    critic: CriticPart = field(default_factory=SeparateCritic)
    router: RouterConfig = field(default_factory=RouterConfig)
    optimizer: OptimizerPart = field(default_factory=Muon)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    alarms: AlarmConfig = field(default_factory=AlarmConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    seed: int = 0
    """Seeds weights, sampling and mini-batches. Same seed, same machine: same run, bit for bit on CPU."""
    run_dir: str | None = None
    """Where everything is written; None = runs/<recipe>-<date-time>/ of the working directory."""
