"""Load balance of the experts without a loss: a bias that steers the choice, never the weights; and frozen routers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.routing import find_routers

BIAS = "e_score_correction_bias"
"""The buffer of routers that choose by scores + bias and weigh by the scores alone (DeepSeek-V3, Step, GLM, …)."""


@torch.no_grad()
def update_bias(model: nn.Module, load_LE: Tensor, rate: float) -> None:
    """Raise the bias of experts with less than the mean load by `rate`, lower that of those with more, layer by layer.

    load_LE: tokens by MoE layer and expert since the last update, over all ranks, so that every rank does the same.
    ValueError for a router without such a bias.
    """
    routers = find_routers(model)
    without = [router.name for router in routers if getattr(router.module, BIAS, None) is None]
    if without or not routers:
        what = f"{without[0]} has no selection bias" if without else "the model has no routers"
        raise ValueError(f"router.bias_update_rate: {what}; set it to 0")
    expected = (len(routers), len(getattr(routers[0].module, BIAS)))
    assert load_LE.shape == expected, f"load of shape {tuple(load_LE.shape)} for routers of {expected}"
    for router, load_E in zip(routers, load_LE.double(), strict=True):
        bias_E = getattr(router.module, BIAS)
        bias_E += rate * torch.sign(load_E.mean() - load_E).to(bias_E)


def freeze_routers(model: nn.Module) -> None:
    """No parameter of a router learns."""
    for router in find_routers(model):
        router.module.requires_grad_(False)
