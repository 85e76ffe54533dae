"""From a preset's name or a checkpoint to a policy and its tokenizer, in float32."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
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
    """The policy, in float32 and training mode, routers kept in float32, experts grouped, and its tokenizer.

    Exactly one of preset (random weights from `seed`) and path (a directory or hub id) is given. mtp: heads of a preset
    that draft further tokens; a checkpoint has those that it has. They come frozen.
    ValueError for an unknown preset, a path that is no causal LM, or a tokenizer without what RL needs.
    """
    if (preset is None) == (path is None):
        raise ValueError("model: set exactly one of model.preset and model.path")
    if preset is not None:
        tokenizer: PreTrainedTokenizerBase = character_tokenizer()
        config = preset_config(
            preset,
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            mtp=mtp,
        )
        config._attn_implementation = attention
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model: PreTrainedModel = StepForCausalLM(config)
    else:
        model, tokenizer = _load(str(path), attention, trust_remote_code)
    keep_router_fp32(model)
    let_drafts_learn(model, False)
    return model.train(), tokenizer


def let_drafts_learn(model: PreTrainedModel, learn: bool) -> None:
    """Whether the heads that draft further tokens, if there are any, have gradients; no log-prob depends on them."""
    heads = getattr(model, "mtp", None)
    if heads is not None:
        heads.requires_grad_(learn)


def _load(path: str, attention: str, trust_remote_code: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
    if looks_local and not Path(path).expanduser().is_dir():
        raise ValueError(f"model.path: no directory {path!r}; give a Hugging Face model directory or a hub id")
    source = str(Path(path).expanduser()) if looks_local else path
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        if looks_local and isinstance(config, Step3p7TextConfig):
            check_step_tensors(Path(source), config)
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=torch.float32,
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,  # we name them
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        check_loaded(source, model, info)
    except OddTensors:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"model.path: {path!r} does not open as a causal LM: {error}") from error
    # The library maps the file, where a tensor begins at any byte, and some kernels round otherwise on such tensors: a
    # resumed run would not be, bit for bit, the run that it continues.
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
