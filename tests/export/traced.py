"""Nets traced and cleaned as an export does it, without a checkpoint or a package around them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import nn

from latentrt.checkpoints.graphs import weights
from latentrt.engines.spec import NetSpec
from latentrt.export.graphs import passes
from latentrt.export.graphs.to_onnx import to_onnx
from latentrt.export.nets.torch_net import Net

_STORED = {torch.float32: ("F32", ir.DataType.FLOAT), torch.float16: ("F16", ir.DataType.FLOAT16)}


def traced(
    module: nn.Module, contract: NetSpec, folder: Path, dtype: torch.dtype = torch.float32
) -> ir.Model:
    """The clean graph of a wrapper whose attribute `net` has the weights, which are written into `folder`."""
    module = module.eval().requires_grad_(False).to(dtype)
    stored, kind = _STORED[dtype]
    state = {key: value for key, value in module.state_dict().items() if value.is_floating_point()}
    names = {key: (key.removeprefix("net."), stored) for key in state}
    tensors = {names[key][0]: value for key, value in state.items()}
    slots = weights.write_weights(folder / weights.WEIGHTS, tensors, dict.fromkeys(tensors, kind))
    model = to_onnx(Net(module=module, spec=contract, tensors=names))
    weights.attach(model, folder, slots)
    passes.clean(model)
    return model


def runner(model: ir.Model, contract: NetSpec, path: Path) -> Callable[..., dict[str, Any]]:
    """Calls a graph, written beside its weights, on ONNX Runtime, checked by its contract."""
    weights.forget_shapes(model)
    cast(Any, ir).save(model, path)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [item.name for item in contract.outputs]

    def run(**arrays: np.ndarray) -> dict[str, Any]:
        contract.check(arrays)
        return dict(zip(names, session.run(names, arrays), strict=True))

    return run
