import numpy as np
import pytest
import torch

from latentrt.engines.package import Package
from tests.runtime.device_bench import package_with_step


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    """The shipped model, with every net that a device loop needs."""
    return package_with_step(tmp_path_factory.mktemp("demo") / "package")


@pytest.fixture
def rounded_sqrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's square root as IEEE 754 rounds it: on some AVX-512 processors one in five is a bit off, and a
    schedule rescaled to zero terminal SNR subtracts such roots from each other."""
    power = torch.Tensor.__pow__

    def root(values: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.asarray(np.sqrt(values.numpy())))

    monkeypatch.setattr(torch.Tensor, "sqrt", root)
    monkeypatch.setattr(
        torch.Tensor, "__pow__", lambda values, to: root(values) if to == 0.5 else power(values, to)
    )
