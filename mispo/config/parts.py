"""The parts that a config chooses from, but for those of a method: environments, engines, critics, optimizers.

A part has its fields with their ranges, its formula and its memory arithmetic. `GROUP=NAME` chooses it:
`critic=shared`, `algorithm/filter=quantile`. To add one, write its class, name it in its group's tuple and build it in
`mispo/build/`. "Report" is the Step 3.5 Flash report, arXiv 2602.10604; "ours" marks what the report leaves open.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mispo.config.setting import setting


@dataclass
class Part:
    """A choice of a group; its name stands in config.yaml and is fixed by the class."""

    name: str = field(default="", init=False)
    """Name within the group, which chooses it."""


# Environments ---------------------------------------------------------------------------------------------------------


@dataclass
class EnvironmentPart(Part):
    """What a completion is given as an answer."""


@dataclass
class SingleTurn(EnvironmentPart):
    """One prompt, one completion."""

    name: str = field(default="single_turn", init=False)


ENVIRONMENTS: tuple[type[EnvironmentPart], ...] = (SingleTurn,)


# Engines --------------------------------------------------------------------------------------------------------------


@dataclass
class EnginePart(Part):
    """What samples completions."""


@dataclass
class Native(EnginePart):
    """Sample with the trainer's own model code and a KV cache of fixed size. Ours."""

    name: str = field(default="native", init=False)
    slots: int = setting(256, least=1)
    """Sequences decoded at once, per rank. The KV cache has room for the longest trajectory in each."""


ENGINES: tuple[type[EnginePart], ...] = (Native,)


# Critics --------------------------------------------------------------------------------------------------------------


@dataclass
class CriticPart(Part):
    """The value model."""

    def formula(self) -> str:
        """The term that it adds to the actor's loss, with its sign."""
        return ""


@dataclass
class NoCritic(CriticPart):
    """No value model: for advantages that compare the samples of a prompt."""

    name: str = field(default="none", init=False)


@dataclass
class ValueCritic(CriticPart):
    """What every value model has."""

    lam: float = setting(1.0, least=0, most=1)
    """λ of the critic's targets, in [0, 1] (report: 1)."""
    value_clip: float | None = setting(None, above=0, null="switches it off")
    """PPO's value clip: how far a value may move from its old one within a step, in reward units; None = off."""
    head_init_std: float = setting(1.0e-5, least=0)
    """Standard deviation of the value head at the start."""
    train_on_truncated: bool = True
    """Whether truncated trajectories are in the critic's loss (their target is their own V(s_T))."""


@dataclass
class SeparateCritic(ValueCritic):
    """A second backbone with a scalar head (report)."""

    name: str = field(default="separate", init=False)
    model: str | None = None
    """The backbone, a Hugging Face directory or hub id with the policy's tokenizer; None = the policy at the start,
    copied."""
    pretrain_steps: int = setting(0, least=0)
    """Rollouts of the initial policy, each as large as a step's, on whose Monte-Carlo returns the critic learns before
    step 1; truncated trajectories are left out. Ours."""
    warmup_steps: int = setting(0, least=0)
    """Steps at the beginning in which only the critic learns."""


@dataclass
class SharedCritic(ValueCritic):
    """A scalar head on the policy's trunk, trained with it in one joint loss: another method, with as many critic as
    actor mini-batches and trainer.actor_lr for both. Ours."""

    name: str = field(default="shared", init=False)
    loss_weight: float = setting(0.5, above=0)
    """Weight of the value loss in the joint loss, > 0. Ours."""

    def formula(self) -> str:
        return f" + {self.loss_weight:g}·1/N Σ (V − R̂)²"


CRITICS: tuple[type[CriticPart], ...] = (SeparateCritic, SharedCritic, NoCritic)


# Optimizers -----------------------------------------------------------------------------------------------------------


@dataclass
class OptimizerPart(Part):
    """How a gradient becomes an update, of actor and critic alike."""

    title: ClassVar[str] = ""
    """For people."""
    weight_decay: float = setting(0.1, least=0)
    """Decoupled, on matrices only (report: 0.1)."""

    @property
    def clips_at(self) -> float | None:
        """The norm that gradients are clipped to; None = they are not clipped."""
        return None

    def state_bytes(self, hidden: int, others: int) -> int:
        """Count the bytes of the states, fp32. hidden: parameters in matrices of hidden layers; others: the rest."""
        raise NotImplementedError


@dataclass
class Muon(OptimizerPart):
    """Muon for the matrices of hidden layers, AdamW for embeddings, heads and vectors (report; scaled as in arXiv
    2502.16982, so that a learning rate means the same as for AdamW). actor/grad_norm under Muon and ZeRO 1 to 3 is the
    norm of the update. Nothing is clipped: DeepSpeed would clip the orthogonal update, whose size says nothing of the
    gradient's."""

    title: ClassVar[str] = "Muon"
    name: str = field(default="muon", init=False)

    def state_bytes(self, hidden: int, others: int) -> int:
        return 4 * hidden + 8 * others


@dataclass
class AdamW(OptimizerPart):
    """AdamW (arXiv 1711.05101), with betas 0.9 and 0.95."""

    title: ClassVar[str] = "Adam"
    name: str = field(default="adamw", init=False)
    max_grad_norm: float = setting(1.0, above=0)
    """The gradient norm is clipped to this, per model, > 0. Ours."""

    @property
    def clips_at(self) -> float | None:
        return self.max_grad_norm

    def state_bytes(self, hidden: int, others: int) -> int:
        return 8 * (hidden + others)


OPTIMIZERS: tuple[type[OptimizerPart], ...] = (Muon, AdamW)
