"""Scoring and actor updates of a load, in a process of their own; trainer.py starts it.

    python benchmarks/training.py OUT LOAD

Times from token ids to the last optimizer update: packing, the old log-probs, group advantages, PPO's loss over four
(or `minibatches`) updates. Writes one `Measured` of each layout to the file OUT, as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from load import Load, Measured, loads, sequences
from measuring import in_use_mib, peak_mib, synchronize
from torch import Tensor
from transformers import PreTrainedModel

from mispo.algorithm.method import Outcome
from mispo.algorithm.segments import segment_mean
from mispo.build.algorithm import build_method
from mispo.config.load import load_config
from mispo.config.parts import AdamW, Muon
from mispo.config.schema import TrainerConfig
from mispo.trainer.batch import Layout, Packing, pack
from mispo.trainer.engine import TrainEngine, build_engines, start_ranks
from mispo.trainer.policy import ActorModule, checkpoint_layers, compute_dtype
from mispo.trainer.scoring import score_policy
from mispo.trainer.update import UpdateSettings, actor_updates, propose
from model.build import build_policy
from model.facts import count_flops, peak_flops
from model.moe.routers import keep_router_fp32
from model.presets import preset_config
from model.step.step import StepForCausalLM
from model.tokenizer import character_tokenizer
from rollouts.trajectory import Prompt, Trajectory, Turn

GRPO = ("algorithm=grpo", "algorithm.loss_norm=tokens")
"""Group advantages, PPO's loss, every token counts the same."""


def main() -> None:
    out, text = sys.argv[1:]
    load = loads(text)
    config = TrainerConfig(zero_stage=load.zero_stage, dtype=load.dtype, actor_lr=0.0)
    optimizer = Muon() if load.optimizer == "muon" else AdamW()
    accelerator, ranks = start_ranks(config, optimizer)
    everything = trajectories(load)
    share = ranks.share(len(everything))
    before = in_use_mib()
    policy = build(load)
    forward = count_flops(policy)
    parameters = sum(p.numel() for p in policy.parameters())
    if load.checkpointing:
        checkpoint_layers(policy, load.zero_stage)
    module = ActorModule(policy, compute_dtype(load.dtype, ranks.device))
    actor, _ = build_engines(accelerator, ranks, module, None, config, optimizer, {"actor": forward})
    layouts = {name: Layout(load.tokens_per_microbatch, name == "packed") for name in load.layouts}
    run = partial(step, actor, everything[share.start : share.stop], torch.tensor(list(share)), load)
    first = {name: run(layout).logprobs for name, layout in layouts.items()}
    states = in_use_mib() - before
    peaks = {name: peak_mib(partial(run, layout)) for name, layout in layouts.items()}
    times: dict[str, list[Times]] = {name: [] for name in layouts}
    for _ in range(load.rounds):
        for name, layout in layouts.items():
            times[name].append(run(layout))
    flops = sum(len(t) * forward.per_token(len(t)) for t in map(whole, everything))
    peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    measured = {
        name: Measured(
            score_s=[t.score_s for t in times[name]],
            update_s=[t.update_s for t in times[name]],
            peak_mib=peaks[name],
            states_mib=states,
            score_flops=flops,
            update_flops=3 * flops,
            card_flops=peak and peak * ranks.size,
            parameters=parameters,
            threads=torch.get_num_threads(),
            logprobs=first[name],
        )
        for name in layouts
    }
    if ranks.first:
        Path(out).write_text(json.dumps({name: asdict(found) for name, found in measured.items()}))
    ranks.leave()


def build(load: Load) -> PreTrainedModel:
    """The policy; a preset with as many positions as the load needs."""
    if load.model:
        return build_policy(None, load.model, attention=load.attention)[0]
    tokenizer = character_tokenizer()
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = preset_config(str(load.preset), vocab_size=len(tokenizer), **ends)
    config.max_position_embeddings = max(config.max_position_embeddings, load.longest)
    config._attn_implementation = load.attention
    torch.manual_seed(load.seed)
    policy = StepForCausalLM(config)
    keep_router_fp32(policy)
    return policy.train()


def trajectories(load: Load) -> list[Trajectory]:
    """Those of the load; their rollout log-probs are not read."""
    return [
        Trajectory(
            prompt=Prompt(torch.tensor(s.prompt_ids), "", "", {}, s.group),
            sample=number % load.samples_per_prompt,
            seed=0,
            completion_ids=torch.tensor(s.completion_ids),
            action_mask=torch.ones(len(s.completion_ids), dtype=torch.bool),
            rollout_logprobs=torch.zeros(len(s.completion_ids)),
            turns=(Turn((0, len(s.completion_ids)), 0, "stop"),),
            finish_reason="stop",
            weight_version=0,
            routing_confidence=None,
            routed_experts=None,
            completion="",
            reward=s.reward,
        )
        for number, s in enumerate(sequences(load))
    ]


def whole(trajectory: Trajectory) -> Tensor:
    """Prompt and completion."""
    return torch.cat([trajectory.prompt_ids, trajectory.completion_ids])


@dataclass(frozen=True)
class Times:
    """Seconds of one step; mean old log-prob of each trajectory."""

    score_s: float
    update_s: float
    logprobs: list[float]


def step(actor: TrainEngine, mine: list[Trajectory], positions_B: Tensor, load: Load, layout: Layout) -> Times:
    """One step of GRPO without its rollouts, on this rank's trajectories."""
    clock = [now(actor)]
    prompts = len(load.lengths) // load.samples_per_prompt
    packing = Packing("mask", prompts, load.samples_per_prompt, penalty=lambda length: 0.0)
    batch = pack(mine, positions_B, packing, step=1, version=0, ranks=actor.ranks)
    scores, _ = score_policy(actor, batch, layout, 1.0)
    clock.append(now(actor))
    outcome = Outcome(
        rewards_B=batch.rewards_B,
        penalties_B=batch.penalties_B,
        truncated_B=batch.truncated_B,
        included_B=batch.included_B,
        values_N=None,
        bootstrap_B=None,
        reference_N=None,
        reduce=actor.ranks.sum,
    )
    method = build_method(load_config(GRPO), (0.0, 1.0))
    targets = method.targets(propose(batch, scores.logprobs_N, 0), outcome)
    settings = UpdateSettings(layout, 0, 1.0, load.minibatches, 1, None, 1.0, 0.0)
    list(actor_updates(actor, batch, targets, method, settings))
    clock.append(now(actor))
    means = segment_mean(scores.logprobs_N, batch.offsets_B1).tolist()
    return Times(clock[1] - clock[0], clock[2] - clock[1], means)


def now(actor: TrainEngine) -> float:
    """Seconds on a clock, once everything that was started is done on every rank."""
    synchronize()
    actor.ranks.barrier()
    return time.perf_counter()


if __name__ == "__main__":
    main()
