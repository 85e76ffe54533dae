"""Run by test_attribution.py in a separate process: one run whose mismatch is planted, one cause at a time.

Arguments: OUT RUN_DIR override … OUT gets, as JSON, what `attribute_next` found for each cause.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mispo.build.run import build_run
from mispo.config.load import load_config
from mispo.loop import attribute_next
from mispo.metrics.attribution import Attributor
from mispo.metrics.diagnosis import as_json
from mispo.run import Run
from mispo.trainer.batch import Batch
from model.moe.routers import find_routers, keep_router_fp32


def noisy(router: nn.Module) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """The router with noise on its selection only: its weights are those of the experts that it then activates."""
    generator, plain = torch.Generator().manual_seed(0), router.forward

    def forward(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, _, own = plain(hidden)
        scores = logits.sigmoid()
        chosen = (scores + 0.05 * torch.randn(scores.shape, generator=generator)).topk(own.shape[-1]).indices
        selected = scores.gather(1, chosen)
        return logits, selected / selected.sum(-1, keepdim=True), chosen

    return forward


def plant_selection_noise(run: Run) -> None:
    for router in find_routers(run.attributor.engine.model):
        router.module.forward = noisy(router.module)


def plant_rounding(run: Run) -> None:
    """Weights in bf16, computed with in float32: precision and nothing else."""
    for router in find_routers(run.attributor.engine.model):
        del router.module.forward
    run.attributor.engine.model.bfloat16().float()


def plant_precision(run: Run) -> None:
    """As rollout.dtype=bf16 does. Decoding then rounds otherwise than one forward does, which is the engine's part."""
    run.attributor.engine.model.bfloat16()
    keep_router_fp32(run.attributor.engine.model)


def plant_staleness(run: Run) -> None:
    run.attributor.engine.model.float()
    run.sampler.publish(run.learner.due_weights())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in run.learner.actor.module.policy.parameters():
            scale = 0.02 * parameter.std() if parameter.numel() > 1 else 0
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    run.learner.actor.updates += 1


@dataclass(frozen=True)
class Watched(Attributor):
    """The real attributor; keeps the root mean square of log x."""

    rms: dict[str, float] = field(default_factory=dict)

    def telescope(self, batch: Batch, *, replay: bool) -> dict[str, Tensor]:
        parts = super().telescope(batch, replay=replay)
        self.rms["replayed" if replay else "free"] = sum(parts.values()).square().mean().sqrt().item()
        return parts


def main() -> None:
    out, directory, *overrides = sys.argv[1:]
    Path(directory).mkdir()
    run = build_run(load_config(overrides), Path(directory), resume=False)
    run.learner.publisher.record()
    run.sampler.publish(run.learner.due_weights())
    found: dict[str, Any] = {}
    watched = Watched(**vars(run.attributor))
    for name, plant in (
        ("nothing", lambda run: None),
        ("selection", plant_selection_noise),
        ("rounding", plant_rounding),
        ("precision", plant_precision),
        ("staleness", plant_staleness),
    ):
        plant(run)
        _, attribution, diagnosis = attribute_next(replace(run, attributor=watched))
        found[name] = {"attribution": asdict(attribution), "diagnosis": as_json(diagnosis), "rms": dict(watched.rms)}
    run.close(0)
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
