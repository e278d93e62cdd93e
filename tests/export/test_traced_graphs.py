"""The file of graphs that other tests take is what would be traced now."""

import json
import zipfile
from pathlib import Path

import pytest

from latentrt.export.architectures import Architecture
from latentrt.export.templates import Job
from tests import traced_graphs
from tests.traced_graphs import FILE, graph_rows, is_current, make_archive, same_libraries, traced

needs_its_libraries = pytest.mark.skipif(
    not same_libraries(), reason="other releases trace here: graphs are traced anew in every test"
)


@needs_its_libraries
def test_it_is_current() -> None:
    assert is_current(), f"what makes graphs has changed: {traced_graphs.__doc__}"


@needs_its_libraries
@pytest.mark.parametrize("component", ["text_encoder", "unet", "controlnet_hint"])
def test_a_fresh_trace_is_what_it_holds(component: str) -> None:
    rows = [row for row in graph_rows() if json.loads(row["request"])["component"] == component]
    row = min(rows, key=lambda row: len(row["request"]))
    fresh, content = traced(row["request"])
    assert fresh == row
    with zipfile.ZipFile(FILE) as file:
        assert file.read(row["content"]) == content


def test_another_architecture_is_traced_and_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = min((row["request"] for row in graph_rows() if '"text_encoder"' in row["request"]), key=len)
    architecture = json.loads(request)["architecture"]
    parts = {"text_encoder": {**architecture["parts"]["text_encoder"], "num_hidden_layers": 1}}
    asked: list[str] = []
    monkeypatch.setenv("LATENTRT_TRACED_GRAPHS", str(tmp_path / "missing"))

    def trace_template(job: Job, dtypes: object) -> None:
        asked.append(job.component)
        raise KeyError("traced")

    monkeypatch.setattr(traced_graphs, "trace_template", trace_template)
    with pytest.raises(KeyError, match="traced"):
        make_archive(tmp_path / "x.zip", {"x": Architecture(parts={**architecture["parts"], **parts})})
    assert asked == ["text_encoder"]
    (missing,) = (tmp_path / "missing").iterdir()
    assert json.loads(missing.read_text())["architecture"]["parts"]["text_encoder"]["num_hidden_layers"] == 1
