"""Watch the routers of any Hugging Face MoE and keep them in float32.

Routers are found through the model's own `_can_record_outputs["router_logits"]` entry; they return
(logits, weights, indices).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.output_capturing import OutputRecorder


@dataclass(frozen=True)
class Router:
    """One MoE layer's router: its name in the model and its module."""

    name: str
    module: nn.Module


@dataclass(frozen=True)
class Routing:
    """What L routers did with a number of tokens.

    confidence: [L, tokens] float32, probability mass of the activated experts, in [0, 1].
    experts: [L, tokens, k], their ids, in the smallest integer type.
    """

    confidence: Tensor
    experts: Tensor


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

    Meant to be cheap in a decoding loop: the hook keeps references, `take` does the arithmetic.
    """

    def __init__(self, model: nn.Module) -> None:
        self.routers = find_routers(model)
        self._records: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in self.routers]
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> RoutingRecorder:
        for layer, router in enumerate(self.routers):

            def hook(module: nn.Module, args: Any, output: Any, layer: int = layer) -> None:
                logits, weights, indices = output
                self._records[layer].append((logits.detach(), weights.detach(), indices.detach()))

            self._handles.append(router.module.register_forward_hook(hook))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.no_grad()
    def take(self) -> Routing | None:
        """Everything since the last call, forwards in order; None if there is nothing (a dense model)."""
        if not any(self._records):
            return None
        confidence, experts = [], []
        for router, records in zip(self.routers, self._records, strict=True):
            logits, weights, indices = (torch.cat([r[i].flatten(0, -2) for r in records]) for i in range(3))
            confidence.append(routing_confidence(logits, weights, indices, router.name))
            experts.append(indices.to(_smallest_integer(logits.shape[-1])))
            records.clear()
        return Routing(torch.stack(confidence), torch.stack(experts))


def routing_confidence(logits: Tensor, weights: Tensor, indices: Tensor, name: str = "router") -> Tensor:
    """Probability mass of the activated experts (report §5.2.3), [tokens] float32.

    logits [tokens, E] before any bias, weights and indices [tokens, k] as the router returned them.
    Softmax routers: sum of the selected probabilities. Sigmoid routers: sum of the selected scores over the
    sum of all scores. Which one it is shows in the router's own weights, whose proportions are those of the
    selected scores. ValueError if they match neither.
    """
    logits = logits.float()
    distances = {}
    for kind, scores in (("sigmoid", logits.sigmoid()), ("softmax", logits.softmax(-1))):
        selected = scores.gather(1, indices.long())
        distances[kind] = (_proportions(selected) - _proportions(weights.float())).abs().max().item()
        if distances[kind] < 1e-2:
            return selected.sum(1) / scores.sum(1)
    raise ValueError(
        f"{name}: its weights are neither sigmoid nor softmax scores of its logits "
        f"(largest difference {distances}); routing confidence is not defined for it"
    )


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


def _proportions(scores: Tensor) -> Tensor:
    return scores / scores.sum(-1, keepdim=True).clamp_min(1e-20)


def _smallest_integer(count: int) -> torch.dtype:
    return torch.uint8 if count <= 256 else torch.int16
