"""How the tests share a machine when they run side by side (`-n`): by folder or file, a processor each."""

import os

import pytest

_WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")

if _WORKER and hasattr(os, "sched_setaffinity"):
    # Two libraries' thread pools on the same cores wait for each other by spinning: worse than one core each.
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_cores[int(_WORKER.removeprefix("gw")) % len(_cores)]})


@pytest.hookimpl(tryfirst=True)  # before xdist's own, which reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share an expensive fixture stay on one worker: a file's, and all of those in `export`."""
    for item in items:
        folder = item.path.parent.name
        item.add_marker(pytest.mark.xdist_group(folder if folder == "export" else str(item.path)))
