"""The template of a checkpoint's net, or what keeps it from having one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ...engines import spec
from ...engines.errors import CheckpointError, command
from ...engines.installed import install_command
from ..files.file_kinds import STEER
from ..files.net_reads import net_tensors
from ..files.source import Source
from .archive import SHIPPED, Dtype, read_graph, read_index
from .keys import differences, net_key, tensors_digest

if TYPE_CHECKING:
    import onnx_ir as ir


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


def net_template(source: Source, component: str, dtype: Dtype, *, archive: Path = SHIPPED) -> NetTemplate:
    """The template of a component, such as "unet" or "preview_decoder", for a checkpoint.

    Raises:
        CheckpointError: no template fits its config and its tensors.
        PackageError: the archive is missing, damaged, or of another release.
    """
    row = _row(source, component, archive)
    return _read(archive, row, row["graphs"][dtype])


def check_templates(source: Source, components: Iterable[str], archive: Path = SHIPPED) -> None:
    """Raise as `net_template` does where one of these has no template, without reading a graph."""
    for component in components:
        _row(source, component, archive)


def _row(source: Source, component: str, archive: Path) -> dict[str, Any]:
    """The index's row of the template that fits a component."""
    rows = _fitting(source, component, read_index(archive))
    shapes = {name: header.shape for name, header in net_tensors(source, component).items()}
    digest = tensors_digest(shapes)
    for row in rows:
        if row["tensors"] == digest:
            return row
    # The types of a template have the same tensors.
    return _refuse_tensors(
        source, component, shapes, [_read(archive, row, next(iter(row["graphs"].values()))) for row in rows]
    )


def _read(archive: Path, row: Mapping[str, Any], graph: Mapping[str, Any]) -> NetTemplate:
    return NetTemplate(
        architecture=row["architecture"],
        model=read_graph(archive, graph),
        spec=spec.NetSpec.from_json(graph["spec"]),
        digest=graph["sha256"],
    )


def _fitting(source: Source, component: str, index: Mapping[str, Any]) -> list[dict[str, Any]]:
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
    source: Source,
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
    from ..graphs.weights import weight_shapes  # reads graphs, which are needed for this message alone

    wanted = weight_shapes(model)
    names = dict.fromkeys((*wanted, *shapes))
    pairs = [(name, shapes.get(name), wanted.get(name)) for name in names]
    return [(name, shape, other) for name, shape, other in pairs if shape != other]


def _refuse(source: Source, component: str, reason: str) -> NoReturn:
    part = source.parts[spec.NETS[component].part]
    refused = f"{part.folder} ({part.name}) fits no graph that is shipped: {reason}"
    if STEER.keys() & source.parts.keys():  # it is a control
        raise CheckpointError(
            refused,
            expected="a control of an architecture in circulation: no other is traced",
            fix="Use one of these. If it is one, pass the folder with its config.json in place of a single"
            " file: tensors do not say everything.",
        )
    given = [
        word
        for name, option in (("vae", "--vae"), ("tiny_vae", "--tiny-vae"))
        if name in source.parts and not source.parts[name].folder.is_relative_to(source.root)
        for word in (option, source.parts[name].folder)
    ]
    export = command("latentrt", "export", source.root, "-o", "PACKAGE", *given)
    raise CheckpointError(
        refused,
        expected="an architecture in circulation",
        fix=f"Export it, which traces it with torch ({install_command('cpu,export')}): {export}",
    )
