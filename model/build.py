"""Build a policy in float32, and its tokenizer, from a preset's name or a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig

from model.checks import OddTensors, check_loaded, check_step_tensors
from model.moe.dispatch import use_grouped_experts
from model.moe.routers import keep_router_fp32
from model.presets import preset_config
from model.step.step import StepForCausalLM
from model.tokenizer import character_tokenizer


def build_policy(
    preset: str | None,
    path: str | None,
    *,
    seed: int = 0,
    mtp: int = 0,
    attention: str = "sdpa",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Build the policy, in float32 and training mode, with routers kept in float32 and grouped experts.

    Exactly one of preset (random weights from `seed`) and path (a directory or hub id) is given. mtp: heads of a preset
    that draft further tokens; a checkpoint keeps the heads that it has. They come frozen.
    ValueError for an unknown preset, a path that is no causal LM, or a tokenizer without what RL needs.
    """
    if (preset is None) == (path is None):
        raise ValueError("model: set exactly one of model.preset and model.path")
    if preset is not None:
        config, tokenizer = _preset(preset, mtp)
        config._attn_implementation = attention
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model: PreTrainedModel = StepForCausalLM(config)
    else:
        model, tokenizer = _load(str(path), attention, trust_remote_code)
    keep_router_fp32(model)
    let_drafts_learn(model, False)
    return model.train(), tokenizer


def build_shape(
    preset: str | None, path: str | None, *, mtp: int = 0, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Build the policy of `build_policy` on the meta device, from its config alone, to count its parameters.

    ValueError or OSError for a preset or a path without a config of a causal LM.
    """
    if preset is not None:
        config: PreTrainedConfig = _preset(preset, mtp)[0]
    else:
        config = AutoConfig.from_pretrained(_source(str(path))[0], trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    let_drafts_learn(model, False)
    return model


def let_drafts_learn(model: PreTrainedModel, learn: bool) -> None:
    """Set whether the heads that draft further tokens, if any, have gradients; no log-prob depends on them."""
    heads = getattr(model, "mtp", None)
    if heads is not None:
        heads.requires_grad_(learn)


def _preset(preset: str, mtp: int) -> tuple[Step3p7TextConfig, PreTrainedTokenizerBase]:
    tokenizer = character_tokenizer()
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    return preset_config(preset, vocab_size=len(tokenizer), mtp=mtp, **ends), tokenizer


def _source(path: str) -> tuple[str, bool]:
    """Return what transformers opens, and whether it is a directory. ValueError for one that does not exist."""
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
    if looks_local and not Path(path).expanduser().is_dir():
        raise ValueError(f"model.path: no directory {path!r}; give a Hugging Face model directory or a hub id")
    return str(Path(path).expanduser()) if looks_local else path, looks_local


def _load(path: str, attention: str, trust_remote_code: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    source, looks_local = _source(path)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        if looks_local and isinstance(config, Step3p7TextConfig):
            check_step_tensors(Path(source), config)
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=torch.float32,
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,  # check_loaded names them
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        check_loaded(source, model, info)
    except OddTensors:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"model.path: {path!r} does not open as a causal LM: {error}") from error
    # The library maps the file, where a tensor begins at any byte, and some kernels round differently on such tensors:
    # a resumed run would not equal, bit for bit, the run that it continues.
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    use_grouped_experts(model)
    if tokenizer.chat_template is None:
        raise ValueError(f"model.path: the tokenizer of {path!r} has no chat template; give an instruct model")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model.path: the tokenizer of {path!r} has no end token (eos_token)")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer
