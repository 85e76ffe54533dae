"""Load balance of the experts without a loss: a bias that steers the choice, never the weights; and frozen routers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.moe.routers import BIAS, find_routers


def selection_biases(model: nn.Module) -> list[Tensor]:
    """The biases [E] by which the routers choose, layer by layer. ValueError for a router without one."""
    routers = find_routers(model)
    without = [router.name for router in routers if getattr(router.module, BIAS, None) is None]
    if without or not routers:
        what = f"{without[0]} has no selection bias" if without else "the model has no routers"
        raise ValueError(f"router.bias_update_rate: {what}; set it to 0")
    return [getattr(router.module, BIAS) for router in routers]


@torch.no_grad()
def update_bias(model: nn.Module, load_LE: Tensor, rate: float) -> None:
    """Raise the bias of experts with less than the mean load by `rate`, lower that of those with more, layer by layer.

    load_LE: tokens by MoE layer and expert since the last update, over all ranks, so that every rank does the same.
    ValueError for a router without such a bias.
    """
    biases = selection_biases(model)
    expected = (len(biases), len(biases[0]))
    assert load_LE.shape == expected, f"load of shape {tuple(load_LE.shape)} for routers of {expected}"
    for bias_E, load_E in zip(biases, load_LE.double(), strict=True):
        bias_E += rate * torch.sign(load_E.mean() - load_E).to(bias_E)


def freeze_routers(model: nn.Module) -> None:
    """No parameter of a router learns."""
    for router in find_routers(model):
        router.module.requires_grad_(False)
