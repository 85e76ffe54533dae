"""Choose the code that multiplies tokens with experts, the same in trainer, rollouts and critic."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from model.step.experts import GroupedExperts, grouped_forward

GROUPED = "grouped"
"""Our name among transformers' implementations (grouped_mm, batched_mm, eager)."""
ALL_EXPERTS_FUNCTIONS.register(GROUPED, grouped_forward)


def use_grouped_experts(model: PreTrainedModel) -> None:
    """Run the experts of a stock model through `grouped_forward`, where it computes the same.

    Otherwise transformers' own choice stays: grouped_mm, or eager for models that offer no choice. grouped_mm equals
    ours except under autocast, where it computes in the precision of the parameters: float32 in the trainer, which is
    slow and differs from the rollout copy in bf16.
    """
    experts = _switchable(model)
    if experts and all(_is_plain(module) for module in experts):
        model.set_experts_implementation(GROUPED)


def experts_in_use(model: PreTrainedModel) -> str | None:
    """Name the implementation; eager = transformers' loop over the experts; None without stacked experts."""
    experts = [module for name, module in model.named_modules() if name.endswith(".experts")]
    if not experts:
        return None
    if all(isinstance(module, GroupedExperts) for module in experts):
        return GROUPED
    return experts[0].config._experts_implementation if _switchable(model) else "eager"


def _switchable(model: PreTrainedModel) -> list[nn.Module]:
    """List experts with transformers' decorator, which look their implementation up at each forward."""
    return [module for module in model.modules() if hasattr(module, "is_transposed") and hasattr(module, "has_gate")]


def _is_plain(experts: nn.Module) -> bool:
    odd = experts.has_bias or experts.is_transposed or getattr(experts, "has_post_expert_norm", False)
    return bool(experts.has_gate) and not odd
