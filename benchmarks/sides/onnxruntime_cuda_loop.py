"""The package's graphs in ONNX Runtime on CUDA, bound to device memory, on one stream.

As the library is by default, but for TF32, which would be another arithmetic than everyone else's in fp32.
Its convolutions are searched by measuring, in the first run of a shape; ours take its quick choice.
"""

from __future__ import annotations

from contextlib import ExitStack, closing

from ...engines.onnxruntime.nets import CUDA, cuda_available, open_onnxruntime_net
from ...engines.onnxruntime.session import library
from .contract import OpenSide, Task
from .plain_device_loop import DEVICE_NETS, plain_device_side
from .requirements import open_plain_package

NAME = "onnxruntime-cuda"
_SEARCH = "EXHAUSTIVE"


def available(task: Task) -> str | None:
    """None if it can run here, else the reason."""
    del task
    return cuda_available()


def open_side(task: Task) -> OpenSide:
    """A session for each net. Raises BackendError, PackageError, MemoryLimitError."""
    from ...engines.cuda.device import CudaDevice

    package = open_plain_package(task)
    with ExitStack() as stack:
        device = stack.enter_context(closing(CudaDevice()))
        nets = {
            name: stack.enter_context(
                closing(
                    open_onnxruntime_net(package, name, device, conv_search=_SEARCH, threads=task.threads)
                )
            )
            for name in DEVICE_NETS
        }
        versions = {
            "onnxruntime": str(library().__version__),
            "provider": CUDA,
            "device": device.name,
            "io_binding": "one stream, one wait for a picture",
            "cudnn_conv_algo_search": _SEARCH,
            "prefer_nhwc": "0",
            "use_tf32": "0",
        }
        return plain_device_side(NAME, package, device, nets, versions, stack.pop_all())
