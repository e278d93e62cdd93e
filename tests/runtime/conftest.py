import pytest

from latentrt.engines.package import Package
from tests.runtime.device_bench import package_with_step


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    """The shipped model, with every net that a device loop needs."""
    return package_with_step(tmp_path_factory.mktemp("demo") / "package")
