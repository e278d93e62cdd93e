"""A package, written net by net: one order of stages, wherever its graphs come from and its weights go.

The two seams are `Graphs` (templates here, traces in `export/traced.py`) and `Weights` (copied here, left
where they are in `making.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import onnx_ir as ir

from ..engines import spec
from ..engines.installed import latentrt_version
from ..engines.package import NetFile, write_manifest
from .contents import Content
from .files.component import TensorHeader, read_tensors
from .files.net_reads import net_tensors
from .files.open import Checkpoint
from .files.source import Source
from .files.values import check_values
from .graphs.weights import WEIGHTS, attach, stored_type, write_weights
from .manifest import LatentRgb, manifest_of, published_latent_rgb, source_facts
from .nets import set_islands, write_graphs, write_steps
from .precision.calibration import Calibration, Tokenize, components
from .precision.islands import Found
from .stages import OnProgress, stages
from .templates.archive import SHIPPED, Dtype
from .templates.find import check_templates, net_template

# Compares the nets of a component that were written with something else: its name, the package's folder, and
# the manifest's entries of its nets.
Verify = Callable[[str, Path, Mapping[str, NetFile]], None]


class Graphs(Protocol):
    """Where the graphs of a checkpoint's components come from."""

    @property
    def producer(self) -> str:
        """The programs that made them, for the manifest."""
        ...

    def check(self, component: str) -> None:
        """Raise CheckpointError if the weights do not fit the graph, or are not finite or beyond its type."""
        ...

    def graph(self, component: str) -> tuple[ir.Model, spec.NetSpec]:
        """The whole graph with unbound weights (`graphs.weights.is_weight`), and its contract."""
        ...

    def latent_rgb(self) -> LatentRgb:
        """`Manifest.latent_rgb`."""
        ...

    def of(self, source: Source) -> Graphs:
        """The graphs of the same checkpoint with other weights."""
        ...


class Weights(Protocol):
    """Where the weights of a package are."""

    @property
    def elsewhere(self) -> Mapping[str, Content]:
        """The weights files outside the package, by their names in the manifest."""
        ...

    def attach(self, component: str, model: ir.Model, folder: Path) -> list[str]:
        """Bind the unbound weights of a graph; `folder` is the package, and has a folder for the component.

        Returns:
            The names of the weights files in the manifest.
        """
        ...


class TemplateGraphs:
    """The graphs that ship, for a checkpoint whose components all have one.

    Args:
        source: the checkpoint.
        dtype: the arithmetic of the graphs.
        archive: the archive of graphs.

    Raises:
        CheckpointError: no template fits a component.
        PackageError: the archive is missing, damaged, or of another release.
    """

    def __init__(self, source: Source, dtype: Dtype, archive: Path = SHIPPED) -> None:
        self._source, self._archive = source, archive
        self._dtype: Dtype = dtype
        check_templates(source, components(source), archive)  # before gigabytes are read

    @property
    def producer(self) -> str:
        """This release: the archive knows by which libraries it was made."""
        return f"latentrt {latentrt_version()}"

    def check(self, component: str) -> None:
        """Raise CheckpointError for weights that are not finite or beyond the type."""
        part = self._source.parts[spec.NETS[component].part]
        check_values(part.folder, net_tensors(self._source, component), spec.FLOAT_TYPES[self._dtype])

    def graph(self, component: str) -> tuple[ir.Model, spec.NetSpec]:
        """The template, and its contract."""
        template = net_template(self._source, component, self._dtype, archive=self._archive)
        return template.model, template.spec

    def latent_rgb(self) -> LatentRgb:
        """What was published for autoencoders that scale as this one."""
        assert isinstance(self._source, Checkpoint)
        return published_latent_rgb(self._source)

    def of(self, source: Source) -> Graphs:
        """The same graphs, whose weights `check` reads of `source`."""
        other = copy(self)
        other._source = source
        return other


class CopiedWeights:
    """Weights that the package has a copy of, in the checkpoint's type where that is narrower."""

    elsewhere: Mapping[str, Content] = {}

    def __init__(self, source: Source) -> None:
        self._source = source

    def attach(self, component: str, model: ir.Model, folder: Path) -> list[str]:
        """Copy the weights, and bind the graph to the copies; their file's name in the manifest."""
        tensors = net_tensors(self._source, component)
        types = {
            name: stored_type(tensors[name].dtype, compute)
            for name, compute in weight_types(model, tensors).items()
        }
        return copy_weights(component, model, folder, tensors, types)


def weight_types(model: ir.Model, tensors: Mapping[str, TensorHeader]) -> dict[str, ir.DataType]:
    """What a graph computes with, of each of these weights, in the graph's order."""
    found = model.graph.initializers.items()
    return {name: value.dtype or ir.DataType.FLOAT for name, value in found if name in tensors}


def copy_weights(
    component: str,
    model: ir.Model,
    folder: Path,
    tensors: Mapping[str, TensorHeader],
    types: Mapping[str, ir.DataType],
) -> list[str]:
    """Write the weights of a component into the package at `folder`, and bind its graph to them.

    They are written in the order of `types`, which names each and has the type to store it in.

    Returns:
        The name of the file in the manifest.
    """
    arrays = read_tensors({name: tensors[name] for name in types})
    attach(model, write_weights(folder / component / WEIGHTS, arrays, types))
    return [f"{component}/{WEIGHTS}"]


def write_package(
    source: Source,
    folder: Path,
    *,
    graphs: Graphs,
    weights: Weights,
    dtype: Dtype,
    tokenize: Tokenize,
    progress: OnProgress | None = None,
    report_islands: Callable[[Found], None] | None = None,
    verify: Verify | None = None,
    identity: str = "",
) -> None:
    """Write the package of a checkpoint. One net at a time is in memory.

    Args:
        source: the checkpoint.
        folder: the package; it is empty.
        graphs, weights: the two seams.
        dtype: the arithmetic of the graphs.
        tokenize: reads prompts for the ranges that fp16 graphs are measured on.
        progress: called with each stage as it begins.
        report_islands: called with what measuring each component's ranges found (fp16 only).
        verify: called with each component once it is written.
        identity: as in `Manifest`.

    Raises:
        CheckpointError: weights that `graphs` refuses.
        NumericError: a net's values are not finite, or beyond fp16 where that is asked for.
        OSError: the folder cannot be written.
    """
    source_facts(source)  # raises for what no manifest can have
    names, measures = components(source), dtype == "fp16"
    begin = stages(len(names) * (2 + measures + (verify is not None)) + 1, progress)
    for component in names:  # what does not fit is named before anything is made
        begin(f"check {component}")
        graphs.check(component)
    for name, write_tokenizer in source.tokenizers.items():
        write_tokenizer(folder / name)
    calibration = Calibration(source, tokenize) if measures else None
    nets: dict[str, NetFile] = {}
    for component in names:
        begin(f"make {component}")
        (folder / component).mkdir()
        model, contract = graphs.graph(component)
        files = weights.attach(component, model, folder)
        if calibration is not None:
            begin(f"measure {component}")
            found = set_islands(source, component, model, calibration)
            if report_islands is not None:
                report_islands(found)
        written = write_graphs(component, folder, model, contract, dtype=dtype, weights=files)
        if verify is not None:
            begin(f"verify {component}")
            verify(component, folder, written)
        nets |= written
    begin("package")
    if "unet" in nets:
        nets |= write_steps(folder, nets["unet"].spec)
    manifest = manifest_of(source, dtype, nets, latent_rgb=graphs.latent_rgb, producer=graphs.producer)
    used = {name for net in nets.values() for name in net.weights}
    records = {name: content.record for name, content in weights.elsewhere.items() if name in used}
    elsewhere = {name: content.elsewhere for name, content in weights.elsewhere.items()}
    write_manifest(folder, replace(manifest, files=records, identity=identity), elsewhere=elsewhere)
