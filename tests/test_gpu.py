"""All that only a GPU can show, in this process: `python -m pytest -m gpu`.

The sections are those of `python -m latentrt.benchmarks.gpu.check`, which also writes what it measures.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from latentrt.benchmarks.gpu.check import BACKENDS, NEEDED, SECTIONS, line_of
from latentrt.benchmarks.gpu.opener import Opener, Scale, backend_opener, collect
from latentrt.benchmarks.records import Row
from latentrt.engines.cuda.facts import available
from latentrt.engines.errors import BackendError
from latentrt.engines.package import Package
from tests.runtime.device_bench import package_with_step

REASON = available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]


def run(section: str, opener: Opener) -> list[Row]:
    run, _ = SECTIONS[section]
    rows = list(collect(run(opener, Scale.of(opener.package.manifest))))
    case = {"backend": opener.task.backend}
    lines = [line_of(replace(row, workload=section, case={**case, "what": row.workload})) for row in rows]
    print("\n".join(lines))
    assert rows
    assert not [line for row, line in zip(rows, lines, strict=True) if row.status == "FAILED"]
    return rows


@pytest.fixture(scope="module", params=BACKENDS)
def opener(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opener]:
    """A backend that can run here, with what it needs built into a store of its own."""
    package: Package = package_with_step(tmp_path_factory.mktemp("demo") / "package")
    try:
        opener = backend_opener(request.param, package)
    except BackendError as error:
        pytest.skip(error.found)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENTRT_CACHE", str(tmp_path_factory.mktemp("store")))
        for section in NEEDED:
            rows = run(section, opener)
            if section == "placement" and rows[0].status == "not available":
                pytest.skip(rows[0].reason)
        yield opener


@pytest.mark.parametrize("section", [name for name in SECTIONS if name not in NEEDED])
def test_section(opener: Opener, section: str) -> None:
    run(section, opener)
