"""The tables and the figures are those of the documents that are committed."""

import re
from pathlib import Path

from latentrt.benchmarks.records import read_document
from latentrt.benchmarks.report.publish import Pages, outdated
from latentrt.cli.bench import bench

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def test_everything_shown_is_current() -> None:
    """Else: `latentrt bench report --readme README.md --measurements docs/measurements.md`."""
    pages = Pages(
        readme=ROOT / "README.md",
        measurements=ROOT / "docs" / "measurements.md",
        figures=RESULTS / "figures",
    )
    assert outdated(RESULTS, pages) == ()


def test_what_was_measured_is_stamped() -> None:
    documents = [read_document(path) for path in RESULTS.glob("latency-*.json")]
    assert documents
    for document in documents:
        measured = [row for row in document.rows if row.rounds]
        assert all(row.stamp["cpu"] and row.stamp["commit"] and row.stamp["libraries"] for row in measured)


def test_the_pages_name_verbs_that_exist() -> None:
    verbs = {item.name or getattr(item.callback, "__name__", "") for item in bench.registered_commands}
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        named = set(re.findall(r"latentrt bench ([a-z-]+)", page.read_text(encoding="utf-8")))
        assert named <= verbs, page
