from pathlib import Path

import pytest

from tests.cuda import environment


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in's libraries, for the provider in .venv-cuda."""
    if reason := environment.missing():
        pytest.skip(reason)
    return environment.build(tmp_path_factory.mktemp("stand_in"))
