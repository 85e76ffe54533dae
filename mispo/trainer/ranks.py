"""Ranks: their collective operations, and the environment variables with which they start."""

from __future__ import annotations

import os
import resource
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mispo.config.parts import OptimizerPart
from mispo.config.schema import TrainerConfig

T = TypeVar("T")

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""How long one rank waits for another before the run ends with an error that names the collective."""


@dataclass(frozen=True)
class Ranks:
    """The rank of this process, and collectives. They run on `device`; with one process they cost nothing."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks; the result is the same on each."""
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def max(self, tensor: Tensor) -> Tensor:
        """Return the element-wise maximum over all ranks."""
        return self._reduce(tensor, dist.ReduceOp.MAX)

    def _reduce(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if self.size == 1:
            return tensor
        shared = tensor.detach().to(self.device, copy=True)
        dist.all_reduce(shared, op=operation)
        return shared.to(tensor.device)

    def any(self, flag: bool) -> bool:
        """Return whether the flag is true on any rank."""
        return bool(self.max(torch.tensor(int(flag))))

    def count(self, number: int) -> int:
        """Sum an integer over all ranks."""
        return int(self.sum(torch.tensor(number, dtype=torch.int64)))

    def gather(self, x_B: Tensor, positions_B: Tensor, total: int) -> Tensor:
        """Put each rank's rows at their global positions, [total, …]; the ranks together must have all rows."""
        everyone = torch.zeros((total, *x_B.shape[1:]), dtype=x_B.dtype, device=x_B.device)
        everyone[positions_B] = x_B
        return self.sum(everyone)

    def share(self, count: int) -> range:
        """Return the part of `count` items that this rank works on: contiguous, near-equal."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def agree(self, value: T) -> T:
        """Return the first rank's value on all ranks."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def concatenate(self, items: list[T]) -> list[T]:
        """Return the items of all ranks, in the order of the ranks; the same list on each."""
        if self.size == 1:
            return items
        boxes: list[list[T]] = [[] for _ in range(self.size)]
        dist.all_gather_object(boxes, items)
        return [item for box in boxes for item in box]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def leave(self) -> None:
        """End the process group after a successful run; gloo may abort if the interpreter's exit has to end it."""
        self.barrier()
        if dist.is_initialized():
            dist.destroy_process_group()


def max_memory_gb(device: torch.device) -> float:
    """Return the peak memory of this process, GiB: of the accelerator's memory, or of the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def prepare_environment(config: TrainerConfig, optimizer: OptimizerPart) -> None:
    """Set the environment variables of a launcher, if there is none, so that one process starts the same way.

    ValueError if options of `accelerate launch` contradict this config: accelerate would apply or ignore them silently.
    """
    if "WORLD_SIZE" not in os.environ:
        if "ACCELERATE_USE_CPU" in os.environ:  # only the plain `accelerate launch` sets it
            raise ValueError(
                "accelerate launch: it has started a single process without DeepSpeed, and --num_processes had no "
                "effect; add --use_deepspeed (on CPU too)"
            )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for name, (field, agreed) in _decided(config, optimizer).items():
        option = os.environ.get(f"ACCELERATE_{name}", "auto")
        if option.lower() not in ("auto", agreed):
            raise ValueError(
                f"{field}: ACCELERATE_{name}={option} (an option of accelerate launch, its config file, or the "
                f"environment) contradicts it; {field} alone decides: set that, and leave the other out or at {agreed}"
            )
    # All of them agree now; accelerate objects to a config file that names any beside our own DeepSpeed JSON.
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)


def _decided(config: TrainerConfig, optimizer: OptimizerPart) -> dict[str, tuple[str, str]]:
    """Return, by name of a variable ACCELERATE_…, the field of mispo that decides it and the value that agrees."""
    clipping = 1.0 if optimizer.clips_at is None else optimizer.clips_at
    hosted = {"none": ("none", "none"), "optimizer": ("cpu", "none"), "parameters": ("cpu", "cpu")}[config.offload]
    return {
        "MIXED_PRECISION": ("trainer.dtype", "no"),
        "GRADIENT_ACCUMULATION_STEPS": ("trainer.tokens_per_microbatch", "1"),
        "GRADIENT_CLIPPING": ("optimizer", str(clipping)),
        "DEEPSPEED_ZERO_STAGE": ("trainer.zero_stage", str(config.zero_stage)),
        "DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": ("trainer.offload", hosted[0]),
        "DEEPSPEED_OFFLOAD_PARAM_DEVICE": ("trainer.offload", hosted[1]),
        "DEEPSPEED_CONFIG_FILE": ("trainer.deepspeed", "none"),
        "USE_FSDP": ("trainer.zero_stage", "false"),
        "USE_MEGATRON_LM": ("trainer.zero_stage", "false"),
    }
