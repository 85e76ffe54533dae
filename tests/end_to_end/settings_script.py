"""Run by test_settings.py in a separate process: `mispo train`, and which of its settings the run has read.

Arguments: OUT override … OUT gets, as JSON, the settings of the config and those that were read.
"""

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mispo.commands import train as command
from mispo.config.load import load_config
from mispo.config.schema import MispoConfig
from support.reads import recorded, settings_of


def main() -> int:
    out, *overrides = sys.argv[1:]
    found: dict[str, Any] = {}
    with ExitStack() as stack:

        def load(given: list[str], config_dir: Path | None = None) -> MispoConfig:
            config = load_config(given, config_dir)
            found["declared"] = settings_of(config)
            found["read"] = stack.enter_context(recorded(config))
            return config

        command.load_config = load  # type: ignore[assignment]
        status = command.train(overrides)
    Path(out).write_text(json.dumps({name: sorted(settings) for name, settings in found.items()}))
    return status


if __name__ == "__main__":
    sys.exit(main())
