"""How Hydra's multirun reads the config of a sweep and of its jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override
from hydra.plugins.config_source import ConfigSource
from hydra.types import RunMode
from omegaconf import DictConfig

from mispo.config.load import load_config, parse_overrides

NO_LOGGING = {"version": 1, "root": None, "disable_existing_loggers": False}


class SweepLoader(ConfigLoader):
    """Composes groups through Hydra, and leaves single keys to `load_config`, which each job's process calls.

    So a sweep takes the same keys as a single run and refuses them with the same words. inner: Hydra's loader. parent:
    directory of the sweep, whose runs get 0, 1, … in it. config_dir: the user's own recipes. checked: the overrides of
    all jobs so far; Hydra's basic sweeper asks for all of them before the first one starts.
    """

    def __init__(self, inner: ConfigLoader, parent: Path, config_dir: Path | None) -> None:
        self.inner = inner
        self.parent = parent
        self.config_dir = config_dir
        self.checked: set[tuple[str, ...]] = set()

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        """Return what the chosen groups compose to; hydra.overrides.task holds all overrides."""
        parsed = parse_overrides(overrides)
        groups = set(self.inner.list_groups(""))
        composed = [str(o.input_line) for o in parsed if o.is_hydra_override() or _chooses(o, groups)]
        config = self.inner.load_configuration(config_name, composed, run_mode, from_shell, validate_sweep_overrides)
        hydra = config.hydra
        hydra.overrides.task = [o.input_line for o in parsed if not o.is_hydra_override()]
        hydra.sweep.dir, hydra.sweep.subdir = str(self.parent), "${hydra.job.num}"
        # No directories and log files by Hydra: a run directory holds what `mispo train` writes.
        hydra.output_subdir, hydra.hydra_logging, hydra.job_logging = None, NO_LOGGING, NO_LOGGING
        return config

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """Return the config of one job. ValueError if `mispo train` would refuse it."""
        job = tuple(str(o.input_line) for o in parse_overrides(sweep_overrides) if not o.is_hydra_override())
        if job not in self.checked:
            load_config(job, self.config_dir)
            self.checked.add(job)
        overrides = [*master_config.hydra.overrides.hydra, *sweep_overrides]
        return self.load_configuration(master_config.hydra.job.config_name, overrides, RunMode.RUN)

    def get_search_path(self) -> ConfigSearchPath:
        return self.inner.get_search_path()

    def get_sources(self) -> list[ConfigSource]:
        return self.inner.get_sources()

    def list_groups(self, parent_name: str) -> list[str]:
        return self.inner.list_groups(parent_name)

    def get_group_options(
        self,
        group_name: str,
        results_filter: ObjectType | None = ObjectType.CONFIG,
        config_name: str | None = None,
        overrides: list[str] | None = None,
    ) -> list[str]:
        return self.inner.get_group_options(group_name, results_filter, config_name, overrides)

    def compute_defaults_list(self, config_name: str | None, overrides: list[str], run_mode: RunMode) -> Any:
        return self.inner.compute_defaults_list(config_name, overrides, run_mode)


def _chooses(override: Override, groups: set[str]) -> bool:
    """Whether an override chooses a recipe or a part, such as recipe=smoke or algorithm/filter=quantile."""
    key = override.key_or_group
    return "/" in key or (key in groups and not isinstance(override.value(), dict))
