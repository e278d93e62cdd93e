"""The archive of templates: one file, of which a lookup decompresses the index and one graph.

A zip file of graphs in ONNX's format, and `index.json`. A graph's weights are external data that lies
nowhere; names, types and shapes are the package's. Compressed by bzip2, two thirds of what deflating would
take: the wheel has a limit.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from ...engines import spec
from ...engines.errors import PackageError
from .keys import Defaults, Key

if TYPE_CHECKING:
    import onnx_ir as ir

SHIPPED = Path(__file__).parent / "templates.zip"
# What the archive's readers agree on. It changes with the index, with the keys, and with what exports write:
# a package of an older exporter may differ in nodes and names from that of this one.
SCHEMA = 1
Dtype = Literal["fp16", "fp32"]
DTYPES: tuple[Dtype, ...] = ("fp16", "fp32")
_INDEX = "index.json"
_MADE_IN = (1980, 1, 1, 0, 0, 0)  # zip's first moment: equal graphs make equal archives
_REMAKE = "Install the release again, or make the archive anew: python -m latentrt.export.templates"


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A template in one type: an ONNX file's content, and the net's contract."""

    content: bytes
    spec: spec.NetSpec


@dataclass(frozen=True, kw_only=True)
class Template:
    """What is written of a net.

    Attributes:
        name: an architecture that has it.
        key: what a checkpoint's configs must say.
        tensors: the digest of its weights' names and shapes.
        graphs: by the types of DTYPES.
    """

    name: str
    key: Key
    tensors: str
    graphs: Mapping[str, Graph]


def archive_sha256(archive: Path = SHIPPED) -> str:
    """The sha256 (hex) of an archive: other templates make other packages.

    Raises:
        PackageError: it is missing.
    """
    try:
        return hashlib.sha256(archive.read_bytes()).hexdigest()
    except OSError as error:
        raise PackageError(
            f"{archive} cannot be read ({error})", expected="an archive of templates", fix=_REMAKE
        ) from error


def write_archive(path: Path, templates: Sequence[Template], *, defaults: Defaults, producer: str) -> None:
    """Write `templates`. `defaults` are those that their keys were made with; `producer` is for people."""
    rows: list[dict[str, Any]] = []
    with zipfile.ZipFile(path, "w") as file:
        for number, template in enumerate(templates):
            graphs: dict[str, Any] = {}
            for dtype, graph in template.graphs.items():
                name = f"{number:02}-{template.name}-{template.key['net']}-{dtype}.onnx"
                file.writestr(zipfile.ZipInfo(name, _MADE_IN), graph.content, zipfile.ZIP_BZIP2, 9)
                digest = hashlib.sha256(graph.content).hexdigest()
                graphs[dtype] = {"file": name, "sha256": digest, "spec": graph.spec.to_json()}
            rows.append(
                {
                    "architecture": template.name,
                    "key": template.key,
                    "tensors": template.tensors,
                    "graphs": graphs,
                }
            )
        index = {"schema": SCHEMA, "producer": producer, "defaults": defaults, "templates": rows}
        file.writestr(zipfile.ZipInfo(_INDEX, _MADE_IN), json.dumps(index), zipfile.ZIP_BZIP2, 9)


def read_index(archive: Path) -> dict[str, Any]:
    """What `write_archive` wrote. Raises PackageError for an archive that this release cannot read."""
    content = _member(archive, _INDEX)
    try:
        index: dict[str, Any] = json.loads(content)
        schema = index["schema"]
    except (ValueError, KeyError, TypeError) as error:
        _refuse_archive(archive, error)
    if schema != SCHEMA:
        raise PackageError(
            f"{archive} has templates of schema {schema}",
            expected=f"schema {SCHEMA}, this release's",
            fix=_REMAKE,
        )
    return index


def _member(archive: Path, name: str) -> bytes:
    """Decompress one file of the archive. zip files have checksums, so what is returned was written."""
    try:
        with zipfile.ZipFile(archive) as file:
            return file.read(name)
    except (OSError, KeyError, EOFError, zipfile.BadZipFile, RuntimeError) as error:
        _refuse_archive(archive, error)


def _refuse_archive(archive: Path, error: Exception) -> NoReturn:
    raise PackageError(
        f"{archive} cannot be read ({error})", expected="an archive of templates", fix=_REMAKE
    ) from error


def read_graph(archive: Path, graph: Mapping[str, Any]) -> ir.Model:
    """A graph of the index: what a template's row has under "graphs" and a type.

    Raises:
        PackageError: the archive is damaged.
    """
    import onnx  # which onnx-ir depends on
    import onnx_ir as ir

    return ir.from_proto(onnx.load_model_from_string(_member(archive, graph["file"])))
