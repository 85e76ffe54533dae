"""Build the journal and the schedule of a run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from mispo.build.setup import Setup
from mispo.config.parts import SeparateCritic
from mispo.config.schema import MispoConfig
from mispo.monitor.alarms import Alarms
from mispo.monitor.journal import Journal, JournalSettings
from mispo.monitor.tracking import Tracker
from mispo.system.schedule import Schedule
from mispo.trainer.checkpoint.files import read_state


def build_journal(setup: Setup) -> Journal:
    """Build the journal, without a tracker yet: `build_tracker` cuts the rows of a run that is continued."""
    config = setup.config
    settings = JournalSettings(
        steps=config.trainer.steps,
        pretrain_steps=pretrain_steps(config),
        rollouts_every=config.tracking.rollouts_every,
        lag=config.rollout.lag,
    )
    return Journal(setup.directory, settings, tracker=None, printer=setup.printer, alarms=Alarms(config))


def build_tracker(setup: Setup) -> Tracker | None:
    """Open metrics.jsonl and W&B, on the first rank; rows after the checkpoint are cut."""
    if not setup.ranks.first:
        return None
    state: dict[str, Any] = read_state(setup.checkpoint) if setup.checkpoint else {}
    return Tracker(
        setup.directory.root,
        settings=setup.config.tracking,
        config=asdict(setup.config),
        resume_step=state.get("step"),
        wandb_id=state.get("states", {}).get("journal", {}).get("wandb_id"),
    )


def pretrain_steps(config: MispoConfig) -> int:
    """Return how many rollouts the critic learns from before step 1."""
    return config.critic.pretrain_steps if isinstance(config.critic, SeparateCritic) else 0


def build_schedule(config: MispoConfig, checkpoint: Path | None) -> Schedule:
    """Build the schedule: when evaluations, checkpoints and attributions are due."""
    return Schedule(
        start=read_state(checkpoint)["step"] if checkpoint else None,
        steps=config.trainer.steps,
        pretrain_steps=pretrain_steps(config),
        evaluate_every=config.eval.every,
        save_every=config.checkpoint.every,
        attribute_every=config.router.attribute_every,
    )
