"""Everything that differs between families of routers; a new family is one more entry of `FAMILIES`.

Classes of routers come from the model's own `_can_record_outputs["router_logits"]` entry. The form of their weights is
recognised from what they return, since no model says it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.utils.output_capturing import OutputRecorder

TOLERANCE = 1e-2
"""Relative. Routers that round their weights to bf16 are off by 4e-3."""

SAMPLE = 64
"""Tokens that a form is recognised from; more add nothing."""

SURE = 1e-5
"""Relative. A form is kept if the next best is further off than this and than twice the best."""


@dataclass(frozen=True)
class Family:
    """Describe the routers of some classes.

    classes: their names; none = every class that has no other entry.
    output: places of logits [tokens, E], weights [tokens, k] and experts [tokens, k] in what a router returns.
    weight: name of the matrix [E, H] in the router.
    top_k: name of the router's number of activated experts.
    bias: name of the tensor with E entries that decides which experts are selected, not their weights; looked for in
        the router, with in_block in the MoE block around it.
    """

    classes: tuple[str, ...] = ()
    output: tuple[int, int, int] = (0, 1, 2)
    weight: str = "weight"
    top_k: str = "top_k"
    bias: str = "e_score_correction_bias"
    in_block: bool = False


FAMILIES = (
    Family(("Ernie4_5_MoeTopKRouter",), bias="moe_statics.e_score_correction_bias"),
    Family(("MiniMaxM2TopKRouter",), in_block=True),
    Family(),
)
"""The first whose classes name a router's class counts."""


def family_of(router: nn.Module) -> Family:
    """Return the entry of a router's class."""
    names = {base.__name__ for base in type(router).__mro__}  # keep_router_fp32 makes a subclass
    return next(family for family in FAMILIES if not family.classes or names & set(family.classes))


def router_classes(model: nn.Module) -> tuple[type[nn.Module], ...]:
    """List the classes of a model's routers; () for a dense model."""
    classes: list[type[nn.Module]] = []
    for module in model.modules():
        entry = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits")
        if isinstance(entry, OutputRecorder) and entry.target_class not in classes:
            classes.append(entry.target_class)
    return tuple(classes)


@dataclass(frozen=True)
class Router:
    """One MoE layer's router.

    name: in the model. block: the module that it is part of.
    """

    name: str
    module: nn.Module
    block: nn.Module
    family: Family

    @property
    def experts(self) -> int:
        """Number of experts that it chooses from."""
        return int(attrgetter(self.family.weight)(self.module).shape[0])

    @property
    def top_k(self) -> int:
        """Number of experts that it activates for a token."""
        return int(attrgetter(self.family.top_k)(self.module))

    @property
    def bias(self) -> Tensor | None:
        """Bias of the selection, a view [E] of the model's own tensor; None for a router without one."""
        held = self._bias()
        return None if held is None else held.detach().view(-1)

    def to_float32(self) -> None:
        """Convert its parameters and buffers, and the bias of its selection, in place."""
        self.module.float()
        held = self._bias()
        if held is not None:
            held.data = held.data.float()

    def _bias(self) -> Tensor | None:
        held: Any = self.block if self.family.in_block else self.module
        for part in self.family.bias.split("."):
            held = getattr(held, part, None)
        return held if isinstance(held, Tensor) else None

    def read(self, output: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits [tokens, E], weights and experts [tokens, k] from what the module returned."""
        logits, weights, experts = (output[place] for place in self.family.output)
        return logits, weights, experts

    def changed(self, output: Sequence[Tensor], weights: Tensor, experts: Tensor) -> tuple[Tensor, ...]:
        """Return the module's output with other weights and experts [tokens, k]."""
        _, first, second = self.family.output
        return tuple({first: weights, second: experts}.get(place, part) for place, part in enumerate(output))

    def form(self, logits: Tensor, weights: Tensor, experts: Tensor) -> RouterForm:
        """Return what the weights are made of, recognised at the first tokens that leave no doubt, then remembered.

        logits [tokens, E], weights and experts [tokens, k], tokens ≥ 1. ValueError for weights of an unknown form.
        """
        form = _FORMS.get(self.module)
        if form is None:
            form, sure = recognise(logits, weights, experts, self.name)
            if sure:
                _FORMS[self.module] = form
        return form


@dataclass(frozen=True)
class RouterForm:
    """weights = scale · s, over the sum of s over the activated experts if normalised; s = kind of the logits.

    kind: sigmoid or softmax.
    """

    kind: str
    normalised: bool
    scale: float

    def scores(self, logits: Tensor) -> Tensor:
        """Return the scores [tokens, E] float32 of all experts, before any bias of the selection."""
        logits = logits.float()
        return logits.sigmoid() if self.kind == "sigmoid" else logits.softmax(-1)

    def weights(self, logits: Tensor, experts: Tensor) -> Tensor:
        """Return the weights [tokens, k] float32 that the router gives to these experts, with the logits' gradient."""
        selected = self.scores(logits).gather(1, experts)
        if self.normalised:
            selected = selected / selected.sum(-1, keepdim=True).clamp_min(1e-20)
        return self.scale * selected


_FORMS: WeakKeyDictionary[nn.Module, RouterForm] = WeakKeyDictionary()
"""By router. A form belongs to the code of a router, so it outlives a change of its weights."""


@torch.no_grad()
def recognise(logits: Tensor, weights: Tensor, experts: Tensor, name: str = "router") -> tuple[RouterForm, bool]:
    """Find the form whose weights come nearest to these, and say whether all others are clearly further off.

    logits [tokens, E], weights and experts [tokens, k], tokens ≥ 1; one host synchronisation. The scale is rounded to
    six digits, so that it does not depend on the tokens. ValueError for weights of an unknown form.
    """
    logits, weights, experts = logits[:SAMPLE], weights[:SAMPLE].float(), experts[:SAMPLE].long()
    largest = weights.abs().max()
    found = []
    for kind in ("sigmoid", "softmax"):
        for normalised in (False, True):
            made = RouterForm(kind, normalised, 1.0).weights(logits, experts)
            scale = (weights.sum(-1) / made.sum(-1).clamp_min(1e-20)).median()
            error = (scale * made - weights).abs().max() / largest
            found.append((error, kind, normalised, scale))
    errors, scales = torch.stack([torch.stack([error, scale]) for error, _, _, scale in found]).T.tolist()
    best, second = sorted(range(len(found)), key=errors.__getitem__)[:2]
    if not errors[best] < TOLERANCE:
        raise ValueError(
            f"{name}: its weights are neither sigmoid nor softmax scores of its logits (relative difference "
            f"{errors[best]:.2g}); routing confidence and replay are not defined for it"
        )
    form = RouterForm(found[best][1], found[best][2], float(f"{scales[best]:.6g}"))
    return form, errors[second] > 2 * errors[best] + SURE
