"""The numbers of `--dry-run`, counted by hand for the preset `tiny`."""

from pathlib import Path

import pytest
import torch

from mispo.commands.plan import Memory, Plan, batch_rows, memory_rows, plan_of
from mispo.config.load import load_config
from mispo.config.schema import MispoConfig

VOCABULARY = 103
FULL = 2 * 128 * 128 + 2 * 128 * 64 + 128 * 4  # q and o of 4 heads × 32, k and v of 2; the last term gates the heads
SLIDING = 2 * 128 * 192 + 2 * 128 * 64 + 128 * 6  # 6 heads
EXPERT = 3 * 128 * 64
MOE = 16 * 128 + (16 + 1) * EXPERT  # router, 16 experts and the shared one
HIDDEN = FULL + 3 * 128 * 384 + 3 * (SLIDING + MOE)
NORMS = 4 * (2 * 128 + 2 * 32) + 128  # of each layer, its queries and keys; and the last one
ENDS = 2 * VOCABULARY * 128
ALL = HIDDEN + ENDS + NORMS
CPU = torch.device("cpu")

SIZES = [
    "recipe=smoke",
    "model.preset=tiny",
    "rollout.prompts_per_step=30",
    "rollout.samples_per_prompt=8",
    "rollout.max_new_tokens=96",
    "data.max_prompt_tokens=32",
    "trainer.steps=10",
    "trainer.tokens_per_microbatch=1000",
]
ADAMW = ["optimizer=adamw"]
MUON = ["optimizer=muon"]
CRITIC_FREE = ["algorithm=grpo"]
LAG_2 = ["rollout.lag=2"]


def config_of(*overrides: str) -> MispoConfig:
    return load_config([*SIZES, *overrides])


def memory_of(*overrides: str, ranks: int = 1) -> Memory:
    memory = plan_of(config_of(*overrides), ranks, CPU).memory
    assert memory is not None
    return memory


def test_adamw_keeps_four_numbers_for_each_parameter_of_actor_and_critic() -> None:
    plan = plan_of(config_of(*ADAMW), 1, CPU)
    assert plan.facts is not None
    assert plan.facts.parameters == ALL
    assert plan.memory == Memory(
        weights=2 * 4 * ALL,
        gradients=2 * 4 * ALL,
        optimizer=2 * 8 * ALL,
        on_host=0,
        rollout_copy=4 * ALL,
        kv_cache=256 * (128 + 3 * 32) * 2 * 64 * 4,  # slots × cells of one full and three sliding layers × k and v
        logits=3 * 4 * 1000 * VOCABULARY,
        reference=0,
        old_weights=0,
        recorded_experts=3 * 4 * 128 * 240,  # layers × top-k × tokens of a step
        attribution=0,
    )
    assert plan.memory.on_device == 2 * 16 * ALL


def test_muon_keeps_one_state_for_hidden_matrices_and_two_for_the_rest() -> None:
    assert memory_of(*MUON).optimizer == 2 * (4 * HIDDEN + 8 * (ENDS + NORMS))


def test_without_a_critic_there_is_one_model() -> None:
    plan = plan_of(config_of(*ADAMW, *CRITIC_FREE), 1, CPU)
    assert plan.batches.minibatches == {"actor": 4}
    assert plan.memory is not None
    assert plan.memory.on_device == 16 * ALL


def test_adapters_learn_on_frozen_weights() -> None:
    plan = plan_of(config_of(*ADAMW, "model.lora.rank=4", "model.lora.targets=[q_proj,v_proj]"), 1, CPU)
    adapters = 4 * ((128 + 128) + (128 + 64)) + 3 * 4 * ((128 + 192) + (128 + 64))
    assert plan.adapters == adapters
    assert plan.memory is not None
    assert plan.memory.weights == 2 * 4 * (ALL + adapters)
    assert plan.memory.gradients == 2 * 4 * adapters
    assert plan.memory.optimizer == 2 * 8 * adapters
    in_bf16 = memory_of(*MUON, "model.lora.rank=4", "model.lora.targets=[q_proj,v_proj]", "trainer.dtype=bf16")
    assert in_bf16.weights == 2 * (2 * ALL + 4 * adapters)
    assert in_bf16.optimizer == 2 * 4 * adapters


def test_draft_heads_learn_only_with_a_weight() -> None:
    head = 3 * 128 + 128 * 256 + SLIDING + 3 * 128 * 384 + 2 * 128 + 2 * 32 + VOCABULARY * 128
    frozen, learning = memory_of(*ADAMW, "model.mtp=2"), memory_of(*ADAMW, "model.mtp=2", "trainer.mtp_weight=0.1")
    assert frozen.weights == learning.weights == 2 * 4 * (ALL + 2 * head)
    assert frozen.gradients == 2 * 4 * ALL
    assert learning.gradients == 2 * 4 * (ALL + 2 * head)


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"), [(0, 1, 1, 1), (1, 1, 1, 4), (2, 1, 4, 4), (3, 4, 4, 4)]
)
def test_zero_divides_over_four_ranks(stage: int, weights: int, gradients: int, optimizer: int) -> None:
    whole, memory = memory_of(*ADAMW), memory_of(*ADAMW, f"trainer.zero_stage={stage}", ranks=4)
    assert memory.weights == whole.weights / weights
    assert memory.gradients == whole.gradients / gradients
    assert memory.optimizer == whole.optimizer / optimizer
    assert memory.recorded_experts == whole.recorded_experts / 4
    assert (memory.rollout_copy, memory.kv_cache) == (whole.rollout_copy, whole.kv_cache)


@pytest.mark.parametrize(("what", "each"), [("optimizer", 8), ("parameters", 12)])
def test_offload_moves_bytes_to_the_host(what: str, each: int) -> None:
    memory = memory_of(*ADAMW, "trainer.zero_stage=3", f"trainer.offload={what}", ranks=4)
    assert memory.on_host == 2 * each * ALL / 4
    assert memory.on_device == 2 * (16 - each) * ALL / 4


def test_a_reference_is_a_whole_copy() -> None:
    assert memory_of(*ADAMW, "algorithm.kl=0.001").reference == 4 * ALL


def test_lag_keeps_the_old_weights_and_attribution_keeps_them_in_float32() -> None:
    kept = memory_of(*ADAMW, *LAG_2, "rollout.dtype=bf16")
    assert kept.old_weights == 3 * 2 * ALL
    assert kept.attribution == 0
    attributed = memory_of(*ADAMW, *LAG_2, "rollout.dtype=bf16", "router.attribute_every=5")
    assert attributed.old_weights == 3 * 4 * ALL
    assert attributed.attribution == 4 * ALL


def test_experts_take_two_bytes_above_256_and_none_without_record() -> None:
    wide = plan_of(config_of(*ADAMW, "model.preset=flash"), 1, CPU)
    assert wide.facts is not None
    assert wide.facts.expert_bytes == 42 * 8 * 2
    assert memory_of(*ADAMW, "router.record=false").recorded_experts == 0


def test_logits_are_bounded_by_a_chunk() -> None:
    assert memory_of(*ADAMW, "trainer.tokens_per_microbatch=1000000").logits == 3 * 64 * 2**20


def test_batches() -> None:
    batches = plan_of(config_of(*ADAMW), 1, CPU).batches
    assert (batches.trajectories, batches.longest, batches.actor_updates) == (240, 128, 40)
    assert batches.minibatches == {"actor": 4, "critic": 12}
    assert batch_rows(batches) == [
        ("trajectories per step", "30 prompts × 8 = 240"),
        ("actor mini-batches", "4 of 60 trajectories, each used once"),
        ("critic mini-batches", "12 of 20 trajectories, each used once"),
        ("longest trajectory", "128 tokens"),
        ("micro-batch", "1000 tokens ≥ 7 of those"),
        ("steps", "10 = 40 actor updates at most"),
    ]


def test_a_checkpoint_that_does_not_open_leaves_the_batches(tmp_path: Path) -> None:
    config = config_of(*ADAMW, "model.preset=null", f"model.path={tmp_path / 'nothing'}", "warm_start.steps=0")
    plan = plan_of(config, 1, CPU)
    assert plan == Plan(plan.batches, problem=plan.problem)
    assert plan.batches.trajectories == 240
    ((name, words),) = memory_rows(plan, config)
    assert name == "unknown"
    assert "no directory" in words
    (tmp_path / "nothing").mkdir()  # without a config.json
    assert plan_of(config, 1, CPU).facts is None


def test_only_what_the_run_has_is_shown() -> None:
    config = config_of(*ADAMW, *CRITIC_FREE, "router.record=false")
    names = [name for name, _ in memory_rows(plan_of(config, 1, CPU), config)]
    assert names == ["parameters", "actor", "rollout copy", "rollout KV cache", "logits", "old weights"]
    everything = config_of(
        *ADAMW,
        *LAG_2,
        "model.lora.rank=4",
        "algorithm.kl=0.1",
        "router.attribute_every=5",
        "trainer.zero_stage=1",
        "trainer.offload=optimizer",
    )
    rows = dict(memory_rows(plan_of(everything, 1, CPU), everything))
    assert rows.keys() == {
        *("parameters", "adapters", "actor + critic", "on the host", "reference policy", "rollout copy"),
        *("rollout KV cache", "experts of the rollout", "attribution", "logits", "old weights"),
    }
    assert rows["rollout KV cache"] == "28 MiB for 256 slots"
