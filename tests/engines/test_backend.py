import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file

from latentrt.engines.backend import choose_backend
from latentrt.engines.errors import BackendError, MemoryLimitError, PackageError, UsageError
from latentrt.engines.onnxruntime import session
from latentrt.engines.onnxruntime.backend import ONNXRUNTIME
from latentrt.engines.onnxruntime.lowering.winograd import kernels
from latentrt.engines.onnxruntime.nets import OnnxRuntimeNet
from latentrt.engines.onnxruntime.tuning.cpu import lower_for_cpu
from latentrt.engines.package import Package, write_manifest
from latentrt.runtime.model import SHIPPED
from tests.tiny_package import BIAS, add_graph


def test_auto_chooses_what_is_there_and_says_so() -> None:
    name, backend = choose_backend("auto")
    assert name == "onnxruntime"
    assert backend.describe().startswith("onnxruntime 1.")


def test_unknown_backend() -> None:
    with pytest.raises(BackendError, match="unknown backend 'cudnn'"):
        choose_backend("cudnn")


def test_nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"not installed.*pip install") as caught:
        choose_backend()
    assert caught.value.exit_code == 4
    assert "onnxruntime" in sys.modules or caught.value.fix


def test_open_call_close(package: Package) -> None:
    x = np.ones((3, 4), np.float32)
    with ONNXRUNTIME.open_net(package, "unet", threads=1) as net:
        assert net.spec == package.manifest.nets["unet"].spec
        np.testing.assert_array_equal(net(x=x)["y"], x + BIAS)
        assert net.memory.weights == BIAS.nbytes
        assert net.memory.io == 2 * x.nbytes
    net.close()
    with pytest.raises(BackendError, match="closed"):
        net(x=x)


def test_nets_that_share_a_file_count_each_weight_once() -> None:
    demo = Package.open(SHIPPED["demo"])
    names = "unet_context", "unet_time", "unet"
    weights = [ONNXRUNTIME.open_net(demo, name, threads=1).memory.weights for name in names]
    (stored,) = demo.manifest.nets["unet"].weights
    values = sum(array.size for array in load_file(demo.path(stored)).values())
    assert min(weights) > 0
    assert sum(weights) == pytest.approx(4 * values, rel=0.01), "float32, though stored as float16"
    assert sum(weights) <= 4 * values


def test_a_lowered_net_holds_its_kernels_in_place_of_their_weights(tmp_path: Path) -> None:
    demo = Package.open(SHIPPED["demo"])
    weights = demo.path(demo.manifest.nets["vae_decoder"].weights[0])
    sizes = {name: 4 * array.size for name, array in load_file(weights).items()}
    lowered = lower_for_cpu(demo, "vae_decoder", "winograd", tmp_path)
    made = sum(array.nbytes for _, array in kernels(demo, "vae_decoder", lowered.kernels))
    replaced = sum(sizes[kernel.weight] for kernel in lowered.kernels)
    net = OnnxRuntimeNet(demo, "vae_decoder", threads=1, lowered=lowered)
    assert 0 < replaced < made
    assert net.memory.weights == sum(sizes.values()) - replaced + made


@pytest.mark.parametrize("threads", [0, -1])
def test_too_few_threads(package: Package, threads: int) -> None:
    with pytest.raises(UsageError, match=f"threads is {threads}; expected a whole number, at least 1"):
        ONNXRUNTIME.open_net(package, "unet", threads=threads)


def test_threads_share_a_net(package: Package) -> None:
    with ONNXRUNTIME.open_net(package, "unet", threads=1) as net, ThreadPoolExecutor(4) as pool:
        inputs = [np.full((2, 4), i, np.float32) for i in range(50)]
        for x, outputs in zip(inputs, pool.map(lambda x: net(x=x), inputs), strict=True):
            np.testing.assert_array_equal(outputs["y"], x + BIAS)


def test_a_graph_onnxruntime_refuses(package: Package) -> None:
    model = add_graph(onnx.numpy_helper.from_array(BIAS, "bias"))
    model.graph.node[0].op_type = "NoSuchOperator"
    (package.root / "unet/loop.onnx").write_bytes(model.SerializeToString())
    package = write_manifest(package.root, package.manifest)
    with pytest.raises(PackageError, match=r"refuses .*loop\.onnx"):
        ONNXRUNTIME.open_net(package, "unet")


def test_a_graph_with_another_boundary(package: Package) -> None:
    model = add_graph(onnx.numpy_helper.from_array(BIAS, "bias"))
    model.graph.input[0].name = model.graph.node[0].input[0] = "z"
    shutil.copy(package.root / "unet/loop.onnx", package.root / "unet/old.onnx")
    (package.root / "unet/loop.onnx").write_bytes(model.SerializeToString())
    package = write_manifest(package.root, package.manifest)
    with pytest.raises(PackageError, match="inputs differ from the manifest"):
        ONNXRUNTIME.open_net(package, "unet")


def test_wrong_inputs_and_exhausted_memory(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    with ONNXRUNTIME.open_net(package, "unet", threads=1) as net:
        with pytest.raises(BackendError, match="'unet' failed on"):
            net(x=np.ones((3, 5), np.float32))

        class Full:
            def run(self, *_: object) -> None:
                raise RuntimeError("bad allocation")

        monkeypatch.setattr(net, "_session", Full())
        with pytest.raises(MemoryLimitError, match="ran out of memory") as caught:
            net(x=np.ones((3, 4), np.float32))
        assert caught.value.exit_code == 5


def test_a_start_on_a_cpu_loads_no_store_and_no_other_backend(tmp_path: Path) -> None:
    code = (
        "import sys; from latentrt.runtime import Pipeline\n"
        "with Pipeline.open('demo') as pipe: pipe('a red circle', num_inference_steps=1, seed=1)\n"
        "late = ('filelock', 'cuda', 'pynvml', 'latentrt.engines.cuda', 'latentrt.engines.tensorrt',"
        " 'latentrt.engines.store.engine_store', 'latentrt.benchmarks')\n"
        "found = [name for name in sys.modules if any(f'{name}.'.startswith(f'{one}.') for one in late)]\n"
        "sys.exit(f'imported {found}' if found else 0)"
    )
    nothing_measured = {**os.environ, "LATENTRT_CACHE": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=nothing_measured)
