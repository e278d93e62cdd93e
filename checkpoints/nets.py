"""A package's graphs, from a component's whole graph: its fp32 islands, the cut of the UNet, the files."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import onnx_ir as ir

from ..engines import spec
from ..engines.package import NetFile
from .files.source import Source
from .graphs.controls import add_controls
from .graphs.extra_embeddings import add_extra_embeddings
from .graphs.hoist import hoist, hoist_control
from .graphs.image_prompts import add_image_prompts
from .graphs.step import write_step
from .graphs.weights import forget_shapes
from .precision.calibration import CALIBRATIONS, Calibration
from .precision.islands import Found, find_islands, island_names, upcast_attention

# The file of a net's graph, where it is not "model".
_FILES = {
    "unet": "loop",
    "unet_context": "context",
    "unet_time": "time",
    "unet_controlled": "controlled",
    "unet_image_prompt": "image_prompt",
    "controlnet": "loop",
    "controlnet_context": "context",
    "controlnet_time": "time",
    "step_masked": "masked",
}


def set_islands(source: Source, component: str, model: ir.Model, calibration: Calibration) -> Found:
    """Let the nodes of an fp16 graph that need it compute in float32 (`precision.islands`).

    Raises:
        NumericError: as `find_islands`.
    """
    if source.parts[spec.NETS[component].part].config.get("upcast_attention"):
        upcast_attention(model)
    return find_islands(model, component, partial(CALIBRATIONS[component], calibration))


def write_graphs(
    component: str,
    folder: Path,
    model: ir.Model,
    contract: spec.NetSpec,
    *,
    dtype: str,
    weights: Sequence[str],
) -> dict[str, NetFile]:
    """Write the graph of a component, or those of a UNet or a ControlNet, cut after the islands are set.

    Args:
        component: a row of NETS that has weights; its folder in the package exists.
        folder: the package.
        model: its weights are attached.
        contract: of `model`.
        dtype: of the package, "fp16" or "fp32".
        weights: the names of the weights files in the manifest.

    Returns:
        The manifest's entry of each net.
    """
    graphs = {component: (model, contract)}
    if component == "unet":
        graphs = {"unet_whole": (model, contract), **hoist(model)}
        graphs["unet_controlled"] = add_controls(*graphs["unet"])
        graphs["unet_image_prompt"] = add_image_prompts(*graphs["unet_controlled"])
    elif component == "controlnet":
        graphs = hoist_control(model, contract)
    elif component in spec.TEXT_ENCODERS:
        graphs[component] = model, add_extra_embeddings(model, contract)
    files: dict[str, NetFile] = {}
    for name, (graph, boundary) in graphs.items():
        path = f"{component}/{_FILES.get(name, 'model')}.onnx"
        forget_shapes(graph)
        cast(Any, ir).save(graph, folder / path)
        islands = island_names(graph) if dtype == "fp16" else ()
        files[name] = NetFile(graph=path, weights=tuple(weights), spec=boundary, fp32_islands=islands)
    return files


def write_steps(folder: Path, unet: spec.NetSpec) -> dict[str, NetFile]:
    """Write the row updates between two calls of this UNet: plain, and keeping a picture outside a mask."""
    prediction = unet.outputs[0]
    (folder / "step").mkdir()
    files: dict[str, NetFile] = {}
    channels = prediction.shape[1]
    assert isinstance(channels, int)
    for name, make in (("step", spec.step), ("step_masked", spec.step_masked)):
        contract = make(channels=channels, float_dtype=prediction.dtype)
        path = f"step/{_FILES.get(name, 'model')}.onnx"
        write_step(folder / path, contract)
        files[name] = NetFile(graph=path, weights=(), spec=contract)
    return files
