"""The package's graphs in ONNX Runtime on CUDA, bound to device memory, on one stream.

As the library is by default, but for TF32, which would be another arithmetic than everyone else's in fp32.
Its convolutions are searched by measuring, in the first run of a shape; ours take its quick choice.
"""

from __future__ import annotations

from functools import partial

from ...engines.onnxruntime.nets import CUDA, cuda_available, open_onnxruntime_net
from ...engines.onnxruntime.session import library
from .contract import OpenSide, Task
from .plain_device_loop import open_on_cuda

_SEARCH = "EXHAUSTIVE"


def available(task: Task) -> str | None:
    """None if it can run here, else the reason."""
    del task
    return cuda_available()


def open_side(task: Task) -> OpenSide:
    """A session for each net. Raises BackendError, PackageError, MemoryLimitError."""
    versions = {
        "onnxruntime": str(library().__version__),
        "provider": CUDA,
        "io_binding": "one stream, one wait for a picture",
        "cudnn_conv_algo_search": _SEARCH,
        "prefer_nhwc": "0",
        "use_tf32": "0",
    }
    open_net = partial(open_onnxruntime_net, conv_search=_SEARCH, threads=task.threads)
    return open_on_cuda("onnxruntime-cuda", task, open_net, versions)
