"""The demo model's UNet as it was in November 2026, run by run beside ours (docs/benchmarks.md, "Method").

Its graph is kept as a skeleton, filled with random weights and run by ONNX Runtime as it is: no change of
ours touches it. It is a UNet because a neighbour slows a matmul, a convolution and hundreds of small
operators down by different factors: medians of 12 s of our UNet's step over it stayed within 0.5 % (standard
deviation, two shared cores), over a small network of convolutions, matmuls and softmax within 2.7 %.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from ...engines.onnxruntime import session as onnxruntime
from ...engines.onnxruntime.nets import CPU
from ...engines.spec import shape_of
from ..skeletons import fill_skeleton
from .contract import Task, Work

SKELETON, GRAPH = "yardstick", Path("unet") / "loop.onnx"
# 128x128 pixels with guidance: about 12 ms on two cores of 2023
SIZES = {"B": 2, "H/8": 16, "W/8": 16, "T": 77}


def open_yardstick(task: Task) -> Work:
    """On the CPU, with the threads that our own nets have; the output `prediction` is (2, 4, 16, 16) float32.

    Raises:
        BackendError: ONNX Runtime is not installed.
        UsageError: less than one thread.
    """
    options = onnxruntime.session_options(task.threads)
    with TemporaryDirectory() as folder:
        root = fill_skeleton(SKELETON, Path(folder) / SKELETON).root
        session = onnxruntime.open_session(root / GRAPH, options, [CPU], culprit=SKELETON)
    random = np.random.default_rng(1)
    inputs = {
        item.name: random.standard_normal(shape_of(item.shape, SIZES), np.float32)
        for item in session.get_inputs()
    }
    return Work(call=lambda: {"prediction": session.run(None, inputs)[0]})
