"""Where a run starts: its config, its directory, its checkpoint and its ranks, which every builder takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from transformers.utils.logging import disable_progress_bar

from mispo.config.schema import MispoConfig
from mispo.monitor.console import StepPrinter, make_console
from mispo.system.rundir import RunDir
from mispo.trainer.checkpoint.files import newest_checkpoint
from mispo.trainer.engine import start_ranks
from mispo.trainer.ranks import Ranks


@dataclass(frozen=True)
class Setup:
    """The start of a run. checkpoint: that it continues from, None for a new one. printer: on the first rank only."""

    config: MispoConfig
    directory: RunDir
    checkpoint: Path | None
    accelerator: Accelerator
    ranks: Ranks
    printer: StepPrinter | None

    def say(self, text: str, *, style: str | None = None, wrap: bool = True) -> None:
        """Print a line for people, once for all ranks."""
        if self.printer:
            self.printer.console.print(text, style=style, markup=False, highlight=False, soft_wrap=not wrap)


def find_checkpoint(directory: Path, *, resume: bool) -> tuple[Path | None, Sequence[str]]:
    """Return the checkpoint to continue from, and what is wrong with newer ones. ValueError if there is none."""
    return newest_checkpoint(RunDir(directory).checkpoints) if resume else (None, [])


def start(config: MispoConfig, directory: Path, checkpoint: Path | None, torn: Sequence[str]) -> Setup:
    """Start the process group. torn: what is wrong with the checkpoints that `find_checkpoint` left out."""
    disable_progress_bar()  # of saving and loading weights: it would tear the step lines
    accelerator, ranks = start_ranks(config.trainer, config.optimizer)
    printer = StepPrinter(config.trainer.steps, make_console()) if ranks.first else None
    setup = Setup(config, RunDir(ranks.agree(directory)), checkpoint, accelerator, ranks, printer)
    for problem in torn:
        setup.say(f"left out: {problem}", wrap=False)
    return setup
