"""Watch the routers of any Hugging Face MoE and keep them in float32.

Routers are found through the model's own `_can_record_outputs["router_logits"]` entry; they return
(logits, weights, indices).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.output_capturing import OutputRecorder

from model.moe.router_form import RouterForm, recognise

BIAS = "e_score_correction_bias"
"""What transformers calls the bias of a router that decides which experts are selected, not their weights."""


@dataclass(frozen=True)
class Router:
    """One MoE layer's router: its name in the model and its module."""

    name: str
    module: nn.Module


@dataclass(frozen=True)
class Routing:
    """What L routers did with a number of tokens.

    confidence: [L, tokens] float32, probability mass of the activated experts, in [0, 1] (report §5.2.3): their scores
        over those of all experts, before any bias; of a softmax router the sum of their probabilities.
    experts: [L, tokens, k], the activated ones, and own: those that the router chose; the same but for replayed tokens.
        In the smallest integer type.
    margin: [L, tokens] float32 ≥ 0, by how much the k-th expert's score, with the bias that the selection looks at, is
        above that of the next one; None if not asked for.
    """

    confidence: Tensor
    experts: Tensor
    own: Tensor
    margin: Tensor | None

    def at(self, tokens: Tensor) -> Routing:
        """At these tokens, in this order; on the CPU."""
        return Routing(**{n: None if x is None else x[:, tokens.to(x.device)].cpu() for n, x in vars(self).items()})

    @staticmethod
    def concatenated(parts: Sequence[Routing]) -> Routing:
        """The tokens of one after those of the other."""
        names = vars(parts[0])
        return Routing(
            **{n: None if names[n] is None else torch.cat([vars(p)[n] for p in parts], dim=1) for n in names}
        )


def find_routers(model: nn.Module) -> list[Router]:
    """The routers in layer order; [] for a dense model."""
    targets: set[type] = set()
    for module in model.modules():
        entry = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits")
        if isinstance(entry, OutputRecorder):
            targets.add(entry.target_class)
    return [Router(name, module) for name, module in model.named_modules() if isinstance(module, tuple(targets))]


class RoutingRecorder:
    """Context manager: hooks every router and remembers what each forward selected.

    Meant to be cheap in a decoding loop: the hook keeps references, `take` does the arithmetic. It comes before a
    `RouterReplay`, whose experts `take` has to be told.
    """

    def __init__(self, model: nn.Module) -> None:
        self.routers = find_routers(model)
        self._records: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in self.routers]
        self._forms: dict[int, RouterForm] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> RoutingRecorder:
        for layer, router in enumerate(self.routers):

            def hook(module: nn.Module, args: Any, output: Any, layer: int = layer) -> None:
                logits, weights, indices = output
                self._records[layer].append((logits.detach(), weights.detach(), indices.detach()))

            self._handles.append(router.module.register_forward_hook(hook, prepend=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.no_grad()
    def take(self, *, margin: bool = False, replayed: tuple[Tensor, Tensor] | None = None) -> Routing | None:
        """Everything since the last call, forwards in order; None if there is nothing (a dense model).

        replayed: (experts [L, tokens, k], known [tokens]), as `RouterReplay.set` was given them.
        """
        if not any(self._records):
            return None
        confidences, margins, activated, chosen = [], [], [], []
        for layer, (router, records) in enumerate(zip(self.routers, self._records, strict=True)):
            logits, weights, own = (_joined([record[i] for record in records]) for i in range(3))
            records.clear()
            if layer not in self._forms:
                self._forms[layer] = recognise(logits, weights, own, router.name)
            scores = self._forms[layer].scores(logits)
            experts = own
            if replayed is not None:
                experts = torch.where(replayed[1].to(own.device)[:, None], replayed[0][layer].to(own), own)
            confidences.append(confidence_of(scores, experts))
            activated.append(experts)
            chosen.append(own)
            if margin:
                margins.append(_margin(scores + getattr(router.module, BIAS, 0.0), own.shape[-1]))
        small = smallest_integer(scores.shape[-1])
        own = torch.stack(chosen).to(small)
        return Routing(
            confidence=torch.stack(confidences),
            experts=own if replayed is None else torch.stack(activated).to(small),
            own=own,
            margin=torch.stack(margins) if margin else None,
        )


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Forwards one after the other, [tokens, …]; a single one is not copied."""
    return parts[0].flatten(0, -2) if len(parts) == 1 else torch.cat([part.flatten(0, -2) for part in parts])


def _margin(scores: Tensor, k: int) -> Tensor:
    """[tokens]: gap between the k-th and the next of scores [tokens, E]; NaN where every expert is active."""
    if k == scores.shape[-1]:
        return scores.new_full(scores.shape[:1], float("nan"))
    best = scores.topk(k + 1, dim=-1).values
    return best[:, -2] - best[:, -1]


def confidence_of(scores: Tensor, experts: Tensor) -> Tensor:
    """Probability mass of the activated experts [tokens], from the scores [tokens, E] of all."""
    return scores.gather(1, experts.long()).sum(1) / scores.sum(1)


def keep_router_fp32(model: nn.Module) -> None:
    """Routers get float32 parameters and a forward that autocast does not touch; call after `.to(bfloat16)`."""
    for router in find_routers(model):
        router.module.float()
        if not isinstance(router.module, _Float32Router):
            router.module.__class__ = _float32_class(type(router.module))


class _Float32Router(nn.Module):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(hidden_states.device.type, enabled=False):
            return super().forward(hidden_states.float(), *args, **kwargs)


@cache
def _float32_class(kind: type[nn.Module]) -> type[nn.Module]:
    # A subclass, not a patched method: a deep copy of the model must not call the original's weights.
    return type(kind.__name__, (_Float32Router, kind), {"__module__": kind.__module__})


def smallest_integer(count: int) -> torch.dtype:
    """The smallest integer type that holds the ids of so many experts."""
    return torch.uint8 if count <= 256 else torch.int16
