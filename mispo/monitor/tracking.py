"""Where metrics go: metrics.jsonl always, Weights & Biases if wanted. One writer per run (rank 0)."""

from __future__ import annotations

import json
import math
import netrc
import os
import warnings
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from mispo.config.schema import TrackingConfig
from mispo.monitor.rows import whole_lines
from mispo.system.files import json_line, replacing
from mispo.system.rundir import RunDir

if TYPE_CHECKING:
    import wandb

INIT_TIMEOUT_S = 30.0
"""Seconds that connecting to W&B may hold up the start of a run."""

FINISH_TIMEOUT_S = 60.0
"""Seconds that the last upload may hold up the end of a run; what is left stays on disk for `wandb sync`."""

BY_LAYER = (
    "confidence",
    "confidence_norm",
    "low_confidence",
    "margin",
    "violation",
    "dead_experts",
    "expert_agreement",
)
"""Routing metrics that have a series for each MoE layer."""

HIDDEN = (*(f"moe/{name}/layer_*" for name in BY_LAYER), "mis/accept_len/*")
"""Many-series metrics: recorded, but left out of W&B's automatic charts."""


class Tracker:
    """Appends rows to run_dir/metrics.jsonl and mirrors them to W&B.

    resume_step: None starts a new file; k continues after step k: rows of later steps, and a torn last line,
    are cut off, the others stay byte for byte. wandb_id: the run to continue (`Tracker.wandb_id` of before).
    Raises ValueError for a new run over an old file, and for `online` without W&B.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        settings: TrackingConfig,
        config: dict[str, Any],
        resume_step: int | None,
        wandb_id: str | None,
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        path = RunDir(run_dir).metrics
        if resume_step is not None:
            cut_rows(path, resume_step)
        elif path.exists() and path.stat().st_size > 0:
            raise ValueError(f"run_dir: {path} exists already; give a new run_dir, or continue with --resume")
        self._run = _start_wandb(run_dir, settings, config, wandb_id)
        self._file = path.open("a", encoding="utf-8")

    @property
    def wandb_id(self) -> str | None:
        """The id to save in checkpoints and hand back on resume; None if W&B is disabled."""
        return self._run.id if self._run else None

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Write one row and flush it. NaN and infinities become null (in W&B they are left out)."""
        for key, value in metrics.items():
            assert value is None or isinstance(value, Real), f"{key}: {type(value).__name__} is not a number"
        assert "step" not in metrics, "step is the other argument"
        self._file.write(json_line({"step": step, **metrics}))
        self._file.flush()
        if self._run is not None:
            finite = {key: value for key, value in metrics.items() if value is not None and math.isfinite(value)}
            # Not log(step=…): W&B drops steps that it has seen, and a resumed run repeats some.
            self._run.log({"step": step, **finite})

    def close(self, exit_code: int = 0) -> None:
        """End the W&B run (exit_code ≠ 0 marks it as failed). Safe to call twice."""
        self._file.close()
        if self._run is not None:
            import wandb

            self._run.finish(exit_code=exit_code)
            wandb.teardown(exit_code)  # an offline file is whole only when wandb's own process has ended
            self._run = None


def cut_rows(path: Path, last_step: int) -> None:
    """Remove the rows after `last_step` from a metrics file, atomically; a missing file stays missing."""
    if not path.exists():
        return
    kept = [line for line in whole_lines(path) if json.loads(line)["step"] <= last_step]
    with replacing(path) as temporary:
        temporary.write_bytes(b"".join(line + b"\n" for line in kept))


def _start_wandb(
    run_dir: Path, settings: TrackingConfig, config: dict[str, Any], run_id: str | None
) -> wandb.Run | None:
    if settings.wandb == "disabled":
        return None
    import wandb  # lazy: a second to load, and not needed by runs that are disabled

    wandb.setup(settings=wandb.Settings(silent=True))
    logged_in = _logged_in()
    if settings.wandb == "online" and not logged_in:
        # Without this check wandb would ask for a key at the terminal.
        raise ValueError(
            "tracking.wandb: online needs a key; set WANDB_API_KEY, run `wandb login`, or use auto or offline"
        )
    if settings.wandb == "offline" or not logged_in:
        return _init_wandb("offline", run_dir, settings, config, run_id)
    try:
        return _init_wandb("online", run_dir, settings, config, run_id)
    except wandb.Error as error:
        wandb.teardown()  # or the failed run keeps its id busy and holds up the exit
        reason = str(error).splitlines()[0]
        if settings.wandb == "online":
            raise ValueError(
                f"tracking.wandb: online failed ({reason}); check key and network, or choose auto or offline"
            ) from error
        warnings.warn(f"W&B is not reachable ({reason}); this run is tracked offline", stacklevel=3)
        wandb.setup(settings=wandb.Settings(silent=True))
        return _init_wandb("offline", run_dir, settings, config, run_id)


def _init_wandb(
    mode: Literal["online", "offline"],
    run_dir: Path,
    settings: TrackingConfig,
    config: dict[str, Any],
    run_id: str | None,
) -> wandb.Run:
    import wandb

    options: dict[str, Any] = {"silent": True, "console": "off", "init_timeout": INIT_TIMEOUT_S}
    if "finish_timeout" in wandb.Settings.model_fields:  # wandb ≥ 0.28; before, it waits for the last upload
        options["finish_timeout"] = FINISH_TIMEOUT_S
    run = wandb.init(
        project=settings.project,
        entity=settings.entity,
        name=run_dir.resolve().name,
        dir=run_dir,
        config=config,
        id=run_id,
        resume="allow" if run_id and mode == "online" else None,
        mode=mode,
        settings=wandb.Settings(**options),
    )
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    run.define_metric("eval/*", step_metric="step", summary="max,last")
    for name in HIDDEN:
        run.define_metric(name, step_metric="step", hidden=True)
    return run


def _logged_in() -> bool:
    """Return whether W&B would find credentials by itself: environment, settings file, netrc."""
    import wandb

    settings = wandb.setup().settings
    if settings.api_key or os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    if not path.is_file():
        return False
    hosts = [urlsplit(settings.base_url).netloc]
    if settings.base_url == wandb.Settings().base_url:
        hosts.append("api.wandb.ai")  # wandb's default host has changed; logins for the old one still count
    try:
        logins = [netrc.netrc(path).authenticators(host) for host in hosts]
    except netrc.NetrcParseError as error:
        raise ValueError(f"{path}: {error}; repair it, or set tracking.wandb=offline") from error
    return any(login and login[2] for login in logins)
