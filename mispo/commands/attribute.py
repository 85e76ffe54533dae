"""`mispo attribute`: where the rollouts and the trainer of a run disagree."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mispo.commands.session import Use, has_checkpoint, session
from mispo.config.load import config_from_file
from mispo.config.schema import MispoConfig
from mispo.system.rundir import RunDir

if TYPE_CHECKING:
    from mispo.run import Run


def attribute(run: Path, overrides: Sequence[str]) -> int:
    """Sample from the last checkpoint, print and write the attribution; returns the exit status.

    run: the run directory, which is left as it is apart from attribution/. overrides: what if the run had these
    settings. ValueError for bad input.
    """
    directory = RunDir(run)
    config = _config(directory, overrides)

    def build() -> Run:
        from mispo.build.run import build_run

        return build_run(config, run, resume=True, tracked=False)

    return session(directory, Use.READ, build, lambda opened: _attribute(opened, directory, overrides))


def _config(directory: RunDir, overrides: Sequence[str]) -> MispoConfig:
    config = config_from_file(directory.config, overrides)
    if not has_checkpoint(directory):
        raise ValueError(
            f"{directory.root}: no checkpoint yet; attribution needs one, written every checkpoint.every steps"
        )
    kept = config_from_file(directory.config, []).rollout.lag
    if config.rollout.lag > kept:
        raise ValueError(f"rollout.lag: {config.rollout.lag}, but the run kept older weights up to {kept}")
    return config


def _attribute(run: Run, directory: RunDir, overrides: Sequence[str]) -> None:
    from mispo.loop import attribute_next
    from mispo.monitor.advice import paragraph
    from mispo.monitor.console import make_console
    from mispo.monitor.report.attribution import attribution_table, write_attribution

    step, attribution, diagnosis = attribute_next(run)
    if not run.ranks.first:
        return
    path = write_attribution(directory.root, step, attribution, diagnosis, overrides)
    console = make_console()
    console.print(attribution_table(attribution), highlight=False)
    console.print(paragraph(diagnosis), markup=False, highlight=False)
    console.print(f"written to {path}", markup=False, highlight=False, soft_wrap=True)
