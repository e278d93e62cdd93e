from pathlib import Path

import pytest

from latentrt.engines.package import Package
from tests.tiny_package import write_tiny_package


@pytest.fixture
def package(tmp_path: Path) -> Package:
    """A package with the net `unet`, freshly written."""
    return write_tiny_package(tmp_path / "package")
