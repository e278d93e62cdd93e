"""The lowering for ONNX Runtime's CUDA provider, on what the exporter makes of both families."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from latentrt.engines.onnxruntime.lowering.lower import lower
from tests.engines.contrib_oracle import executable, relative_l2, session

LAST, FIRST = [0, 2, 3, 1], [0, 3, 1, 2]


@pytest.mark.parametrize("net", ["unet", "unet_whole", "vae_decoder"])
@pytest.mark.parametrize(("family", "bar"), [("sd1", 1e-5), ("sd2", 5e-3)])
def test_lowered_nets_compute_the_same(
    family: str, net: str, bar: float, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """fp32, and fp16 with islands: there both round, in different places, so the bar is the exporter's."""
    package = request.getfixturevalue(family).package
    file = package.manifest.nets[net]
    folder = package.path(file.weights[0]).parent
    original = onnx.load(package.path(file.graph), load_external_data=False)
    low = onnx.load(lower(package, net, tmp_path), load_external_data=False)
    assert not {"GroupNormalization", "Conv"} & {node.op_type for node in low.graph.node}
    weights = {item.name for item in low.graph.initializer}
    weights |= {
        node.output[0] for node in low.graph.node if node.op_type == "Cast" and node.input[0] in weights
    }
    turns = [
        list(node.attribute[0].ints)
        for node in low.graph.node
        if node.op_type == "Transpose" and node.input[0] not in weights
    ]
    # The latent comes in NCHW, a prediction leaves so; the decoder's picture leaves in NHWC.
    assert (turns.count(LAST), turns.count(FIRST)) == (1, 0 if net == "vae_decoder" else 1)
    left, right = session(executable(low), folder), session(original, folder)
    for batch, height, width in ((1, 8, 12), (2, 9, 7)):
        sizes = {"B": batch, "N": batch, "H/8": height, "W/8": width, "T": 77}
        rng = np.random.default_rng(4)
        arrays = {
            item.name: rng.standard_normal([sizes.get(str(dim), dim) for dim in item.shape]).astype(
                item.dtype
            )
            for item in file.spec.inputs
        }
        found, wanted = left.run(None, arrays)[0], right.run(None, arrays)[0]
        assert found.dtype == wanted.dtype
        if found.dtype == np.uint8:  # rounding to whole levels magnifies what lies at a half
            assert np.abs(found.astype(int) - wanted).mean() <= 255 * bar
        else:
            assert relative_l2(found, wanted) <= bar
