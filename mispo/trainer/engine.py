"""Actor and critic as two DeepSpeed engines through accelerate."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import deepspeed
import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from mispo.config.parts import OptimizerPart
from mispo.config.schema import TrainerConfig
from mispo.trainer.batch import ModelInput
from mispo.trainer.optimizer import OptimizerStates, build_optimizer, zero_options
from mispo.trainer.policy import ActorModule, CriticModule
from mispo.trainer.ranks import COLLECTIVE_TIMEOUT, Ranks, prepare_environment
from model.facts import FlopCounter, ForwardFlops
from model.lora import has_lora
from model.moe.routers import find_routers

M = TypeVar("M", bound=nn.Module)

DECIDED_BY = {
    "train_batch_size": "rollout.prompts_per_step",
    "train_micro_batch_size_per_gpu": "trainer.tokens_per_microbatch",
    "gradient_accumulation_steps": "trainer.tokens_per_microbatch",
    "gradient_clipping": "optimizer",
    "zero_optimization.stage": "trainer.zero_stage",
    "zero_optimization.offload_optimizer": "trainer.offload",
    "zero_optimization.offload_param": "trainer.offload",
    "bf16": "trainer.dtype",
    "fp16": "trainer.dtype",
    "optimizer": "optimizer",
    "scheduler": "trainer.actor_warmup_updates",
}
"""Keys of DeepSpeed's JSON that a user's own file must not set, and the field of mispo that does."""


@dataclass(frozen=True)
class Update:
    """One optimizer update: its loss, gradient norm before clipping, learning rate, and whether it was applied.

    stats: sums over its tokens and all ranks, for metrics.
    """

    loss: float
    grad_norm: float
    lr: float
    applied: bool
    stats: Mapping[str, float] = field(default_factory=dict)


class TrainEngine(Generic[M]):
    """A module with its optimizer under DeepSpeed.

    lr rises linearly over the first `warmup` updates, then stays. `updates` counts the applied ones, `flops` what is
    computed.
    """

    def __init__(
        self,
        name: str,
        engine: DeepSpeedEngine,
        ranks: Ranks,
        lr: float,
        warmup: int,
        config: TrainerConfig,
        flops: FlopCounter,
    ) -> None:
        self.name = name
        self.engine = engine
        self.ranks = ranks
        self.lr = lr
        self.warmup = warmup
        self.flops = flops
        self.max_skipped = config.max_skipped_updates
        self.states = OptimizerStates(engine, ranks)
        self.updates = 0
        self._skipped_in_a_row = 0
        # The first update of an adapter moves only its B, since that is 0.
        self._check_after = (2 if has_lora(engine.module) else 1) if config.all_must_learn else 0

    @property
    def module(self) -> M:
        return cast(M, self.engine.module)

    def forward(self, x: ModelInput, *args: Any) -> Any:
        """Run the module's forward, through DeepSpeed."""
        self.flops.add(x.lengths, backward=torch.is_grad_enabled())
        return self.engine(x, *args)

    def eval(self) -> None:
        """Switch dropout off."""
        self.engine.eval()

    def update(self, losses: Sequence[Callable[[], Tensor]], *, partial: bool = False) -> Update:
        """Make one optimizer update over micro-batches; every rank passes the same number of them.

        Each callable computes a micro-batch's share of the loss (a sum over a denominator of all ranks). A
        gradient that is not finite never reaches the parameters; RuntimeError after `max_skipped` in a row.
        partial: terms of the loss are missing, so parameters without a gradient are no fault.
        """
        self.engine.train()
        lr = self.lr * min(1.0, (self.updates + 1) / max(self.warmup, 1))
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        total = torch.zeros((), dtype=torch.float64)
        for number, compute in enumerate(losses):
            self.engine.set_gradient_accumulation_boundary(number == len(losses) - 1)
            loss = compute()
            total += loss.detach().double().cpu()
            # DeepSpeed averages gradients over ranks; ours are shares of one global sum.
            self.engine.backward(loss * self.ranks.size)
        norm, applied = self._step()
        self._count(applied)
        if self._check_after and applied and norm > 0 and not partial:
            self._check_after -= 1
            if self._check_after == 0:
                self._check_all_learn()
        return Update(self.ranks.sum(total).item(), norm, lr, applied)

    def create_states(self, zero_loss: Tensor) -> None:
        """Let the optimizer allocate its states by an update that changes nothing (learning rate 0)."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = 0.0
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.backward(zero_loss)
        self.engine.step()
        self.engine.zero_grad()
        self.states.set_step(0)

    def _step(self) -> tuple[float, bool]:
        if self.engine.zero_optimization_stage() == 0:
            # DeepSpeed does not check for NaN at stage 0.
            grads = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
            norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))))
            if not torch.isfinite(torch.tensor(norm)):
                self.engine.zero_grad()
                return norm, False
            self.engine.step()
            self.engine.zero_grad()
            return norm, True
        self.engine.step()
        applied = not self.engine.optimizer.overflow
        return (float(self.engine.get_global_grad_norm()) if applied else float("nan")), applied

    def _check_all_learn(self) -> None:
        """Raise RuntimeError if a trainable tensor had no gradient in the updates so far: it would never learn."""
        learning: dict[str, bool] = {}
        for key, state in self.states.read().items():
            name = key.rpartition(".")[0]
            learning[name] = learning.get(name, False) or bool(state.any())
        still = [name for name, learns in learning.items() if not learns]
        if still:
            shown = ", ".join(still[:5]) + (f" and {len(still) - 5} more" if len(still) > 5 else "")
            raise RuntimeError(
                f"{self.name}: {len(still)} of {len(learning)} trainable tensors had no gradient in the first updates: "
                f"{shown}. They belong to parts of the model that are not used, or the sharding loses them; if this is "
                "intended, set trainer.all_must_learn=false"
            )

    def _count(self, applied: bool) -> None:
        if applied:
            self.updates += 1
            self._skipped_in_a_row = 0
            return
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= self.max_skipped:
            raise RuntimeError(
                f"{self.name}: {self._skipped_in_a_row} updates in a row had a gradient that is not finite; "
                f"lower trainer.{self.name}_lr, or look for NaN in the rewards (trainer.max_skipped_updates); "
                "to train on the step's batch again: `mispo train --rollouts RUN/rollouts/step_N.parquet`"
            )


def start_ranks(config: TrainerConfig, optimizer: OptimizerPart) -> tuple[Accelerator, Ranks]:
    """Start the process group, with one DeepSpeed plugin for each of the two models."""
    prepare_environment(config, optimizer)
    for name in ("DeepSpeed", "accelerate.accelerator"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # DeepSpeed makes these calls on every rank; a user cannot change them.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # On CPU DeepSpeed would compile its own all-reduce at the first start; gloo does the work here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    plugins = {name: DeepSpeedPlugin(hf_ds_config=deepspeed_config(config, optimizer)) for name in ("actor", "critic")}
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "gloo":
        torch.compiler.set_stance("force_eager")  # Muon's products are not worth a C++ compiler
    accelerator = Accelerator(
        deepspeed_plugins=plugins,
        kwargs_handlers=[InitProcessGroupKwargs(backend=backend, timeout=COLLECTIVE_TIMEOUT)],
    )
    # Otherwise transformers loads models partitioned under ZeRO-3; the rollout engine copies them whole first.
    unset_hf_deepspeed_config()
    return accelerator, Ranks(accelerator.process_index, accelerator.num_processes, accelerator.device)


def build_engines(
    accelerator: Accelerator,
    ranks: Ranks,
    actor: ActorModule,
    critic: CriticModule | None,
    config: TrainerConfig,
    optimizer: OptimizerPart,
    flops: Mapping[str, ForwardFlops],
) -> tuple[TrainEngine[ActorModule], TrainEngine[CriticModule] | None]:
    """Put both modules under DeepSpeed.

    actor, critic: on this rank's device and equal on all ranks; critic is None for methods without one. flops: of a
    forward of each, by name.
    """

    def build(name: str, module: M, lr: float, warmup: int) -> TrainEngine[M]:
        accelerator.state.select_deepspeed_plugin(name)
        if config.zero_stage == 3:
            gather_moe_layers_whole(module)
        # lr 0 while DeepSpeed sets up its states: nothing may move before the first update.
        engine, _ = accelerator.prepare(module, build_optimizer(module, optimizer))
        counter = FlopCounter(flops[name], backward=1.0 if has_lora(module) else 2.0)
        return TrainEngine(name, engine, ranks, lr, warmup, config, counter)

    return (
        build("actor", actor, config.actor_lr, config.actor_warmup_updates),
        build("critic", critic, config.critic_lr, config.critic_warmup_updates) if critic else None,
    )


def gather_moe_layers_whole(module: nn.Module) -> list[str]:
    """Let ZeRO-3 gather a MoE layer with all its experts at once; return the layers' names.

    Otherwise ranks whose tokens go to different experts wait for each other in different places (DeepSpeed#7461).
    """
    names = [router.name.rpartition(".")[0] for router in find_routers(module)]
    classes = {type(module.get_submodule(name)) for name in names}
    if classes:
        set_z3_leaf_modules(module, list(classes))
    return names


def deepspeed_config(config: TrainerConfig, optimizer: OptimizerPart) -> dict[str, Any]:
    """Build DeepSpeed's JSON, with the user's file (trainer.deepspeed) merged in.

    `TrainEngine.update` controls accumulation, so it is 1 here. ValueError for a file that cannot be read, or that sets
    a key which a field of mispo decides.
    """
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    zero |= zero_options(optimizer, config.zero_stage)
    generated = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optimizer.clips_at or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    return generated if config.deepspeed is None else _merged(generated, _user_json(config.deepspeed))


def _user_json(path: str) -> dict[str, Any]:
    try:
        own = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"trainer.deepspeed: {path!r} cannot be read as JSON ({error})") from error
    if not isinstance(own, dict):
        raise ValueError(f"trainer.deepspeed: {path!r} is not a JSON object")
    keys = [*own, *(f"zero_optimization.{key}" for key in own.get("zero_optimization", {}))]
    for key in keys:
        if key in DECIDED_BY:
            raise ValueError(f"trainer.deepspeed: {path!r} sets {key!r}; leave it out, {DECIDED_BY[key]} decides it")
    return own


def _merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Merge `own` into `base`, object by object; `own` wins."""
    both = {
        key: _merged(base[key], value) if isinstance(base.get(key), dict) and isinstance(value, dict) else value
        for key, value in own.items()
    }
    return base | both
