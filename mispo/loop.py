"""The training loop: the file to read first.

    prompts → trajectories → rewards → scores → targets (advantages, selection, weights)
    → critic updates → actor updates → weights to the rollout engine → metrics

Each arrow is one call; which engine, reward or filter it reaches is decided in build/.
"""

from __future__ import annotations

from collections.abc import Mapping

from mispo.algorithm.variance_shares import Attribution
from mispo.metrics.attribution import attribution_metrics
from mispo.metrics.diagnosis import Diagnosis
from mispo.metrics.record import StepRecord
from mispo.metrics.speed import throughput
from mispo.metrics.step import step_metrics
from mispo.run import Run
from mispo.trainer.checkpoint.states import State
from mispo.trainer.learner import Updates


def train(run: Run) -> None:
    """Train all steps of a run, from the one after its last checkpoint."""
    if run.schedule.start is None:
        if run.learner.publisher:
            run.learner.publisher.record()
        run.sampler.publish(run.learner.due_weights())
        baseline = run.evaluator.baseline()
        run.journal.baseline(baseline.metrics, baseline.samples, baseline.notes)
        pretrain_critic(run)
    run.interrupt.arm(talks=run.ranks.first, launched=run.ranks.size > 1)
    for step in range((run.schedule.start or 0) + 1, run.schedule.steps + 1):
        train_step(run, step)


def train_step(run: Run, step: int) -> None:
    """Sample, grade, score, select, update the critic, update the actor, publish, report."""
    before = run.checkpoints.states()
    with run.clock("step"):
        taken = run.sampler.take(step)
        stop_if_asked(run, step - 1, before)
        with run.clock("score"):
            batch, shared = run.learner.pack(taken.trajectories, step)
            batch, scores = run.learner.score(batch)
        low_L = run.low_confidence.fit(scores.policy.routing, run.ranks.sum)
        stop_if_asked(run, step - 1, before)
        targets = run.method.targets(*run.learner.evidence(batch, scores))
        record = StepRecord(batch, scores, targets, low_L)
        run.journal.keep(batch, scores, targets)  # before the updates: a step that fails can be trained on again
        attributed = attribute(run, step, record)
        with run.clock("critic"):
            critic = run.learner.update_critic(batch, targets.values)
        with run.clock("actor"):
            actor = run.learner.update_actor(batch, scores, targets, run.method)
        updates = Updates.of(actor, critic)
        with run.clock("sync"):
            synced = run.sampler.publish(run.learner.due_weights())
    metrics = step_metrics(record, updates, run.about)
    seconds = run.clock.take()
    metrics |= taken.metrics | shared | attributed | synced | seconds | throughput(run.learner, batch, seconds)
    report(run, step, metrics)


def report(run: Run, step: int, metrics: dict[str, float]) -> None:
    """Show and write a step, evaluate and save where that is due. RuntimeError if an alarm stops the run."""
    run.journal.line(step, metrics)
    if run.schedule.evaluates(step):
        with run.clock("eval"):
            evaluation = run.evaluator.run(step)
        run.journal.evaluation(step, evaluation.metrics, evaluation.samples)
        metrics |= evaluation.metrics | run.clock.take()
    alarm = run.journal.row(step, metrics)
    if alarm or run.schedule.saves(step):
        run.checkpoints.save(step)
    if alarm:
        raise RuntimeError(f"alarms.action=stop: {alarm}")
    stop_if_asked(run, step)


def attribute(run: Run, step: int, record: StepRecord) -> dict[str, float]:
    """Measure where the mismatch of this step comes from, where that is due."""
    if run.attributor is None or not run.schedule.attributes(step):
        return {}
    with run.clock("attribute"):
        attribution, diagnosis = run.attributor.measure(record)
        run.journal.attribution(step, attribution, diagnosis)
    return dict(attribution_metrics(attribution))


def attribute_next(run: Run) -> tuple[int, Attribution, Diagnosis]:
    """Sample and score the step after the last checkpoint, and measure where its mismatch comes from."""
    assert run.attributor is not None, "attribution needs an engine"
    step = (run.schedule.start or 0) + 1
    batch, _ = run.learner.pack(run.sampler.take(step).trajectories, step)
    batch, scores = run.learner.score(batch)
    targets = run.method.targets(*run.learner.evidence(batch, scores))
    record = StepRecord(batch, scores, targets, run.low_confidence.fit(scores.policy.routing, run.ranks.sum))
    return step, *run.attributor.measure(record)


def pretrain_critic(run: Run) -> None:
    """Let the critic learn the Monte-Carlo returns of the initial policy, before step 1."""
    count = run.schedule.pretrain_steps
    for number in range(count):
        step = number - count  # they share no seed with any step
        batch, _ = run.learner.pack(run.sampler.take(step).trajectories, step)
        run.journal.pretraining(number + 1, run.learner.pretrain(batch, run.method))
    run.clock.take()


def stop_if_asked(run: Run, step: int, states: Mapping[str, State] | None = None) -> None:
    """Raise KeyboardInterrupt on every rank, after a checkpoint of `step`, if a signal has come to any of them.

    states: of the end of that step, where the next one has begun since.
    """
    if not run.ranks.any(run.interrupt.asked):
        return
    if run.checkpoints.last is None or run.checkpoints.last.name != f"step_{step}":
        run.checkpoints.save(step, states)
    raise KeyboardInterrupt
