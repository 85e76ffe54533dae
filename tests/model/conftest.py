from pathlib import Path

import pytest

from support.step_files import saved, variant


@pytest.fixture(scope="session")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved micro Step model with its tokenizer; not to be changed."""
    return saved(variant("as it is"), tmp_path_factory.mktemp("micro"))
