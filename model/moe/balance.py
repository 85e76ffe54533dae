"""Balance the experts' load without a loss, by the bias of their selection; freeze routers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.moe.routers import find_routers


def selection_biases(model: nn.Module) -> list[Tensor]:
    """List the biases [E] of the routers' selection, layer by layer. ValueError for a router without one."""
    routers = find_routers(model)
    if not routers:
        raise ValueError("router.bias_update_rate: the model has no routers; set it to 0")
    biases = []
    for router in routers:
        bias_E = router.bias
        if bias_E is None:
            raise ValueError(f"router.bias_update_rate: {router.name} has no selection bias; set it to 0")
        biases.append(bias_E)
    return biases


@torch.no_grad()
def update_bias(model: nn.Module, load_LE: Tensor, rate: float) -> None:
    """Raise the bias of experts with less than the mean load by `rate`, lower that of those with more, layer by layer.

    load_LE: tokens by MoE layer and expert since the last update, over all ranks, so that every rank makes the same
    change. ValueError for a router without a selection bias.
    """
    biases = selection_biases(model)
    expected = (len(biases), len(biases[0]))
    assert load_LE.shape == expected, f"load of shape {tuple(load_LE.shape)} for routers of {expected}"
    for bias_E, load_E in zip(biases, load_LE.double(), strict=True):
        bias_E += rate * torch.sign(load_E.mean() - load_E).to(bias_E)


def freeze_routers(model: nn.Module) -> None:
    """Exclude the parameters of all routers from learning."""
    for router in find_routers(model):
        router.module.requires_grad_(False)
