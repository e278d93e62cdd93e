"""Torch module -> ONNX graph at opset 23, with dynamic sizes under the contract's symbols."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, cast

import onnx_ir as ir
import torch

from ..engines.spec import NetSpec, TensorSpec
from .nets import Net

# 23 has Attention, and 21 GroupNormalization with statistics in float32: both reach engines as one operator.
OPSET = 23

# Sizes to trace with. Odd and all different, so that the tracer can take no two for one and none for a
# multiple of eight (see nets.WholeUnet); two rows, since it specialises on one.
SIZES: Mapping[str, int] = {"B": 2, "N": 2, "P": 2, "T": 78, "H/8": 17, "W/8": 25}


def example(contract: NetSpec, sizes: Mapping[str, int], seed: int = 0) -> list[torch.Tensor]:
    """Random inputs of a realistic scale: unit normal, timesteps 0 ... 999, token ids below 100."""
    generator = torch.Generator().manual_seed(seed)
    return [_random(item, sizes, generator) for item in contract.inputs]


def _random(item: TensorSpec, sizes: Mapping[str, int], generator: torch.Generator) -> torch.Tensor:
    shape = [dim if isinstance(dim, int) else sizes[dim] for dim in item.shape]
    if item.dtype == "int32":
        return torch.randint(0, 100, shape, dtype=torch.int32, generator=generator)
    if item.name == "timestep":
        return torch.randint(0, 1000, shape, generator=generator).float()
    return torch.randn(shape, generator=generator).to(getattr(torch, item.dtype))


def to_onnx(net: Net) -> ir.Model:
    """Trace a net. Its initializers are torch's own parameters still, under the checkpoint's names.

    torch's optimiser stays off: it folds transposes into weights, which then have no name any more.
    """
    inputs = example(net.spec, SIZES)
    dynamic = [
        {axis: torch.export.Dim.DYNAMIC for axis, dim in enumerate(item.shape) if isinstance(dim, str)}
        for item in net.spec.inputs
    ]
    with torch.no_grad(), _quiet():
        program = cast(Any, torch.onnx).export(
            net.module,
            tuple(inputs),
            dynamic_shapes=tuple(dynamic),
            input_names=[item.name for item in net.spec.inputs],
            output_names=[item.name for item in net.spec.outputs],
            opset_version=OPSET,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    model = program.model
    assert isinstance(model, ir.Model)
    for name, value in list(model.graph.initializers.items()):
        if name in net.tensors:
            value.name = net.tensors[name][0]
    _name_sizes(model, net.spec)
    return model


def _name_sizes(model: ir.Model, contract: NetSpec) -> None:
    """Write the contract's symbols where torch has `s53` and the like."""
    symbols: dict[str, str] = {}
    for value, item in zip(model.graph.inputs, contract.inputs, strict=True):
        for found, dim in zip(value.shape or (), item.shape, strict=True):
            if isinstance(found, ir.SymbolicDim) and isinstance(dim, str):
                symbols[str(found.value)] = dim
    for value in _values(model):
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(dim, symbols) for dim in value.shape])
    for value, item in zip(model.graph.outputs, contract.outputs, strict=True):
        value.shape = ir.Shape(item.shape)


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    for node in model.graph:
        yield from node.outputs


def _renamed(dim: int | ir.SymbolicDim, symbols: Mapping[str, str]) -> int | str | None:
    if isinstance(dim, int) or dim.value is None:
        return dim if isinstance(dim, int) else None
    return re.sub(r"\bs\d+\b", lambda match: symbols.get(match[0], match[0]), str(dim.value))


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Silence what torch says of itself: operators of torchvision, and its own deprecations."""
    loggers: Sequence[logging.Logger] = [
        logging.getLogger("torch.onnx._internal.exporter._registration"),
        logging.getLogger("torch.utils._sympy.interp"),
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message=r".*isinstance\(treespec, LeafSpec\)", category=FutureWarning
            )
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
