"""The tables of docs/measurements.md and the figures are those of the documents that are committed."""

from pathlib import Path

from latentrt.benchmarks.records import read_document
from latentrt.benchmarks.report import outdated

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def test_everything_shown_is_current() -> None:
    """Else: `latentrt bench report --readme docs/measurements.md`."""
    assert outdated(RESULTS, ROOT / "docs" / "measurements.md", RESULTS / "figures") == ()


def test_what_was_measured_is_stamped() -> None:
    documents = [read_document(path) for path in RESULTS.glob("latency-*.json")]
    assert documents
    for document in documents:
        measured = [row for row in document.rows if row.rounds]
        assert all(row.stamp["cpu"] and row.stamp["commit"] and row.stamp["libraries"] for row in measured)
