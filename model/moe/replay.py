"""Router replay: activate the experts that somebody else chose, with weights from the model's own logits."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from model.moe.router_form import RouterForm, recognise
from model.moe.routers import find_routers


def laid_out(experts: Sequence[Tensor], widths: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """What `RouterReplay.set` takes for sequences that lie one after the other.

    experts: per sequence [positions, L, k], of its first positions; widths: the tokens that each takes, padding
    included, n together. Returns [L, n, k] and bool [n].
    """
    flat = experts[0].new_zeros(sum(widths), *experts[0].shape[1:])
    known = torch.zeros(len(flat), dtype=torch.bool)
    start = 0
    for chosen, width in zip(experts, widths, strict=True):
        flat[start : start + len(chosen)] = chosen
        known[start : start + len(chosen)] = True
        start += width
    return flat.transpose(0, 1).to(device), known.to(device)


class RouterReplay:
    """Hooks every router of a model (report §5.2.3; R3 with the rollout's experts, R2 with those of π_old).

    The router still learns: its logits decide the weights of the experts, only not which they are. ValueError for a
    dense model. A context manager; without one it stays as long as the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.routers = find_routers(model)
        if not self.routers:
            raise ValueError("router.replay: the model has no routers that could be replayed; set it to off")
        self._experts: Tensor | None = None
        self._known: Tensor | None = None
        self._forms: dict[int, RouterForm] = {}
        self._handles = [
            router.module.register_forward_hook(self._hook(layer)) for layer, router in enumerate(self.routers)
        ]

    def set(self, experts: Tensor | None, known: Tensor | None = None) -> None:
        """What the forwards from here on activate, until the next call: gradient checkpointing computes them twice.

        experts: [L, n, k], any integer type, for the n tokens of a forward; None = the routers choose for themselves,
        as they do for tokens whose known [n] bool is false.
        """
        if experts is not None and len(experts) != len(self.routers):
            raise ValueError(
                f"router.replay: experts of {len(experts)} MoE layers are to be replayed in a model that has "
                f"{len(self.routers)}; they were recorded with another model"
            )
        self._experts, self._known = experts, known

    def __enter__(self) -> RouterReplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, layer: int) -> Any:
        def replace(module: nn.Module, args: Any, output: Any) -> Any:
            if self._experts is None:
                return None
            logits, weights, own = output
            if layer not in self._forms:
                self._forms[layer] = recognise(logits, weights, own, self.routers[layer].name)
            experts = self._experts[layer].to(own)
            if self._known is not None:
                experts = torch.where(self._known[:, None], experts, own)
            return logits, self._forms[layer].weights(logits, experts).to(weights.dtype), experts

        return replace
