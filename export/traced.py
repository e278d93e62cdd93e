"""The graphs of any architecture that torch's libraries know, traced on shapes alone.

A graph says nothing of what the weights are, so a net is traced with memory that nobody writes, for a
checkpoint as for a template that ships.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from importlib.metadata import version

import onnx_ir as ir
import torch

from ..checkpoints.files.open import Checkpoint
from ..checkpoints.files.source import Source
from ..checkpoints.graphs import weights
from ..checkpoints.manifest import LatentRgb
from ..checkpoints.templates.archive import Dtype
from ..engines.installed import latentrt_version
from ..engines.spec import NetSpec
from .graphs import passes
from .graphs.to_onnx import to_onnx
from .latent_rgb import fit_latent_rgb
from .nets.build import NETS
from .nets.torch_net import SHAPES_ALONE, torch_threads

_TORCH_TYPES = {"fp16": torch.float16, "fp32": torch.float32}
_PRODUCERS = ("torch", "diffusers", "transformers", "onnxscript")


class TracedGraphs:
    """`checkpoints.writing.Graphs` of a checkpoint, made by torch."""

    def __init__(self, source: Checkpoint, dtype: Dtype) -> None:
        self._source = source
        self._dtype: Dtype = dtype

    @property
    def producer(self) -> str:
        """This release, and the libraries that decide what is traced."""
        libraries = (f"{name} {version(name)}" for name in _PRODUCERS)
        return ", ".join((f"latentrt {latentrt_version()}", *libraries))

    @torch_threads()
    def check(self, component: str) -> None:
        """Raise CheckpointError if the weights do not fit the config, are not finite or beyond the type."""
        NETS[component].build(self._source, _TORCH_TYPES[self._dtype])

    def graph(self, component: str) -> tuple[ir.Model, NetSpec]:
        """The traced graph with unbound weights, and its contract."""
        found = trace(without_weights(self._source), component, self._dtype)
        gc.collect()  # torch's module, and what ONNX Runtime takes next, need not be in memory together
        return found

    @torch_threads()
    def latent_rgb(self) -> LatentRgb:
        """Fitted to the checkpoint's own encoder."""
        return fit_latent_rgb(self._source)

    def of(self, source: Source) -> TracedGraphs:
        """The graphs of the same checkpoint with other weights."""
        assert isinstance(source, Checkpoint)
        return TracedGraphs(source, self._dtype)


def without_weights(source: Checkpoint) -> Checkpoint:
    """A checkpoint of which only the configs are known: what is traced."""
    parts = {name: replace(part, folder=SHAPES_ALONE, tensors={}) for name, part in source.parts.items()}
    return replace(source, parts=parts)


@torch_threads()
def trace(blank: Source, component: str, dtype: Dtype) -> tuple[ir.Model, NetSpec]:
    """The graph of a net of `without_weights` after `passes.clean`, its weights unbound, and its contract."""
    net = NETS[component].build(blank, _TORCH_TYPES[dtype])
    model = to_onnx(net)
    names = {name for name, _ in net.tensors.values()}
    weights.unbind(model, names)
    passes.clean(model)
    kept = weights.weight_shapes(model).keys()
    assert kept == names, f"{component} does not read {sorted(names - kept)}"
    return model, net.spec
