"""Record what the routers of any Hugging Face MoE select, and keep them in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from model.moe.families import Router, family_of, router_classes


@dataclass(frozen=True)
class Routing:
    """Hold what L routers did with a number of tokens.

    confidence: [L, tokens] float32, probability mass of the activated experts, in [0, 1] (report §5.2.3): their scores
        over those of all experts, before any bias; of a softmax router the sum of their probabilities.
    experts: [L, tokens, k], the activated ones, in the smallest integer type.
    own: [L, tokens, k], those that the router chose; differs from experts at replayed tokens only.
    margin: [L, tokens] float32 ≥ 0, by how much the k-th expert's score, with the bias of the selection, is above that
        of the next one; None if it was not requested.
    """

    confidence: Tensor
    experts: Tensor
    own: Tensor
    margin: Tensor | None

    def at(self, tokens: Tensor) -> Routing:
        """Select these tokens, in this order, on the CPU."""

        def picked(x: Tensor) -> Tensor:
            return x[:, tokens.to(x.device)].cpu()

        margin = None if self.margin is None else picked(self.margin)
        return Routing(picked(self.confidence), picked(self.experts), picked(self.own), margin)

    @staticmethod
    def concatenated(parts: Sequence[Routing]) -> Routing:
        """Join along the tokens. All parts have margins, or none has."""
        margins = [part.margin for part in parts if part.margin is not None]
        return Routing(
            confidence=torch.cat([part.confidence for part in parts], dim=1),
            experts=torch.cat([part.experts for part in parts], dim=1),
            own=torch.cat([part.own for part in parts], dim=1),
            margin=torch.cat(margins, dim=1) if margins else None,
        )


def find_routers(model: nn.Module) -> list[Router]:
    """List the routers in layer order; [] for a dense model."""
    classes = router_classes(model)
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, classes)]
    return [
        Router(name, module, model.get_submodule(name.rpartition(".")[0]), family_of(module)) for name, module in found
    ]


class RoutingRecorder:
    """Context manager that hooks every router and keeps what each forward selected.

    It is cheap in a decoding loop: the hook keeps references, `take` does the arithmetic. Its hooks run before those of
    a `RouterReplay`, so `take` needs the replayed experts.
    """

    def __init__(self, model: nn.Module) -> None:
        self.routers = find_routers(model)
        self._records: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in self.routers]
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> RoutingRecorder:
        for layer, router in enumerate(self.routers):
            hook = partial(_record, router, self._records[layer])
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
        """Return everything since the last call, forwards in order; None if there is nothing (a dense model).

        margin: compute the margins too. replayed: the arguments (experts [L, tokens, k], known [tokens]) of
        `RouterReplay.set`.
        """
        if not any(self._records):
            return None
        confidences, margins, activated, chosen = [], [], [], []
        for layer, (router, records) in enumerate(zip(self.routers, self._records, strict=True)):
            logits, weights, own = (_joined([record[i] for record in records]) for i in range(3))
            records.clear()
            scores = router.form(logits, weights, own).scores(logits)
            experts = own
            if replayed is not None:
                experts = torch.where(replayed[1].to(own.device)[:, None], replayed[0][layer].to(own), own)
            confidences.append(confidence_of(scores, experts))
            activated.append(experts)
            chosen.append(own)
            if margin:
                margins.append(_margin(scores if router.bias is None else scores + router.bias, own.shape[-1]))
        small = smallest_integer(scores.shape[-1])
        own = torch.stack(chosen).to(small)
        return Routing(
            confidence=torch.stack(confidences),
            experts=own if replayed is None else torch.stack(activated).to(small),
            own=own,
            margin=torch.stack(margins) if margin else None,
        )


def _record(
    router: Router, records: list[tuple[Tensor, Tensor, Tensor]], module: nn.Module, args: object, output: Any
) -> None:
    logits, weights, experts = router.read(output)
    records.append((logits.detach(), weights.detach(), experts.detach()))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Join forwards along the tokens, [tokens, …]; a single one is not copied."""
    return parts[0].flatten(0, -2) if len(parts) == 1 else torch.cat([part.flatten(0, -2) for part in parts])


def _margin(scores: Tensor, k: int) -> Tensor:
    """Return the gap [tokens] between the k-th and the next of scores [tokens, E]; NaN where every expert is active."""
    if k == scores.shape[-1]:
        return scores.new_full(scores.shape[:1], float("nan"))
    best = scores.topk(k + 1, dim=-1).values
    return best[:, -2] - best[:, -1]


def confidence_of(scores: Tensor, experts: Tensor) -> Tensor:
    """Return the probability mass [tokens] of the activated experts, from the scores [tokens, E] of all."""
    return scores.gather(1, experts.long()).sum(1) / scores.sum(1)


def keep_router_fp32(model: nn.Module) -> None:
    """Give routers float32 parameters and a forward that autocast does not touch; call it after `.to(bfloat16)`."""
    for router in find_routers(model):
        router.to_float32()
        if not isinstance(router.module, _Float32Router):
            router.module.__class__ = _float32_class(type(router.module))


class _Float32Router(nn.Module):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(hidden_states.device.type, enabled=False):
            return super().forward(hidden_states.float(), *args, **kwargs)


_FLOAT32: dict[type[nn.Module], type[nn.Module]] = {}
"""By class of routers."""


def _float32_class(kind: type[nn.Module]) -> type[nn.Module]:
    # A subclass, not a patched method: a deep copy of the model must not call the original's weights.
    if kind not in _FLOAT32:
        _FLOAT32[kind] = type(kind.__name__, (_Float32Router, kind), {"__module__": kind.__module__})
    return _FLOAT32[kind]


def smallest_integer(count: int) -> torch.dtype:
    """Return the smallest integer type that holds the ids of `count` experts."""
    return torch.uint8 if count <= 256 else torch.int16
