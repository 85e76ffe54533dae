"""Build a run from its config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mispo.build.algorithm import build_method
from mispo.build.journal import build_journal, build_schedule, build_tracker
from mispo.build.learner import build_learner, layout_of
from mispo.build.models import Models, Modules, build_models, build_modules, open_policy, warm_policy
from mispo.build.rollouts import build_attributor, build_evaluator, build_pool, build_sampler, open_sets
from mispo.build.setup import Setup, find_checkpoint, start
from mispo.config.formula import formula
from mispo.config.schema import MispoConfig
from mispo.data.prompts import Data, build_data
from mispo.evaluation import EvalSet
from mispo.metrics.record import LowConfidence
from mispo.metrics.step import About
from mispo.monitor.journal import Clock
from mispo.monitor.watchdog import Watchdog
from mispo.run import Run
from mispo.system.interrupt import Interrupt
from mispo.trainer.checkpoint.states import Checkpoints, Stateful
from mispo.trainer.learner import Learner
from rewards.pool import RewardPool

SAVED = "saved rollouts of {} step{}: no engine, so no sampling, no weight sync, no evaluation"


def build_run(
    config: MispoConfig, directory: Path, *, resume: bool, saved: Sequence[Path] = (), tracked: bool = True
) -> Run:
    """Build the run of a config, ready for its first step. ValueError for errors that the user can fix.

    saved: files of trajectories that replace the rollout engine, one per step. tracked: whether metrics are written.
    """
    checkpoint, torn = find_checkpoint(directory, resume=resume)
    pool = build_pool(config)
    try:
        setup = start(config, directory, checkpoint, torn)
        opened = open_policy(setup)
        data = build_data(config.data, opened.tokenizer, mixture=config.data.mixture)
        sets = open_sets(config, data, opened)
        policy = warm_policy(setup, opened, data.stream)
        models = build_models(setup, policy, samples=not saved)
        layout = layout_of(config, setup.ranks.device)
        modules = build_modules(setup, models, packed=layout.packed)
        learner = build_learner(setup, models, modules, layout, data)
        run = _assemble(setup, models, learner, data, sets, pool, saved)
        _continue(setup, run)
        if tracked:
            run.journal.tracker = build_tracker(setup)  # last, since it cuts rows
        _introduce(setup, modules, len(saved))
    except BaseException:
        pool.close()
        raise
    return run


def _assemble(
    setup: Setup,
    models: Models,
    learner: Learner,
    data: Data,
    sets: Sequence[EvalSet],
    pool: RewardPool,
    saved: Sequence[Path],
) -> Run:
    config = setup.config
    interrupt, clock = Interrupt(), Clock(Watchdog(config.alarms.stall_s, f"rank {setup.ranks.rank}").watch)
    reward_range = pool.low, pool.high
    method = build_method(config, reward_range)
    evaluator = build_evaluator(setup, models, data, sets, pool)
    journal = build_journal(setup)
    low_confidence = LowConfidence()
    registered: dict[str, Stateful] = {
        "data": data.stream,
        "learner": learner,
        "filter": method.filter,
        "journal": journal,
        "evaluation": evaluator,
        "routing": low_confidence,
    }
    return Run(
        schedule=build_schedule(config, setup.checkpoint),
        sampler=build_sampler(setup, models, data, pool, saved, clock=clock, interrupt=interrupt),
        learner=learner,
        method=method,
        evaluator=evaluator,
        journal=journal,
        checkpoints=Checkpoints(
            setup.directory,
            learner,
            models.policy.tokenizer,
            registered,
            keep_last=config.checkpoint.keep_last,
            keep_best=config.checkpoint.keep_best,
            last=setup.checkpoint,
        ),
        low_confidence=low_confidence,
        about=About(models.facts.experts, reward_range),
        attributor=build_attributor(setup, models, learner),
        clock=clock,
        interrupt=interrupt,
    )


def _continue(setup: Setup, run: Run) -> None:
    """Continue from the checkpoint, if there is one."""
    if setup.checkpoint is not None:
        assert run.learner.publisher is not None, "a run on saved rollouts is not resumed"
        run.checkpoints.restore(setup.checkpoint)
        run.journal.step = run.schedule.start or 0
        run.sampler.publish(run.learner.due_weights())


def _introduce(setup: Setup, modules: Modules, saved: int) -> None:
    """Print the first lines of a run: the model, saved rollouts, the objective."""
    setup.say(modules.about, style="dim", wrap=True)
    if saved:
        setup.say(SAVED.format(saved, "" if saved == 1 else "s"), style="dim")
    setup.say(formula(setup.config), style="dim")
