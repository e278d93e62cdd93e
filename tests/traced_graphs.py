"""Graphs that tests need and do not test, traced beforehand.

torch takes seconds for each net, in every run of the tests the same. tests/export has the tests of tracing
itself; others make their archives here, of graphs in `traced_graphs.zip` as long as the code, the libraries
and the Python that traced those are the same, and traced anew otherwise. To make that file anew:

LATENTRT_TRACED_GRAPHS=/tmp/graphs python tests/check.py    writes down what was missing
python -m tests.traced_graphs /tmp/graphs                   traces it, and all that is in the file
"""

import ast
import hashlib
import json
import os
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from functools import cache
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from latentrt.checkpoints.templates.archive import DTYPES, Dtype, Graph, Template
from latentrt.engines.processors import usable_processors
from latentrt.engines.spec import NetSpec
from latentrt.export import templates
from latentrt.export.architectures import Architecture
from latentrt.export.templates import Job, trace_template

ROOT = Path(__file__).resolve().parent.parent
FILE = Path(__file__).with_suffix(".zip")
_MISSING = "LATENTRT_TRACED_GRAPHS"
_INDEX = "index.json"
_LIBRARIES = ("torch", "diffusers", "transformers", "onnxscript", "onnx-ir")
# What decides how a graph looks, beside an architecture.
_CODE = (
    "checkpoints/controls",
    "checkpoints/files",
    "checkpoints/graphs",
    "checkpoints/made_weights.py",
    "checkpoints/templates",
    "engines/noise_schedule.py",
    "engines/spec.py",
    "export/graphs",
    "export/nets",
    "export/templates.py",
    "export/traced.py",
)


def make_archive(
    path: Path, architectures: Mapping[str, Architecture], *, dtypes: Sequence[Dtype] = DTYPES
) -> None:
    """`export.templates.make_archive` of graphs that were traced before, as far as they were."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(templates, "trace_template", _template)
        templates.make_archive(path, architectures, dtypes=dtypes)


def is_current() -> bool:
    """Whether what is in the file is what would be traced now."""
    return _index()["traced by"] == {**_libraries(), "code": _code()}


def same_libraries() -> bool:
    """Whether the file was traced by the releases that are here."""
    return _libraries().items() <= _index()["traced by"].items()


def graph_rows() -> list[dict[str, Any]]:
    """What the file says of each graph: the request, the member, the contract, the digest of its tensors."""
    return list(_index()["graphs"].values())


def _template(job: Job, dtypes: Sequence[Dtype]) -> Template:
    found = {dtype: _known(job, dtype) for dtype in dtypes}
    graphs = {dtype: graph for dtype, one in found.items() for graph in one.graphs.values()}
    (digest,) = {one.tensors for one in found.values()}
    return Template(name=job.name, key=job.key, tensors=digest, graphs=graphs)


def _known(job: Job, dtype: Dtype) -> Template:
    text = _request(job, dtype)
    name = hashlib.sha256(text.encode()).hexdigest()
    if is_current() and (row := _index()["graphs"].get(name)):
        with zipfile.ZipFile(FILE) as file:
            graph = Graph(content=file.read(row["content"]), spec=NetSpec.from_json(row["spec"]))
        return Template(name=job.name, key=job.key, tensors=row["tensors"], graphs={dtype: graph})
    if folder := os.environ.get(_MISSING):
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, name).write_text(text, encoding="utf-8")
    return trace_template(job, [dtype])


def _request(job: Job, dtype: Dtype) -> str:
    """A net to trace, as JSON."""
    said = {field.name: getattr(job.architecture, field.name) for field in fields(job.architecture)}
    said["parts"] = {
        part: {name: value for name, value in config.items() if name == "_class_name" or name[0] != "_"}
        for part, config in job.architecture.parts.items()
    }
    return json.dumps({"component": job.component, "dtype": dtype, "architecture": said}, sort_keys=True)


@cache
def _index() -> Any:
    try:
        with zipfile.ZipFile(FILE) as file:
            return json.loads(file.read(_INDEX))
    except FileNotFoundError:
        return {"traced by": {}, "graphs": {}}


@cache
def _libraries() -> dict[str, str]:
    found = {name: version(name) for name in _LIBRARIES}
    return {**found, "python": f"{sys.version_info.major}.{sys.version_info.minor}"}


@cache
def _code() -> str:
    """A hash of the code; comments and the layout of lines make no difference."""
    found = hashlib.sha256()
    for path in _files():
        content = ast.dump(ast.parse(path.read_bytes()))
        found.update(f"{path.relative_to(ROOT).as_posix()} {content}\n".encode())
    return found.hexdigest()


def _files() -> Iterator[Path]:
    for path in map(ROOT.joinpath, _CODE):
        yield from sorted(path.rglob("*.py")) if path.is_dir() else (path,)


def traced(text: str) -> tuple[dict[str, Any], bytes]:
    """What the index says of a graph, and the graph."""
    request = json.loads(text)
    architecture = Architecture(**request["architecture"])
    job = Job(name="", architecture=architecture, component=request["component"], key={})
    made = trace_template(job, [request["dtype"]])
    (graph,) = made.graphs.values()
    content = f"{hashlib.sha256(graph.content).hexdigest()}.onnx"
    row = {"request": text, "content": content, "spec": graph.spec.to_json(), "tensors": made.tensors}
    return row, graph.content


def main(folders: list[str]) -> None:
    """Trace what is in the file, and what was missing in it, and write it anew."""
    texts = {row["request"] for row in graph_rows()}
    texts |= {path.read_text(encoding="utf-8") for folder in folders for path in Path(folder).iterdir()}
    rows: dict[str, Any] = {}
    contents: dict[str, bytes] = {}
    with ProcessPoolExecutor(usable_processors(), mp_context=get_context("spawn")) as pool:
        for row, content in pool.map(traced, sorted(texts)):
            rows[hashlib.sha256(row["request"].encode()).hexdigest()] = row
            contents[row["content"]] = content
            print(f"{len(rows)} of {len(texts)}")
    index = {"traced by": {**_libraries(), "code": _code()}, "graphs": rows}
    contents[_INDEX] = json.dumps(index, sort_keys=True).encode()
    with zipfile.ZipFile(FILE, "w") as file:
        for name, content in sorted(contents.items()):
            file.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_BZIP2, 9)


if __name__ == "__main__":
    main(sys.argv[1:])
