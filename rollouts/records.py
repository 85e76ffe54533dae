"""Trajectories on disk: all of a step's as parquet, a few traces for the report as JSON lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mispo.system.files import json_line, replacing
from rollouts.trajectory import Prompt, Trajectory, Turn

TURN = pa.struct(
    [
        ("start", pa.int32()),
        ("stop", pa.int32()),
        ("weight_version", pa.int64()),
        ("finish_reason", pa.string()),
    ]
)
"""One of a trajectory's turns: tokens start … stop−1 of the completion."""

ROLLOUT_FIELDS = pa.schema(
    [
        ("question", pa.string()),
        ("answer", pa.string()),
        ("completion", pa.string()),
        ("finish_reason", pa.string()),
        ("reward", pa.float64()),
        ("outcome", pa.string()),
        ("message", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.int32())),
        ("action_mask", pa.list_(pa.bool_())),
        ("rollout_logprobs", pa.list_(pa.float32())),
        ("routing_confidence", pa.list_(pa.float32())),
        ("routed_experts", pa.list_(pa.int16())),
        ("turns", pa.list_(TURN)),
        ("reward_parts", pa.map_(pa.string(), pa.float64())),
        ("weight_version", pa.int64()),
        ("seed", pa.int64()),
        ("index", pa.int64()),
        ("sample", pa.int64()),
    ]
)
"""Columns of a rollouts file, one row per trajectory; those of the caller follow.

routed_experts: [P+T−1, MoE layers, k], flat; there are as many MoE layers as in routing_confidence.
"""

SAMPLE_KEYS = ("question", "answer", "completion", "reward")
"""Keys that every row of a file of traces has."""


def save_rollouts(path: Path, trajectories: Sequence[Trajectory], columns: Mapping[str, Sequence[object]]) -> None:
    """Write one row per trajectory, in order; atomic.

    columns: further values by name, one per trajectory (advantage_mean, accepted, log_rho, …).
    Raises ValueError if such a column has the wrong length or the name of a built-in one.
    """
    for name, values in columns.items():
        if name in ROLLOUT_FIELDS.names:
            raise ValueError(f"rollouts column {name!r} exists already; choose another name")
        if len(values) != len(trajectories):
            raise ValueError(f"rollouts column {name!r}: {len(values)} values, {len(trajectories)} trajectories")
    table = pa.Table.from_pylist([_record(trajectory) for trajectory in trajectories], schema=ROLLOUT_FIELDS)
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def load_rollouts(path: Path) -> list[Trajectory]:
    """Load the trajectories of a rollouts file, in order; of the data row only question and answer are kept.

    ValueError if it is no such file, or one of another version.
    """
    try:
        return [_trajectory(row) for row in pq.read_table(path, columns=ROLLOUT_FIELDS.names).to_pylist()]
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} does not read as rollouts of this version of mispo ({reason})") from error


def load_positions(path: Path) -> list[int]:
    """Load the number of each trajectory of a rollouts file within its step, over all ranks."""
    positions: list[int] = pq.read_table(path, columns=["position"])["position"].to_pylist()
    return positions


def _trajectory(row: Mapping[str, Any]) -> Trajectory:
    prompt_ids, completion_ids = (
        torch.tensor(row[name], dtype=torch.int64) for name in ("prompt_ids", "completion_ids")
    )
    confidence, experts = row["routing_confidence"], row["routed_experts"]
    if experts is not None:
        positions, layers = len(prompt_ids) + len(completion_ids) - 1, len(confidence)
        if len(experts) % (positions * layers):
            raise ValueError(f"{len(experts)} routed experts do not belong to {positions} positions × {layers} layers")
        experts = torch.tensor(experts, dtype=torch.int16).reshape(positions, layers, -1)
    return Trajectory(
        prompt=Prompt(prompt_ids, row["question"], row["answer"], {}, row["index"]),
        sample=row["sample"],
        seed=row["seed"],
        completion_ids=completion_ids,
        action_mask=torch.tensor(row["action_mask"], dtype=torch.bool),
        rollout_logprobs=torch.tensor(row["rollout_logprobs"], dtype=torch.float32),
        turns=tuple(Turn((t["start"], t["stop"]), t["weight_version"], t["finish_reason"]) for t in row["turns"]),
        finish_reason=row["finish_reason"],
        weight_version=row["weight_version"],
        routing_confidence=None if confidence is None else torch.tensor(confidence, dtype=torch.float32),
        routed_experts=experts,
        completion=row["completion"],
        reward=row["reward"],
        reward_info={"outcome": row["outcome"], "message": row["message"]},
        reward_parts=dict(row["reward_parts"]),
    )


def _record(trajectory: Trajectory) -> dict[str, Any]:
    confidence, experts = trajectory.routing_confidence, trajectory.routed_experts
    return {
        "question": trajectory.prompt.text,
        "answer": trajectory.prompt.answer,
        "completion": trajectory.completion,
        "finish_reason": trajectory.finish_reason,
        "reward": trajectory.reward,
        "outcome": trajectory.reward_info.get("outcome"),
        "message": trajectory.reward_info.get("message"),
        "prompt_ids": trajectory.prompt_ids.cpu().numpy(),
        "completion_ids": trajectory.completion_ids.cpu().numpy(),
        "action_mask": trajectory.action_mask.cpu().numpy(),
        "rollout_logprobs": trajectory.rollout_logprobs.cpu().numpy(),
        "routing_confidence": None if confidence is None else confidence.cpu().numpy(),
        "routed_experts": None if experts is None else experts.flatten().to(torch.int16).numpy(),
        "turns": [
            {
                "start": turn.span[0],
                "stop": turn.span[1],
                "weight_version": turn.weight_version,
                "finish_reason": turn.finish_reason,
            }
            for turn in trajectory.turns
        ],
        "reward_parts": trajectory.reward_parts,
        "weight_version": trajectory.weight_version,
        "seed": trajectory.seed,
        "index": trajectory.prompt.index,
        "sample": trajectory.sample,
    }


def save_samples(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write traces as JSON lines; atomic. Rows have SAMPLE_KEYS, and may have more."""
    for row in rows:
        missing = [key for key in SAMPLE_KEYS if key not in row]
        assert not missing, f"a sample lacks {', '.join(missing)}"
    with replacing(path) as temporary:
        temporary.write_text("".join(map(json_line, rows)), encoding="utf-8")
