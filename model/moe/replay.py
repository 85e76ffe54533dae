"""Router replay: activate given experts, with weights from the model's own logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from model.moe.families import Router
from model.moe.routers import find_routers


def laid_out(experts: Sequence[Tensor], widths: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Lay out the arguments of `RouterReplay.set` for sequences that lie one after the other.

    experts: per sequence [positions, L, k], of its first positions; widths: tokens of each with its padding, n
    together. Returns experts [L, n, k] and known, bool [n].
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
    """Hook every router of a model so that it activates given experts (report §5.2.3).

    R3 replays the rollout's experts, R2 those of π_old. The router still learns: its logits decide the weights of the
    experts, but not which they are. ValueError for a dense model. As a context manager it removes its hooks at the end;
    otherwise they stay.
    """

    def __init__(self, model: nn.Module) -> None:
        self.routers = find_routers(model)
        if not self.routers:
            raise ValueError("router.replay: the model has no routers that could be replayed; set it to off")
        self._experts: Tensor | None = None
        self._known: Tensor | None = None
        self._handles = [
            router.module.register_forward_hook(self._hook(layer, router)) for layer, router in enumerate(self.routers)
        ]

    def set(self, experts: Tensor | None, known: Tensor | None = None) -> None:
        """Set what the next forwards activate, until the next call: gradient checkpointing computes a layer twice.

        experts: [L, n, k], any integer type, for the n tokens of a forward; None = the routers choose. known: bool [n],
        false for tokens whose experts the routers choose. ValueError for another number of MoE layers.
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

    def _hook(self, layer: int, router: Router) -> Callable[..., tuple[Tensor, ...] | None]:
        def replace(module: nn.Module, args: object, output: Any) -> tuple[Tensor, ...] | None:
            if self._experts is None:
                return None
            logits, weights, own = router.read(output)
            form = router.form(logits, weights, own)
            experts = self._experts[layer].to(own)
            if self._known is not None:
                experts = torch.where(self._known[:, None], experts, own)
            return router.changed(output, form.weights(logits, experts).to(weights.dtype), experts)

        return replace
