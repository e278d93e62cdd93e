"""Torch module -> ONNX graph at opset 23, with dynamic sizes under the contract's symbols."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Generator, Mapping
from typing import Any, cast

import onnx_ir as ir
import torch

from ...engines.spec import NetSpec, TensorSpec
from ..nets.torch_net import Net

# 23 has Attention, 21 GroupNormalization with statistics in float32: each reaches engines as one operator.
OPSET = 23

# Sizes to trace with. They are odd and all different, so that the tracer can take no two for the same and
# none for a multiple of eight (see nets.WholeUnet). There are two rows, since it specialises on one.
SIZES: Mapping[str, int] = {
    "B": 2,
    "N": 2,
    "P": 2,
    "T": 78,
    "I": 17,
    "H/8": 17,
    "W/8": 25,
    "H": 136,
    "W": 200,
}
# Inputs of whole numbers below this, and inputs of one constant; all others are unit normal.
_WHOLE = {"timestep": 1000, "noise_level": 1000, "time_ids": 1024, "input_ids": 100, "image": 256}
_ONE = {"clip_skip": 0.0, "alpha": 0.8, "sigma": 0.6}  # alpha^2 + sigma^2 = 1


def example(contract: NetSpec, sizes: Mapping[str, int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random inputs by name, of a realistic scale: unit normal, timesteps 0 ... 999, token ids below 100."""
    generator = torch.Generator().manual_seed(seed)
    return {item.name: _random(item, sizes, generator) for item in contract.inputs}


def _random(item: TensorSpec, sizes: Mapping[str, int], generator: torch.Generator) -> torch.Tensor:
    shape = [dim if isinstance(dim, int) else sizes[dim] for dim in item.shape]
    dtype = getattr(torch, item.dtype)
    if item.name in _ONE:
        return torch.full(shape, _ONE[item.name], dtype=dtype)
    if item.name in _WHOLE:
        return torch.randint(0, _WHOLE[item.name], shape, generator=generator).to(dtype)
    if item.name == "mask":  # 0 is kept, 255 painted
        return torch.randint(0, 2, shape, generator=generator).to(dtype) * 255
    return torch.randn(shape, generator=generator).to(dtype)


def to_onnx(net: Net) -> ir.Model:
    """Trace a net. The initializers are still torch's own parameters, under the names the package stores.

    torch's optimiser stays off: it folds transposes into weights, which then lose their names.
    """
    larger = {side: SIZES[side] * net.multiple // 8 for side in ("H", "W")}
    inputs = example(net.spec, {**SIZES, **larger})
    dynamic = {
        item.name: {
            axis: torch.export.Dim.DYNAMIC for axis, dim in enumerate(item.shape) if isinstance(dim, str)
        }
        for item in net.spec.inputs
    }
    with torch.no_grad(), _quiet():
        # Left to itself, torch.onnx would defer guards, fail on the UNet and trace it again with Dynamo,
        # which takes four times as long.
        traced = torch.export.export(net.module, (), kwargs=inputs, dynamic_shapes=dynamic, strict=False)
        program = cast(Any, torch.onnx).export(
            traced,
            kwargs=inputs,
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
    """Write the contract's symbols in place of torch's, such as `s53`."""
    symbols: dict[str, str] = {}
    for value, item in zip(model.graph.inputs, contract.inputs, strict=True):
        for found, dim in zip(value.shape or (), item.shape, strict=True):
            if isinstance(found, ir.SymbolicDim) and isinstance(dim, str):
                symbols[str(found.value)] = dim
    for value in (*model.graph.inputs, *(value for node in model.graph for value in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(dim, symbols) for dim in value.shape])
    for value, item in zip(model.graph.outputs, contract.outputs, strict=True):
        value.shape = ir.Shape(item.shape)


def _renamed(dim: int | ir.SymbolicDim, symbols: Mapping[str, str]) -> int | str | None:
    if isinstance(dim, int) or dim.value is None:
        return dim if isinstance(dim, int) else None
    return re.sub(r"\bs\d+\b", lambda match: symbols.get(match[0], match[0]), str(dim.value))


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Silence torch's messages about torchvision's operators and its own deprecations."""
    names = ("torch.onnx._internal.exporter._registration", "torch.utils._sympy.interp")
    loggers = {logging.getLogger(name): logging.getLogger(name).level for name in names}
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            deprecation = r".*isinstance\(treespec, LeafSpec\)"
            warnings.filterwarnings("ignore", message=deprecation, category=FutureWarning)
            yield
    finally:
        for logger, level in loggers.items():
            logger.setLevel(level)
