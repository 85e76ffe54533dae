"""Check that a checkpoint holds exactly the tensors of its model, and name what differs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig

from model.step.hub import JOINED, released_names
from model.step.step import StepForCausalLM

Shapes = dict[str, tuple[int, ...]]


class OddTensors(ValueError):
    """Say that a checkpoint does not hold the tensors of its model."""


def check_step_tensors(directory: Path, config: Step3p7TextConfig) -> None:
    """Check a checkpoint's tensors before loading, by the headers of its files.

    The released layout and transformers' own layout (older checkpoints) are known. Files in formats other than
    safetensors are not checked. OddTensors with the names in the files.
    """
    with torch.device("meta"):
        model = StepForCausalLM(config)
    layers = config.num_hidden_layers
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    needed = _released({name: shape for name, shape in own.items() if name not in model.all_tied_weights_keys}, layers)
    tied = _released({name: own[name] for name in model.all_tied_weights_keys}, layers)
    found = _released(_shapes(directory), layers)
    if not found:
        return
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    extra = [name for name in found.keys() - needed.keys() - tied.keys() if not any(p.search(name) for p in ignored)]
    wrong = [(n, found[n], shape) for n, shape in (needed | tied).items() if n in found and found[n] != shape]
    _refuse(str(directory), model, needed.keys() - found.keys(), extra, wrong)


def check_loaded(path: str, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Check transformers' `output_loading_info`. OddTensors for tensors that the model does not declare optional."""
    wrong = [(name, tuple(found), tuple(shape)) for name, found, shape in info["mismatched_keys"]]
    _refuse(path, model, info["missing_keys"], info["unexpected_keys"], wrong)


def _refuse(
    path: str,
    model: PreTrainedModel,
    missing: Iterable[str],
    extra: Iterable[str],
    wrong: Iterable[tuple[str, tuple[int, ...], tuple[int, ...]]],
) -> None:
    """Raise OddTensors if there is a problem. wrong: (name, shape found, shape needed)."""
    kind = type(model).__name__
    shapes = [f"{name} is {list(found)} instead of {list(shape)}" for name, found, shape in wrong]
    problems = [
        f"{words.format(len(names))}: {', '.join(sorted(names)[:5])}{', …' if len(names) > 5 else ''}"
        for words, names in (
            (f"lacks {{}} tensors of {kind}", list(missing)),
            (f"holds {{}} tensors that {kind} does not have", list(extra)),
            (f"holds {{}} tensors of another shape than {kind} with this config.json", shapes),
        )
        if names
    ]
    if problems:
        raise OddTensors(
            f"model.path: {path!r} {'; '.join(problems)}. It is a checkpoint of another model, or its config.json is; "
            "give the directory as it was saved"
        )


def _released(shapes: Shapes, layers: int) -> Shapes:
    """Rename to the released names; a joined tensor becomes its halves."""
    renamed: Shapes = {}
    for name, shape in shapes.items():
        if name.endswith(JOINED) and len(shape) == 3:
            shape = (shape[0], shape[1] // 2, shape[2])
        renamed |= dict.fromkeys(released_names(name, layers), shape)
    return renamed


def _shapes(directory: Path) -> Shapes:
    """Read the shape of every tensor in the safetensors files that transformers would load."""
    index = directory / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if not (directory / names[0]).is_file() and index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    shapes: Shapes = {}
    for path in (directory / name for name in names):
        if path.is_file():
            with safe_open(path, "pt") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes
