"""Small Step checkpoints, and copies of them with other tensors."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig

from model.moe.routers import find_routers
from model.presets import preset_config
from model.step.step import StepForCausalLM
from model.tokenizer import character_tokenizer

WEIGHTS = "model.safetensors"
VARIANTS = {
    "as it is": {},
    "limits": {"swiglu_limits": [None, 0.0, 0.0, 7.0], "swiglu_limits_shared": [None, 0.0, 16.0, 16.0]},
    "MTP": {"num_nextn_predict_layers": 2},
    "llama3 positions": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 2.0,
            "original_max_position_embeddings": 512,
            "low_freq_factor": 1.0,
            "high_freq_factor": 32.0,
        },
    },
}


def variant(name: str) -> StepForCausalLM:
    """The micro preset with other settings, and a router bias that is not zero."""
    shape = preset_config("micro", vocab_size=104, pad_token_id=0, eos_token_id=1).to_dict()
    settings = VARIANTS[name]
    if "rope_scaling" in settings:
        shape["rope_parameters"]["full_attention"] |= settings["rope_scaling"]
    else:
        shape |= settings
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = StepForCausalLM(Step3p7TextConfig(**shape)).eval()
        for router in find_routers(model):
            router.module.e_score_correction_bias.normal_()
    return model


def saved(model: StepForCausalLM, directory: Path) -> Path:
    model.save_pretrained(directory)
    character_tokenizer().save_pretrained(directory)
    return directory


def changed(micro: Path, directory: Path, **tensors: Tensor | None) -> Path:
    """A copy with tensors set, or taken out."""
    weights = load_file(micro / WEIGHTS) | tensors
    directory.mkdir(exist_ok=True)
    for file in micro.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    save_file({n: t for n, t in weights.items() if t is not None}, directory / WEIGHTS, {"format": "pt"})
    return directory
