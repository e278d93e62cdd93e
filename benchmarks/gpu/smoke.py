"""The first steps of the GPU check on our side: whether the libraries load, and whether anything runs."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ...engines.backend import choose_backend
from ...engines.onnxruntime.cuda_libraries import load_libraries
from ...engines.onnxruntime.nets import CUDA, cuda_refusal
from ...engines.onnxruntime.session import library
from ...engines.spec import DTYPES
from ...runtime.loop.device.programs import input_shapes
from ..case import sizes_of
from ..records import Row
from .opener import Opener, Scale, attempt, row_of

_CHANNELS = 8


def environment(backend: str) -> Iterator[Row]:
    """What loads, or what the loader says; the document's `machine` has GPU, driver and versions."""
    if backend == "onnxruntime-cuda":
        for what, load in (("CUDA and cuDNN", load_libraries), ("the CUDA provider", _load_provider)):

            def row(what: str) -> Row:
                load()  # noqa: B023 - it is called at once
                return row_of(what)

            yield attempt(what, row)

    def described(what: str) -> Row:
        return row_of(what, {"is": choose_backend(backend)[1].describe()})

    yield attempt("backend", described)


def _load_provider() -> None:
    """As onnxruntime does, whose own message leaves out what is missing. Raises OSError, BackendError."""
    if refused := cuda_refusal():
        raise refused
    folder = Path(library().__file__).parent / "capi"
    (shared,) = folder.glob("*onnxruntime_providers_shared.*")
    (provider,) = folder.glob("*onnxruntime_providers_cuda.*")
    ctypes.CDLL(str(shared), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(provider))


def smoke(opener: Opener, scale: Scale) -> Iterator[Row]:
    """The least that can be run: `step`, one convolution, the UNet once; each has a row, with its error."""
    yield attempt("step", _run_net, opener, scale)
    yield attempt("convolution", _convolution)
    yield attempt("unet", _run_net, opener, scale)


def _run_net(what: str, opener: Opener, scale: Scale) -> Row:
    """A net on random numbers: what comes out is finite."""
    with opener.pipeline(nets=[what]) as opened:
        spec, random = opened.loop.nets[what].spec, np.random.default_rng(0)
        shapes = input_shapes(spec, sizes_of(scale.case, opener.package.manifest))
        kinds = {item.name: DTYPES[item.dtype] for item in spec.inputs}
        arrays = {name: random.random(shape).astype(kinds[name]) for name, shape in shapes.items()}
        outputs = opened.loop.call(what, **arrays)
    bad = [name for name, array in outputs.items() if not np.isfinite(array).all()]
    return row_of(what, problems=[f"{', '.join(bad)} is not finite"] if bad else [])


def _convolution(what: str) -> Row:
    """Ones by ones, by a session of its own: cuDNN and nothing of ours."""
    import onnx_ir as ir

    load_libraries()
    half, shape = ir.TensorType(ir.DataType.FLOAT16), (1, _CHANNELS, 16, 16)
    image = ir.val("x", shape=shape, type=half)
    kernel = ir.tensor(np.ones((_CHANNELS, _CHANNELS, 1, 1), np.float16), name="kernel")
    weight = ir.val("kernel", const_value=kernel)
    node = ir.node("Conv", [image, weight], outputs=[ir.val("y", shape=shape, type=half)])
    graph = ir.Graph([image], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 20})
    content = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    session = library().InferenceSession(content, providers=[CUDA], enable_fallback=0)
    if CUDA not in session.get_providers():
        return row_of(what, problems=["onnxruntime ran it on the CPU: its CUDA provider did not load"])
    (found,) = session.run(None, {"x": np.ones(shape, np.float16)})
    wrong = f"ones by ones came to {found.min():g} to {found.max():g}, not {_CHANNELS}"
    return row_of(what, problems=[] if (found == _CHANNELS).all() else [wrong])
