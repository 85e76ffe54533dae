"""AdamW and Muon under DeepSpeed: parameter groups, and the states by parameter on every ZeRO stage."""

from __future__ import annotations

import math
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import (
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from mispo.config.parts import AdamW, Muon, OptimizerPart
from mispo.trainer.ranks import Ranks
from model.facts import hidden_matrices

BETAS = (0.9, 0.95)

EPSILON = 1e-8

MOMENTUM = 0.95
"""Momentum of Muon, with Nesterov's look-ahead."""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of AdamW's states."""

MOMENTUM_BUFFER = ("momentum_buffer",)
"""Names of Muon's states."""


def build_optimizer(module: nn.Module, chosen: OptimizerPart) -> torch.optim.Optimizer:
    """Build the chosen optimizer, with learning rate 0.

    Each group's `lr_scale` multiplies its learning rate; each parameter's `optimizer_states` are the names of its
    states, for checkpoints.
    """
    for parameter in _trained(module).values():
        parameter.optimizer_states = MOMENTS  # type: ignore[attr-defined]
    if isinstance(chosen, AdamW):
        groups = [
            {**group, "lr_scale": 1.0} for group in _adam_groups(list(_trained(module).values()), chosen.weight_decay)
        ]
        return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, eps=EPSILON)
    assert isinstance(chosen, Muon), f"no optimizer is built for {chosen.name}"
    # Imported here, since it takes two seconds.
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    return MuonWithAuxAdam(_muon_groups(module, chosen.weight_decay))


def zero_options(chosen: OptimizerPart, stage: int) -> dict[str, bool]:
    """Return the further keys of DeepSpeed's `zero_optimization` that this optimizer needs."""
    if isinstance(chosen, Muon) and stage == 3:
        return {"reduce_scatter": False, "save_muon_momentum_buffer_in_memory": True}
    return {}


def _adam_groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Build groups with decay on matrices (and stacks of them), and without decay on norms and biases."""
    matrices = [p for p in parameters if p.ndim >= 2]
    others = [p for p in parameters if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _muon_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Build groups of Muon for the matrices of hidden layers, and of AdamW for the rest.

    Each slice of a stack [experts, out, in] is a matrix; the rest are embeddings, output heads, norms and biases. A
    matrix [out, in] moves by lr · 0.2 · √max(out, in) times an orthogonal one, whose entries then have the size of an
    AdamW update (Moonlight, arXiv 2502.16982), so both kinds share a learning rate. DeepSpeed multiplies by
    √max(1, out/in); `lr_scale` has the remaining factor, so there is one group for each shape.
    """
    shapes: dict[tuple[int, int], list[nn.Parameter]] = {}
    others: list[nn.Parameter] = []
    hidden = {id(parameter) for parameter in hidden_matrices(module)}
    for parameter in _trained(module).values():
        by_muon = id(parameter) in hidden
        parameter.use_muon = by_muon  # type: ignore[attr-defined]  # DeepSpeed reads both
        parameter.is_expert_group = parameter.ndim == 3  # type: ignore[attr-defined]
        if by_muon:
            parameter.optimizer_states = MOMENTUM_BUFFER  # type: ignore[attr-defined]
            shapes.setdefault((parameter.shape[-2], parameter.shape[-1]), []).append(parameter)
        else:
            others.append(parameter)
    groups = []
    for (rows, columns), members in shapes.items():
        scale = 0.2 * math.sqrt(max(rows, columns)) / math.sqrt(max(1.0, rows / columns))
        groups.append(
            {
                "params": members,
                "use_muon": True,
                "lr": 0.0,
                "lr_scale": scale,
                "momentum": MOMENTUM,
                "weight_decay": weight_decay / scale,  # decay is lr times this, and not scaled by the shape
                "ns_method": "standard",
            }
        )
    for group in _adam_groups(others, weight_decay):
        if group["params"]:
            groups.append(group | {"use_muon": False, "lr": 0.0, "lr_scale": 1.0, "betas": BETAS, "eps": EPSILON})
    return groups


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


class OptimizerStates:
    """The states of an engine's optimizer as full tensors, `PARAMETER.STATE`; reading and setting are collective."""

    def __init__(self, engine: DeepSpeedEngine, ranks: Ranks) -> None:
        self.engine = engine
        self.ranks = ranks
        self.stage = engine.zero_optimization_stage()

    def names(self) -> set[str]:
        """Return the names of all states that exist after an update."""
        return {f"{name}.{state}" for name, p in _trained(self.engine.module).items() for state in states_of(p)}

    def read(self, *, keep: bool = True) -> dict[str, Tensor]:
        """Return all states, on the CPU; {} on a rank that only helps to gather them (keep=False)."""
        self._link()
        states: dict[str, Tensor] = {}
        sliced = self._muon_slices()
        for name, parameter in _trained(self.engine.module).items():
            for state in states_of(parameter):
                if self.stage == 0:
                    tensor = self.engine.optimizer.state[parameter][state]
                elif sliced is not None and state == "momentum_buffer":
                    tensor = self._gather_slice(parameter, sliced)
                else:
                    tensor = safe_get_full_optimizer_state(parameter, state)
                if keep:
                    states[f"{name}.{state}"] = tensor.detach().cpu()
        return states

    def write(self, states: dict[str, Tensor], updates: int) -> None:
        """Load the states that `read` returned after so many updates; the optimizer must have allocated its states."""
        self._link()
        sliced = self._muon_slices()
        for name, parameter in _trained(self.engine.module).items():
            for state in states_of(parameter):
                value = states[f"{name}.{state}"].to(self.ranks.device)
                if self.stage == 0:
                    self.engine.optimizer.state[parameter][state].copy_(value)
                elif sliced is not None and state == "momentum_buffer":
                    if id(parameter) in sliced:
                        sliced[id(parameter)].copy_(value.flatten())
                elif self.stage == 3:
                    # The last partitions are padded, which DeepSpeed's function for whole states does not handle.
                    each = parameter.ds_tensor.numel()  # type: ignore[attr-defined]  # of ZeRO-3
                    padded = nn.functional.pad(value.flatten(), (0, each * self.ranks.size - value.numel()))
                    mine = padded[each * self.ranks.rank : each * (self.ranks.rank + 1)]
                    safe_set_local_optimizer_state(parameter, mine, state)
                else:
                    safe_set_full_optimizer_state(parameter, value, state)
        self.set_step(updates)

    def set_step(self, updates: int) -> None:
        """Set the optimizer's number of updates (Adam's bias correction depends on it)."""
        optimizer = self.engine.optimizer.optimizer if self.stage else self.engine.optimizer
        for state in optimizer.state.values():
            if "step" in state:
                state["step"] = torch.tensor(float(updates)) if torch.is_tensor(state["step"]) else updates

    def _link(self) -> None:
        """Make Adam's states reachable by parameter.

        DeepSpeed (0.19) does so during the first step, after the first parameter group: the states of the other
        groups do not exist yet, and stay unreachable.
        """
        if self.stage in (1, 2):
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _muon_slices(self) -> dict[int, Tensor] | None:
        """Return this rank's momenta under ZeRO 1 and 2, flat, by id of their parameter; None elsewhere.

        At these stages DeepSpeed keeps the whole momentum of every matrix of which a rank has a part, one after the
        other.
        """
        zero = self.engine.optimizer
        if self.stage not in (1, 2) or not any(group.get("use_muon") for group in zero.param_groups):
            return None
        slices: dict[int, Tensor] = {}
        for number, group in enumerate(zero.param_groups):
            members = zero.params_in_partition[number] if group["use_muon"] else []
            if members:
                flat = zero.optimizer.state[group["params"][0]]["momentum_buffer"]
                parts = flat.split([member.numel() for member in members])
                slices |= {id(member): part for member, part in zip(members, parts, strict=True)}
        return slices

    def _gather_slice(self, parameter: nn.Parameter, slices: dict[int, Tensor]) -> Tensor:
        """Return the whole momentum, from the first rank that has it."""
        mine = slices.get(id(parameter))
        owner = -int(self.ranks.max(torch.tensor(-self.ranks.rank if mine is not None else -self.ranks.size)))
        if mine is None or owner != self.ranks.rank:
            mine = torch.zeros(parameter.numel(), device=self.ranks.device)
        return self.ranks.sum(mine).view(parameter.shape)


def states_of(parameter: nn.Parameter) -> tuple[str, ...]:
    """Return the names of a parameter's states, as `build_optimizer` has set them."""
    names: tuple[str, ...] = parameter.optimizer_states  # type: ignore[attr-defined]
    return names
