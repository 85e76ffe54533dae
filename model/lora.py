"""Low-rank adapters (LoRA) through peft, put into a model in place."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from model.moe.routers import keep_router_fp32

DRAFT_HEADS = r"mtp\..*"
"""Names of layers without adapters: no log-prob depends on these heads."""
PLACE = ".base_layer."
"""Part of a tensor's name where peft has put an adapter around its layer."""


def add_lora(
    model: PreTrainedModel, rank: int, alpha: float, targets: Sequence[str], dtype: torch.dtype, seed: int
) -> None:
    """Freeze the model and put adapters that learn on its linear layers.

    The model is converted to `dtype`, except its routers; the adapters are in float32. An adapter of a layer
    W [out, in] computes W·x + (alpha/rank)·B·(A·x), A [rank, in] random, B [out, rank] 0.
    targets: names, or ends of names, of layers; none = all linear layers but the output head. Experts that are one
    stacked tensor have none. ValueError without peft, or where no layer has one of these names.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("model.lora.rank: adapters need peft; pip install 'mispo[lora]'") from error
    model.to(dtype)
    keep_router_fp32(model)
    wanted = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(targets) or "all-linear",
        exclude_modules=DRAFT_HEADS if getattr(model, "mtp", None) is not None else None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # the same on every rank
        try:
            inject_adapter_in_model(wanted, model)
        except ValueError as error:
            raise ValueError(f"model.lora.targets: {error}") from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    # Under gradient checkpointing a layer's gradient must find something that wants it before the first adapter.
    model.enable_input_require_grads()


def adapter_parameters(model: PreTrainedModel, rank: int, targets: Sequence[str]) -> int:
    """Count the parameters that `add_lora` would put on a model, which may be on the meta device."""
    head = model.get_output_embeddings()
    return sum(
        rank * (module.in_features + module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not re.fullmatch(DRAFT_HEADS, name)
        and (any(f".{name}".endswith(f".{target}") for target in targets) if targets else module is not head)
    )


def trained(module: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select, from a module's whole tensors by name, those that learn."""
    return {name: weights[name] for name, parameter in module.named_parameters() if parameter.requires_grad}


def load_trained(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load what `trained` returned. ValueError for weights of another module."""
    own = trained(module, module.state_dict())
    odd = sorted(own.keys() ^ weights.keys())
    if odd:
        raise ValueError(f"model.lora: the checkpoint has other adapters: {odd[0]} is in only one of them")
    for name, tensor in weights.items():
        own[name].copy_(tensor)


def has_lora(module: nn.Module) -> bool:
    """Return whether the module has adapters."""
    return any(PLACE in name for name, _ in module.named_parameters())


class MergedWeights(Mapping[str, Tensor]):
    """Present a module's state_dict without adapters: their products are added to the layers, in the layers' precision.

    A layer is merged when it is read, so a second copy of the model never exists. weights: the module's whole tensors
    by name.
    """

    def __init__(self, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights
        self._module = module
        self._names = {name.replace(PLACE, "."): name for name in weights if ".lora_" not in name}

    def __getitem__(self, name: str) -> Tensor:
        own = self._names[name]
        tensor = self._weights[own]
        if not own.endswith(f"{PLACE}weight"):
            return tensor
        layer = own.removesuffix(f"{PLACE}weight")
        a, b = (self._weights[f"{layer}.lora_{side}.default.weight"].float() for side in "AB")
        scaling = self._module.get_submodule(layer).scaling["default"]
        return (tensor.float() + scaling * (b @ a).to(tensor.device)).to(tensor.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
