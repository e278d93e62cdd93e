"""What only a GPU can show of the small model, in this process: `python -m pytest -m gpu`.

The steps are those of `python -m latentrt.benchmarks.gpu.check`, which also measures a large one.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from latentrt.benchmarks.gpu.check import line_of
from latentrt.benchmarks.gpu.opener import Opener, Scale, backend_opener, collect, why_not
from latentrt.benchmarks.gpu.plan import BACKENDS
from latentrt.benchmarks.gpu.sections import build, graphs, parity, picture, placement, sharing
from latentrt.benchmarks.records import Row
from latentrt.engines.cuda.facts import available
from latentrt.engines.package import Package
from tests.runtime.device_bench import package_with_step

REASON, STEPS = available(), (parity, picture, graphs, sharing)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]


def run(step: Callable[[Opener, Scale], Iterator[Row]], opener: Opener) -> None:
    rows = list(collect(step(opener, Scale.of(opener.package.manifest))))
    case, name = {"backend": opener.task.backend}, step.__name__
    lines = [line_of(replace(row, workload=name, case={**case, "what": row.workload})) for row in rows]
    print("\n".join(lines))
    assert rows
    assert not [line for row, line in zip(rows, lines, strict=True) if row.status == "FAILED"]


@pytest.fixture(scope="module", params=BACKENDS)
def opener(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opener]:
    """A backend that can run here, with what it needs built into a store of its own."""
    if reason := why_not(request.param):
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("demo")
    package: Package = package_with_step(folder / "package")
    opener = backend_opener(request.param, package, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENTRT_CACHE", str(tmp_path_factory.mktemp("store")))
        run(build, opener)
        run(placement, opener)
        yield opener


@pytest.mark.parametrize("step", STEPS)
def test_step(opener: Opener, step: Callable[[Opener, Scale], Iterator[Row]]) -> None:
    run(step, opener)
