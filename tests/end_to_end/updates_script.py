"""Run by test_updates.py in separate processes: a few updates on a fixed batch, results written to a file.

Arguments: OUT STAGE ROUNDS [--load CHECKPOINTS] [--save CHECKPOINTS] [--nan yes] [--max-skipped N] [--unused yes]
[--rehearse yes] [--deaf yes] [--offload optimizer|parameters] [--deepspeed FILE]
[--checkpointing yes] [--packed yes] [--optimizer muon]
"""

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from deepspeed.utils import z3_leaf_module
from torch import Tensor

from mispo.algorithm.loss import mispo_loss
from mispo.algorithm.method import ValueTargets
from mispo.algorithm.objective import Objective, Samples
from mispo.config.parts import AdamW, Muon
from mispo.config.schema import TrainerConfig
from mispo.system.rundir import RunDir
from mispo.trainer.batch import Layout, Packing, pack
from mispo.trainer.checkpoint.files import newest_checkpoint
from mispo.trainer.checkpoint.states import Checkpoints
from mispo.trainer.engine import build_engines, start_ranks
from mispo.trainer.history import WeightHistory
from mispo.trainer.learner import Learner
from mispo.trainer.policy import ActorModule, CriticModule, checkpoint_layers
from mispo.trainer.publish import Publisher, full_weights
from mispo.trainer.rehearsal import rehearse
from mispo.trainer.scoring import PolicyScores, Scores, score_policy, score_values
from model.build import build_policy
from model.critic import Critic
from model.facts import count_flops
from rollouts.native.engine import NativeEngine
from rollouts.sampler import published
from rollouts.trajectory import Prompt, Trajectory, Turn
from support.batches import method_of, settings_of, targets_of

TRAJECTORIES = 13


class DeafEngine(NativeEngine):
    """Says that it took the weights, and goes on with the old ones, as real engines were seen to do."""

    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        self.weight_version = version


def trajectory(number: int, generator: torch.Generator) -> Trajectory:
    prompt, length = (int(torch.randint(low, high, (1,), generator=generator)) for low, high in ((3, 9), (1, 30)))
    return Trajectory(
        prompt=Prompt(torch.randint(7, 90, (prompt,), generator=generator), "q", "a", {}, number),
        sample=0,
        seed=0,
        completion_ids=torch.randint(7, 90, (length,), generator=generator),
        action_mask=torch.ones(length, dtype=torch.bool),
        rollout_logprobs=-torch.rand(length, generator=generator) - 4,
        turns=(Turn((0, length), 0, "stop"),),
        finish_reason="length" if number % 3 == 0 else "stop",
        weight_version=0,
        routing_confidence=None,
        routed_experts=None,
        completion="",
        reward=float(number % 2),
    )


def main() -> None:
    out, stage, rounds, *rest = sys.argv[1:]
    flags = dict(zip(rest[::2], rest[1::2], strict=True))
    config = TrainerConfig(
        zero_stage=int(stage),
        actor_lr=1e-3,
        critic_lr=1e-3,
        actor_warmup_updates=1,
        critic_warmup_updates=1,
        offload=flags.get("--offload", "none"),
        deepspeed=flags.get("--deepspeed"),
        max_skipped_updates=int(flags.get("--max-skipped", "100")),
    )
    optimizer = Muon() if flags.get("--optimizer") == "muon" else AdamW()
    layout = Layout(100, packed="--packed" in flags)
    accelerator, ranks = start_ranks(config, optimizer)
    torch.manual_seed(0)
    policy, tokenizer = build_policy("micro", None, seed=0)
    critic_model = Critic.from_policy(policy, 1e-2, 0)
    checkpoint = newest_checkpoint(Path(flags["--load"]))[0] if "--load" in flags else None
    if checkpoint:
        from safetensors.torch import load_file

        policy, tokenizer = build_policy(None, str(checkpoint / "actor"))
        critic_model.load_state_dict(load_file(checkpoint / "critic.safetensors"))
    copy, _ = build_policy("micro", None, seed=0)
    if "--unused" in flags:
        policy.forgotten = torch.nn.Parameter(torch.ones(3))
    calls = []
    policy.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    if "--checkpointing" in flags:
        checkpoint_layers(policy, int(stage))
        checkpoint_layers(critic_model.backbone, int(stage))
    flops = {"actor": count_flops(policy), "critic": count_flops(critic_model.backbone)}
    actor, critic = build_engines(
        accelerator,
        ranks,
        ActorModule(policy, torch.float32),
        CriticModule(critic_model, torch.float32),
        config,
        optimizer,
        flops,
    )
    engine = DeafEngine(copy, [1], 0, 4) if "--deaf" in flags else NativeEngine(copy, [1], 0, 4)
    if "--rehearse" in flags:
        rehearse(actor, 30, layout, 90)
        rehearse(critic, 30, layout, 90)
    publisher = Publisher(
        actor,
        WeightHistory(0),
        probe=[torch.arange(7, 15)],
        packed=layout.packed,
        temperature=1.0,
        convert=engine.converted,
    )
    packing = Packing("bootstrap", TRAJECTORIES, samples_per_prompt=1, penalty=lambda length: 0.0)
    settings = settings_of(layout, temperature=1.0, actor_minibatches=2, critic_minibatches=3)
    learner = Learner(ranks, actor, critic, None, publisher, packing, settings, False, 0, 0.0, 0)
    directory = RunDir(Path(flags.get("--save", "nowhere/checkpoints")).parent)
    registered = {"learner": learner}
    checkpoints = Checkpoints(directory, learner, tokenizer, registered, keep_last=1, keep_best=0, last=None)
    if checkpoint:
        checkpoints.restore(checkpoint)

    generator = torch.Generator().manual_seed(1)
    everything = [trajectory(number, generator) for number in range(TRAJECTORIES)]
    mine = ranks.share(TRAJECTORIES)
    places = torch.tensor(list(mine), dtype=torch.int64)
    batch = pack([everything[i] for i in mine], places, packing, step=1, version=0, ranks=ranks)
    tokens = int(batch.offsets_B1[-1])
    included = torch.ones(tokens, dtype=torch.bool)
    advantages = torch.sin(batch.rollout_logprobs_N * 7)
    if "--nan" in flags:
        advantages = advantages * float("nan")
    weights = (torch.cos(batch.rollout_logprobs_N * 9) > -0.5).float()
    method, updates = method_of(Objective(mispo_loss, "tokens", 30, 0.0, 0.0)), []
    for number in range(int(rounds)):
        batch = replace(batch, step=1 + number + actor.updates * 100)
        targets = targets_of(
            Samples(torch.zeros(tokens), advantages, weights, included), ValueTargets(advantages, advantages, included)
        )
        updates += learner.update_critic(batch, targets.values)
        unscored = Scores(PolicyScores(torch.zeros(tokens), torch.zeros(tokens), None), None, None)
        updates += learner.update_actor(batch, unscored, targets, method)
    published(engine, learner.due_weights(), temperature=1.0, tolerance=1e-4)
    scores, _ = score_policy(actor, batch, layout, 1.0)
    values = score_values(critic, batch, layout)
    result = {
        "losses": torch.tensor([update.loss for update in updates]),
        "norms": torch.tensor([update.grad_norm for update in updates]),
        "applied": torch.tensor([update.applied for update in updates]),
        "logprobs": scores.logprobs_N,
        "bootstrap": ranks.gather(values.bootstrap_B, batch.position_B, TRAJECTORIES),
        "actor": full_weights(actor, actor.module.policy),
        "critic": full_weights(critic, critic.module.critic),
        "states": actor.states.read() if actor.updates else {},
        "calls": len(calls),
        "leaves": sum(z3_leaf_module(part) for part in actor.module.modules()),
        "stop": (actor.updates, critic.updates),
    }
    if "--save" in flags:
        checkpoints.save(1)
    if ranks.first:
        torch.save(result, out)
    ranks.leave()


main()
