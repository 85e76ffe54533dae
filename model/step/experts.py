"""Grouped experts: sort the tokens by expert, then one grouped product per projection."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts


def grouped_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute the experts' weighted sum [n, H], in the dtype of hidden_states [n, H].

    self: experts as transformers stacks them, gate_up_proj [E, 2·F, H] and down_proj [E, H, F], without biases.
    top_k_index [n, k] int, top_k_weights [n, k]: the experts of each token. No host synchronisation, deterministic on
    CPU. The products run in the autocast precision if autocast is on, else in that of the parameters.
    """
    n, k = top_k_index.shape
    device = hidden_states.device
    dtype = self.gate_up_proj.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    flat = top_k_index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    load = torch.zeros(self.num_experts, dtype=torch.int32, device=device)
    load.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
    ends = load.cumsum(0, dtype=torch.int32)

    x = hidden_states.index_select(0, order // k).to(dtype)
    gate_up = F.grouped_mm(x, self.gate_up_proj.to(dtype).transpose(1, 2), offs=ends)
    y = F.grouped_mm(self._apply_gate(gate_up), self.down_proj.to(dtype).transpose(1, 2), offs=ends)

    back = torch.empty_like(order)
    back[order] = torch.arange(n * k, device=device)
    weighted = y.index_select(0, back).view(n, k, y.shape[1]) * top_k_weights[..., None]
    return weighted.sum(1).to(hidden_states.dtype)


class GroupedExperts(Step3p7Experts):
    """Replace the loop of transformers' Step experts; same parameters, same result."""

    forward = grouped_forward
