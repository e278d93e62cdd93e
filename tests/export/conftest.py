"""Tiny checkpoints and their packages, made once: exporting is the slow part of these tests."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from latentrt.checkpoints.files.open import Checkpoint
from latentrt.engines.package import Package
from latentrt.engines.spec import no_extra_embeddings
from latentrt.export import Progress, export_package
from latentrt.export.verify import Comparison
from tests.parity_pair import exported
from tests.recipes import RECIPES, make_checkpoint


@dataclass(frozen=True)
class Exported:
    """A checkpoint, its package, and what the export told on the way."""

    source: Path
    package: Package
    progress: list[Progress]
    comparisons: list[Comparison]

    @property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint.open(self.source)

    def run(self, net: str, **arrays: Any) -> dict[str, Any]:
        """Call a net on ONNX Runtime, checked against its contract; extra embeddings need not be given."""
        file = self.package.manifest.nets[net]
        arrays = {**no_extra_embeddings(file.spec), **arrays}
        file.spec.check(arrays)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        path = str(self.package.path(file.graph))
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [item.name for item in file.spec.outputs]
        return dict(zip(names, session.run(names, arrays), strict=True))


@pytest.fixture(scope="session")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Like 1.x: stored in fp16, computing in fp32. The tests of parity draw with the same package."""
    folder = exported(tmp_path_factory, "tiny1")
    return Exported(folder / "checkpoint", Package.open(folder / "package"), [], [])


@pytest.fixture(scope="session")
def sd2(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Like 2.1: stored in fp32, computing in fp16."""
    folder = tmp_path_factory.mktemp("sd2")
    source = make_checkpoint(RECIPES["tiny2"], folder / "tiny2", dtype=torch.float32)
    progress: list[Progress] = []
    comparisons: list[Comparison] = []
    package = export_package(
        source,
        folder / "package",
        dtype="fp16",
        verify=True,
        progress=progress.append,
        report=comparisons.append,
    )
    return Exported(source, package, progress, comparisons)


def relative_l2(found: Any, wanted: Any) -> float:
    """|found - wanted| / |wanted| in float64."""
    a, b = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
