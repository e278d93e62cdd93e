"""How the tests share a machine when they run side by side (`-n`): by folder or file, a processor each.

And what tests of several folders take: fixtures, which import what they need when they are used.
"""

import atexit
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
# Files that share expensive exports run on one worker, and the longest first: the last worker to end is then
# busy with something short.
_GROUPS = {
    "export": "export/",
    "parity of opened checkpoints": ("test_parity_opened.py", "checkpoints/test_opened_odd_files.py"),
    "parity of SDXL": ("test_parity_sdxl.py", "test_parity_few_steps.py"),
    "parity of SD": ("test_parity.py", "test_parity_pictures.py"),
}

# What was measured on this machine, and what its user has opened, has no say in the tests, and hears of none.
os.environ["LATENTRT_CACHE"] = tempfile.mkdtemp(prefix="latentrt-tests-")
atexit.register(shutil.rmtree, os.environ["LATENTRT_CACHE"], ignore_errors=True)

# torch's threads sleep while they wait for each other: where another program ran on their cores, spinning
# made some tests take three times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if _WORKER and hasattr(os, "sched_setaffinity"):
    # Two libraries' thread pools on the same cores wait for each other by spinning: worse than one core each.
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_cores[int(_WORKER.removeprefix("gw")) % len(_cores)]})


class _Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines = list[str]()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """What latentrt logs during a test, a line each (pytest's own plugin for that is switched off)."""
    handler, logger = _Lines(), logging.getLogger("latentrt")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler.lines
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint to look at; tests that change one use `copy`."""
    from tests.recipes import RECIPES, make_checkpoint

    return make_checkpoint(RECIPES["tiny1"], tmp_path_factory.mktemp("plain") / "tiny1")


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


@pytest.fixture
def rounded_sqrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's square root as IEEE 754 rounds it: on some AVX-512 processors one in five is a bit off.

    A schedule rescaled to zero terminal SNR subtracts such roots from each other.
    """
    import numpy as np
    import torch

    power = torch.Tensor.__pow__

    def root(values: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.asarray(np.sqrt(values.numpy())))

    def raised(values: torch.Tensor, to: Any) -> torch.Tensor:
        return root(values) if to == 0.5 else power(values, to)

    monkeypatch.setattr(torch.Tensor, "sqrt", root)
    monkeypatch.setattr(torch.Tensor, "__pow__", raised)


@pytest.hookimpl(tryfirst=True)  # before xdist's own, which reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put tests that share an expensive fixture on one worker: a group's, and those of each other file."""
    order: dict[pytest.Item, int] = {}
    for item in items:
        path = item.path.relative_to(item.config.rootpath / "tests").as_posix()
        group = next((name for name, start in _GROUPS.items() if path.startswith(start)), path)
        order[item] = [*_GROUPS, path].index(group)
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: order[item])
