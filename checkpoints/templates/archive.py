"""The archive of templates: one file, of which a lookup decompresses the index and one graph.

A zip file of graphs in ONNX's format, compressed with LZMA, and `index.json`. A graph's weights are external
data that lies nowhere; names, types and shapes are the package's.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from ...engines import spec
from ...engines.errors import CheckpointError, PackageError, command
from ..files.net_reads import net_tensors
from ..files.open import Checkpoint
from ..graphs.weights import weight_shapes
from .keys import Defaults, Key, differences, net_key, tensors_digest

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
_REMAKE = "Install latentrt again, or make the archive anew: python -m latentrt.export.templates"


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


@dataclass(frozen=True, kw_only=True)
class NetTemplate:
    """A net's graph before hoisting and islands, with unbound weights (`graphs.weights.is_weight`).

    Attributes:
        architecture: the name of one that has the net, for people.
        model: inputs and outputs have the contract's names, types and symbols.
        spec: the contract.
        digest: SHA-256 of the graph's file, for what is kept of it elsewhere.
    """

    architecture: str
    model: ir.Model
    spec: spec.NetSpec
    digest: str


def net_template(source: Checkpoint, component: str, dtype: Dtype, *, archive: Path = SHIPPED) -> NetTemplate:
    """The template of a component, such as "unet" or "preview_decoder", for a checkpoint.

    Raises:
        CheckpointError: no template fits its config and its tensors.
        PackageError: the archive is missing, damaged, or of another release.
    """
    rows = _fitting(source, component, read_index(archive))
    shapes = {name: header.shape for name, header in net_tensors(source, component).items()}
    digest = tensors_digest(shapes)
    row = next((row for row in rows if row["tensors"] == digest), None)
    if row is None:
        _refuse_tensors(source, component, shapes, [_read(archive, row, dtype) for row in rows])
    return _read(archive, row, dtype)


def write_archive(path: Path, templates: Sequence[Template], *, defaults: Defaults, producer: str) -> None:
    """Write `templates`. `defaults` are those that their keys were made with; `producer` is for people."""
    rows: list[dict[str, Any]] = []
    with zipfile.ZipFile(path, "w") as file:
        for number, template in enumerate(templates):
            graphs: dict[str, Any] = {}
            for dtype, graph in template.graphs.items():
                name = f"{number:02}-{template.name}-{template.key['net']}-{dtype}.onnx"
                file.writestr(zipfile.ZipInfo(name, _MADE_IN), graph.content, zipfile.ZIP_LZMA)
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
        file.writestr(zipfile.ZipInfo(_INDEX, _MADE_IN), json.dumps(index), zipfile.ZIP_LZMA)


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
    except (OSError, KeyError, EOFError, zipfile.BadZipFile, lzma.LZMAError, NotImplementedError) as error:
        _refuse_archive(archive, error)


def _refuse_archive(archive: Path, error: Exception) -> NoReturn:
    raise PackageError(
        f"{archive} cannot be read ({error})", expected="an archive of templates", fix=_REMAKE
    ) from error


def _fitting(source: Checkpoint, component: str, index: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The templates with the component's key. Raises CheckpointError for none."""
    key = net_key(source, component, index["defaults"])
    rows = [row for row in index["templates"] if row["key"]["net"] == key["net"]]
    found = [(differences(key, row["key"]), row) for row in rows]
    if fitting := [row for differing, row in found if not differing]:
        return fitting
    if not found:
        _refuse(source, component, f"there is none of a {component}")
    differing, nearest = min(found, key=lambda pair: len(pair[0]))
    name, value, other = differing[0]
    place = f"in the nearest ({nearest['architecture']})"
    return _refuse(source, component, f"{name} is {value!r:.200}, {place} {other!r:.200}")


def _refuse_tensors(
    source: Checkpoint,
    component: str,
    shapes: Mapping[str, tuple[int, ...]],
    templates: Sequence[NetTemplate],
) -> NoReturn:
    """Raise CheckpointError that names the first tensor that is not as in the nearest template."""
    found = [(_odd_tensors(shapes, template.model), template) for template in templates]
    odd, nearest = min(found, key=lambda pair: len(pair[0]))
    name, shape, wanted = odd[0]
    place = f"in the nearest ({nearest.architecture})"
    if shape is None:
        _refuse(source, component, f"the tensor {name!r} of shape {wanted} is missing, which is {place}")
    if wanted is None:
        _refuse(source, component, f"the tensor {name[:200]!r} is not {place}")
    _refuse(source, component, f"the tensor {name!r} has the shape {shape}, {place} {wanted}")


def _odd_tensors(
    shapes: Mapping[str, tuple[int, ...]], model: ir.Model
) -> list[tuple[str, tuple[int, ...] | None, tuple[int, ...] | None]]:
    """The tensors that differ: name, the checkpoint's shape and the template's, None for a missing one."""
    wanted = weight_shapes(model)
    names = dict.fromkeys((*wanted, *shapes))
    pairs = [(name, shapes.get(name), wanted.get(name)) for name in names]
    return [(name, shape, other) for name, shape, other in pairs if shape != other]


def _refuse(source: Checkpoint, component: str, reason: str) -> NoReturn:
    part = source.parts[spec.NETS[component].part]
    export = command("latentrt", "export", source.root, "-o", "PACKAGE")
    raise CheckpointError(
        f"{part.folder} ({part.name}) fits no graph that is shipped: {reason}",
        expected="an architecture in circulation",
        fix=f'Export it, which needs `pip install "latentrt[export]"`: {export}',
    )


def _read(archive: Path, row: Mapping[str, Any], dtype: Dtype) -> NetTemplate:
    """Decompress a graph."""
    import onnx  # which onnx-ir depends on
    import onnx_ir as ir

    graph = row["graphs"][dtype]
    return NetTemplate(
        architecture=row["architecture"],
        model=ir.from_proto(onnx.load_model_from_string(_member(archive, graph["file"]))),
        spec=spec.NetSpec.from_json(graph["spec"]),
        digest=graph["sha256"],
    )
