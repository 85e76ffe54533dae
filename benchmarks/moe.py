"""What do grouped experts gain, and what does watching the routers cost?

    python benchmarks/moe.py [--preset small] [--turns 9]

Experts of one layer, random tokens: ours against transformers' loop for Step, and against transformers' implementations
for Qwen3-MoE of the same shape. Then what `RoutingRecorder` adds to forwards and decode steps of whole models.
All in float32; ways are measured in turn, and compared within each turn. On the CPU in processor time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle

import torch
from measuring import seconds_in_turn
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts
from writing import table, write_results

from model.build import build_policy
from model.moe.routers import RoutingRecorder, find_routers
from model.presets import preset_config
from model.step.experts import GroupedExperts

TOKENS = (64, 512, 4096)
LOOP = "Step, transformers' loop"
LARGEST_GATHER = 2**29
"""Bytes of weights that batched_mm may copy, one expert per token and choice; above, it is not measured."""

WATCHED = (("tiny", 32, 128, 64, 16), ("small", 4, 128, 16, 8))
"""Preset, sequences × tokens of a forward, sequences × steps of decoding."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="small", help="shape of the experts")
    parser.add_argument("--turns", type=int, default=9)
    options = parser.parse_args()
    if torch.cuda.is_available():
        torch.set_default_device("cuda")
    torch.manual_seed(0)
    sections = [experts_section(options.preset, options.turns), recorder_section(options.turns)]
    path = write_results("moe", "Experts and routers", "\n\n".join(sections), torch.get_num_threads())
    sys.stdout.write(f"{path}\n")


def experts_section(preset: str, turns: int) -> str:
    """Tokens per second of each way, and how often faster than the loop, median over the turns."""
    config = preset_config(preset, pad_token_id=0, eos_token_id=1)
    parts = []
    for backward in (False, True):
        rows: dict[str, list[str]] = {}
        for tokens in TOKENS:
            ways = experts_of(config, tokens, backward)
            seconds = seconds_in_turn(ways, turns)
            for name in (LOOP, *(name for name in seconds if name != LOOP)):
                ratio = statistics.median(a / b for a, b in zip(seconds[LOOP], seconds[name], strict=True))
                cell = f"{tokens / statistics.median(seconds[name]):,.0f} ({ratio:.2f} ×)"
                rows.setdefault(name, ["not measured"] * len(TOKENS))[TOKENS.index(tokens)] = cell
        header = ("experts", *(f"{tokens} tokens" for tokens in TOKENS))
        title = "forward and backward" if backward else "forward"
        parts.append(
            f"### {title[0].upper()}{title[1:]}\n\n{table(header, [[n, *cells] for n, cells in rows.items()])}"
        )
    return (
        f"## Experts of one layer, tokens/s\n\nShape of the preset {preset}: hidden size {config.hidden_size}, "
        f"{config.n_routed_experts} experts of {config.moe_intermediate_size}, {config.num_experts_per_tok} per token, "
        f"float32, random choices; median of {turns} turns, in brackets how often faster than {LOOP}. batched_mm is "
        f"not measured where it would copy more than {LARGEST_GATHER / 2**20:.0f} MiB of weights.\n\n"
        + "\n\n".join(parts)
    )


def experts_of(config: Step3p7TextConfig, tokens: int, backward: bool) -> dict[str, Callable[[], object]]:
    """Each way over the same tokens, choices and weights."""
    x = torch.randn(tokens, config.hidden_size)
    index = torch.randn(tokens, config.n_routed_experts).topk(config.num_experts_per_tok).indices
    weights = torch.rand(tokens, config.num_experts_per_tok)
    qwen = Qwen3MoeConfig(
        hidden_size=config.hidden_size,
        moe_intermediate_size=config.moe_intermediate_size,
        num_experts=config.n_routed_experts,
        num_experts_per_tok=config.num_experts_per_tok,
    )
    modules: dict[str, nn.Module] = {LOOP: Step3p7Experts(config), "Step, ours": GroupedExperts(config)}
    gathered = 3 * config.hidden_size * config.moe_intermediate_size * index.numel() * x.element_size()
    implementations = ("eager", "batched_mm", "grouped_mm", "grouped")
    for name in implementations if gathered <= LARGEST_GATHER else [n for n in implementations if n != "batched_mm"]:
        shape = Qwen3MoeConfig.from_dict(qwen.to_dict())
        shape._experts_implementation = name
        modules[f"Qwen3-MoE, {'ours' if name == 'grouped' else name}"] = Qwen3MoeExperts(shape)
    state = {name: torch.randn(p.shape) * 0.05 for name, p in modules[LOOP].named_parameters()}
    for module in modules.values():
        module.load_state_dict(state)
    return {name: run(module, x, index, weights, backward) for name, module in modules.items()}


def run(experts: nn.Module, x: Tensor, index: Tensor, weights: Tensor, backward: bool) -> Callable[[], object]:
    def forward() -> Tensor:
        with torch.no_grad():
            return experts(x, index, weights)

    def both() -> None:
        inputs = [x.detach().requires_grad_(), weights.detach().requires_grad_()]
        out = experts(inputs[0], index, inputs[1])
        torch.autograd.grad(out.square().sum(), [*inputs, *experts.parameters()])

    return both if backward else forward


def recorder_section(turns: int) -> str:
    """The recorder's own seconds over those of what it watches."""
    rows = []
    for preset, sequences, length, decoded, steps in WATCHED:
        policy, _ = build_policy(preset, None)
        policy.eval()
        ids = torch.randint(7, 100, (max(sequences, decoded), length))
        loads = {
            f"forward, {sequences} × {length} tokens": partial(
                policy, input_ids=ids[:sequences], use_cache=False, logits_to_keep=1
            ),
            f"decode, {decoded} × {steps} tokens": partial(decode, policy, ids[:decoded], steps),
        }
        for name, load in loads.items():
            watched, own = recorder_seconds(policy, load, turns)
            rows.append([preset, name, f"{watched * 1e3:,.0f}", f"{own * 1e3:.2f}", f"{own / watched:.2%}"])
    header = ("preset", "load", "ms", "ms of the recorder", "share")
    return (
        f"## Watching the routers\n\n`RoutingRecorder` with one `take` at the end, on its own: the routers only repeat "
        f"what they returned in the load, with and without it, median of {turns} turns. Target: at most 1 %.\n\n"
        + table(header, rows)
    )


@torch.no_grad()
def recorder_seconds(model: PreTrainedModel, load: Callable[[], object], turns: int) -> tuple[float, float]:
    """Of the load, and what the recorder adds to it. Their difference alone would drown in the load's own noise."""
    watched = statistics.median(seconds_in_turn({"load": load}, turns)["load"])
    routers = [router.module for router in find_routers(model)]
    returned: list[list[object]] = [[] for _ in routers]
    handles = [
        router.register_forward_hook(lambda module, args, output, kept=kept: kept.append(output))
        for router, kept in zip(routers, returned, strict=True)
    ]
    load()
    for handle in handles:
        handle.remove()
    hidden = torch.empty(0)
    for router, kept in zip(routers, returned, strict=True):
        router.forward = partial(again, cycle(kept))

    def repeat() -> None:
        for _ in returned[0]:
            for router in routers:
                router(hidden)

    def watch() -> None:
        with RoutingRecorder(model) as recorder:
            repeat()
            recorder.take()

    seconds = seconds_in_turn({"without": repeat, "with": watch}, turns)
    for router in routers:
        del router.forward
    return watched, statistics.median(b - a for a, b in zip(seconds["without"], seconds["with"], strict=True))


def again(outputs: Iterator[object], hidden: Tensor) -> object:
    """In place of a router's forward."""
    return next(outputs)


def decode(model: PreTrainedModel, ids: Tensor, steps: int) -> None:
    """A short prefill, then one token after the other."""
    output = model(input_ids=ids[:, :8], use_cache=True, logits_to_keep=1)
    for _ in range(steps):
        token = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)


if __name__ == "__main__":
    main()
