from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from latentrt.engines.device import DeviceMemory
from latentrt.engines.errors import BackendError, EngineError, MemoryLimitError, StorageError
from latentrt.engines.spec import TensorSpec
from latentrt.engines.store.engine_store import EngineStore, Entry
from latentrt.engines.tensorrt.flavour import flavour
from latentrt.engines.tensorrt.log import messages
from latentrt.engines.tensorrt.nets import StoredCache, TensorRTNet, open_engine, open_entry
from tests.engines import engine_keys
from tests.engines import tensorrt_setting as setting
from tests.engines.host_device import HostDevice
from tests.engines.simulated_tensorrt import SimulatedLibrary, simulated_engine
from tests.engines.simulated_tensorrt_names import EngineInvalidityDiagnostics as Kinds
from tests.engines.simulated_tensorrt_names import EngineValidity
from tests.engines.tensorrt_setting import LARGE, SMALL, bound, open_simulated

RTX, NET = "tensorrt-rtx", "vae_decoder"
SPEC = setting.PACKAGE.manifest.nets[NET].spec


@pytest.fixture
def device() -> HostDevice:
    return HostDevice()


# ── the library's opinion ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("kind", "said", "fix"),
    [
        (
            Kinds.VERSION_MISMATCH,
            "another release of the library built it",
            "latentrt build PACKAGE --backend tensorrt-rtx",
        ),
        (Kinds.UNSUPPORTED_CC, "compute capability of this GPU", "latentrt build"),
        (Kinds.OLD_CUDA_DRIVER, "driver is too old", "Update the NVIDIA driver"),
        (Kinds.OLD_CUDA_RUNTIME, "runtime is too old", "pip install"),
        (Kinds.MALFORMED_ENGINE, "no engine of this library", "latentrt build"),
        (Kinds.CUDA_ERROR, "the device reported an error", "nvidia-smi"),
    ],
)
def test_an_invalid_engine_is_not_deserialised(kind: Kinds, said: str, fix: str, device: HostDevice) -> None:
    trt = setting.library(RTX, device)
    trt._world.verdict = (EngineValidity.INVALID, kind)
    with pytest.raises(BackendError, match=rf"'{NET}' invalid \(.*{said}.*{fix}"):
        open_simulated(trt, RTX, NET, device)
    assert trt._world.counts["deserialised"] == 0


def test_an_engine_too_large_for_the_device(device: HostDevice) -> None:
    trt = setting.library(RTX, device)
    trt._world.verdict = (EngineValidity.INVALID, Kinds.INSUFFICIENT_GPU_MEMORY | Kinds.OLD_CUDA_DRIVER)
    with pytest.raises(MemoryLimitError, match="driver is too old for it, it does not fit") as caught:
        open_simulated(trt, RTX, NET, device)
    assert caught.value.culprit == NET


def test_a_suboptimal_engine_runs_with_a_remark(device: HostDevice) -> None:
    trt = setting.library(RTX, device)
    assert open_simulated(trt, RTX, NET, device).remark == ""
    trt._world.verdict = (EngineValidity.SUBOPTIMAL, Kinds.UNSUPPORTED_CC)
    net = open_simulated(trt, RTX, NET, device)
    assert "not the best for this GPU (it was not built for" in net.remark
    bound(net, device, NET, SMALL)[0].enqueue()


@pytest.mark.parametrize("variant", ["tensorrt 10", "tensorrt 11"])
def test_deserialising_fails_in_the_librarys_words(variant: str, device: HostDevice) -> None:
    trt = setting.library(variant, device)
    with pytest.raises(BackendError, match=r"engine is for compute 7.5, not 8.9.*latentrt build PACKAGE"):
        open_simulated(trt, variant, NET, device, cc="7.5")
    trt._world.failing["deserialize"] = "CUDA driver version is insufficient for CUDA runtime version"
    with pytest.raises(BackendError, match=r"is insufficient.*update the NVIDIA driver"):
        open_simulated(trt, variant, NET, device)
    trt._world.failing["deserialize"] = "Cuda Runtime (out of memory)"
    with pytest.raises(MemoryLimitError, match="out of memory") as caught:
        open_simulated(trt, variant, NET, device)
    assert caught.value.culprit == NET
    other = simulated_engine(
        "tensorrt 10" if variant[-1] == "1" else "tensorrt 11", setting.graph(NET), setting.profiles(NET)
    )
    for data, said in ((other, "was built by version"), (b"<html>", "magicTag")):
        with pytest.raises(BackendError, match=said):
            _open(trt, variant, data, device)


def _open(trt: Any, variant: str, data: bytes, device: HostDevice, **options: Any) -> TensorRTNet:
    return open_engine(setting.engine_of(trt, setting.row(variant), NET, device, **options), data)


def test_host_code_is_never_allowed(device: HostDevice) -> None:
    trt = setting.library(RTX, device)
    trt._world.host_code = True
    with pytest.raises(BackendError, match="would run host code"):
        open_simulated(trt, RTX, NET, device)
    assert trt._world.counts["deserialised"] == 0


def test_messages_are_kept_short(device: HostDevice) -> None:
    trt = setting.library(RTX, device)
    log = messages(trt)
    assert messages(trt) is log
    kinds = trt.ILogger.Severity
    for number in range(1000):
        log.logger.log(kinds.WARNING, f"warning {number}")
    mark = log.mark()
    for severity, text in ((kinds.WARNING, "late"), (kinds.INFO, "chat"), (kinds.ERROR, "bad")):
        log.logger.log(severity, text)
        log.logger.log(severity, text)
    assert log.since(mark) == ["bad", "late"]
    assert log.since(mark, errors_only=True) == ["bad"]
    assert len(log.since(0)) == 198


# ── the boundary ─────────────────────────────────────────────────────────────────────────────────


def test_another_boundary_than_the_nets(device: HostDevice) -> None:
    image, mean = SPEC.outputs
    latent = SPEC.inputs[0]
    other = setting.profiles("unet")
    wrong: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("outputs .'mean'.", {}, {"spec": replace(SPEC, outputs=(image,))}),
        ("inputs .'x'.", {}, {"spec": replace(SPEC, inputs=(latent, replace(latent, name="x")))}),
        (
            "mean is float32, not float16",
            {},
            {"spec": replace(SPEC, outputs=(image, replace(mean, dtype="float16")))},
        ),
        (
            r"image is \(-1, -1, -1, 3\), not \(N, H, W, 4\)",
            {},
            {"spec": replace(SPEC, outputs=(replace(image, shape=("N", "H", "W", 4)), mean))},
        ),
        (
            "mean is",
            {},
            {"spec": replace(SPEC, outputs=(image, TensorSpec(name="mean", dtype="float32", shape=())))},
        ),
        ("latent has to lie in host memory", {"host": ["latent"]}, {}),
        ("image is not laid out in rows", {"vectorised": ["image"]}, {}),
        ("it has 2 profiles, not 1", {}, {"profiles": setting.profiles(NET)[:1]}),
        ("it has 2 profiles, not 4", {}, {"profiles": other}),
        (
            r"profile 0 \(.*\) takes latent from \(1, 4, 8, 8\)",
            {},
            {"profiles": setting.profiles(NET)[::-1]},
        ),
    ]
    for message, extra, options in wrong:
        with pytest.raises(EngineError, match=rf"{message}.*expected the boundary.*latentrt build"):
            open_simulated(setting.library(RTX, device), RTX, NET, device, options=options, **extra)


# ── the store ────────────────────────────────────────────────────────────────────────────────────


def _stored(folder: Path, **extra: Any) -> Entry:
    data = simulated_engine(RTX, setting.graph(NET), setting.profiles(NET), **extra)
    key = replace(engine_keys.KEY, flags=("REFIT_IDENTICAL", "STRIP_PLAN") if "stripped" in extra else ())
    return EngineStore(folder).get_or_build(key, engine_keys.builder(data))


def _open_entry(trt: SimulatedLibrary, entry: Entry, device: HostDevice) -> TensorRTNet:
    of = setting.engine_of(trt, setting.row(RTX), NET, device)
    return open_entry(of, entry, setting.graph(NET))


def test_a_tampered_engine_never_reaches_the_library(tmp_path: Path, device: HostDevice) -> None:
    trt, entry = setting.library(RTX, device), _stored(tmp_path)
    engine = entry.path / "engine.bin"
    data = bytearray(engine.read_bytes())
    data[20] ^= 1
    engine.write_bytes(data)
    with pytest.raises(EngineError, match="sha256"):
        _open_entry(trt, entry, device)
    assert trt._world.counts["validity"] == trt._world.counts["deserialised"] == 0


def test_an_engine_is_not_read_where_the_device_would_lack_its_memory(
    tmp_path: Path, device: HostDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt, entry = setting.library(RTX, device), _stored(tmp_path)
    for unified, free, refused in ((True, -1, True), (True, 0, False), (False, -1, False)):
        memory = DeviceMemory(free=2 * entry.size + free, total=2**40, unified=unified)
        monkeypatch.setattr(device, "memory", lambda memory=memory: memory)
        if not refused:
            _open_entry(trt, entry, device).close()
            continue
        monkeypatch.setattr(Entry, "read", lambda self: pytest.fail("it was read"))
        with pytest.raises(
            MemoryLimitError, match=rf"^{memory.free} of {2**40} bytes .*{entry.size};"
        ) as caught:
            _open_entry(trt, entry, device)
        assert (caught.value.culprit, str(2 * entry.size) in caught.value.expected) == (NET, True)
        monkeypatch.undo()


def test_kernels_are_kept_once_they_have_run(tmp_path: Path, device: HostDevice) -> None:
    entry, trt = _stored(tmp_path), setting.library(RTX, device)
    net = _open_entry(trt, entry, device)
    cache = StoredCache(store=EngineStore(tmp_path), digest=entry.key.digest, device=device.name)
    for sizes, kernels in ((SMALL, 1), (LARGE, 2)):
        run, _, _ = bound(net, device, NET, sizes)
        before = cache.read()
        net.settle()
        assert cache.read() == before, "nothing has run yet"
        run.enqueue()
        run.close()  # what it compiled is still there
        net.settle()
        assert cache.read().count(b";") == kernels - 1
        assert cache.read() != before
    serialised = trt._world.counts["serialised"]
    run, _, _ = bound(net, device, NET, LARGE)
    run.enqueue()
    net.settle()
    for _ in range(3):
        run.enqueue()
        net.settle()
    assert trt._world.counts["serialised"] == serialised + 1, "once per binding, not once per request"
    net.close()
    net.settle()


def test_compiled_kernels_are_kept_beside_the_engine(
    tmp_path: Path, device: HostDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry, written, write = _stored(tmp_path), list[bytes](), StoredCache.write

    def counted(cache: StoredCache, data: bytes) -> None:
        written.append(data)
        write(cache, data)

    monkeypatch.setattr(StoredCache, "write", counted)
    for compiled in (1, 0):
        trt = setting.library(RTX, device)
        net = _open_entry(trt, entry, device)
        run, _, _ = bound(net, device, NET, SMALL)
        run.enqueue()
        run.enqueue()
        assert trt._world.counts["compiled"] == compiled
        net.settle()
        assert len(written) == 1, "by the first process"
        net.close()
    assert len(written) == 1
    trt = setting.library(RTX, device)
    trt._world.compute_capability = "12.0"  # another GPU of the same name
    net = _open_entry(trt, _stored(tmp_path / "other", cc="12.0"), device)
    net.close()
    files = list((tmp_path / "caches" / "runtime").iterdir())
    assert [file.name for file in files] == [f"{entry.key.digest[:32]}-host_memory"]


def test_a_refused_cache_is_written_anew(tmp_path: Path, device: HostDevice) -> None:
    entry = _stored(tmp_path)
    cache = StoredCache(store=EngineStore(tmp_path), digest=entry.key.digest, device=device.name)
    cache.write(b"of another driver")
    trt = setting.library(RTX, device)
    net = _open_entry(trt, entry, device)
    bound(net, device, NET, SMALL)[0].enqueue()
    assert trt._world.counts["compiled"] == 1
    net.close()
    assert cache.read().startswith(b"kernels for 8.9:")


class Full:
    """A cache that cannot be written."""

    tried = 0

    def read(self) -> bytes:
        return b""

    def write(self, data: bytes) -> None:
        self.tried += 1
        raise StorageError("full", expected="room", fix="Make some.")


def test_a_cache_that_cannot_be_written_does_not_keep_a_net_open(device: HostDevice) -> None:
    full = Full()
    net = open_simulated(setting.library(RTX, device), RTX, NET, device, options={"cache": full})
    bound(net, device, NET, SMALL)[0].enqueue()
    net.settle()
    assert full.tried == 1
    net.close()
    assert full.tried == 2
    assert net.memory.weights == 0


def test_libraries_without_kernels_of_their_own_keep_no_cache(device: HostDevice) -> None:
    trt, full = setting.library("tensorrt 11", device), Full()
    net = open_simulated(trt, "tensorrt 11", NET, device, options={"cache": full})
    bound(net, device, NET, SMALL)[0].enqueue()
    net.settle()
    net.close()
    assert full.tried == 0


def test_a_stripped_engine_of_the_store_gets_its_weights(tmp_path: Path, device: HostDevice) -> None:
    import onnx

    names = [item.name for item in onnx.load(setting.graph(NET), load_external_data=False).graph.initializer]
    entry = _stored(tmp_path, stripped=True, refittable=names)
    net = _open_entry(setting.library(RTX, device), entry, device)
    run, buffers, expected = bound(net, device, NET, SMALL)
    run.enqueue()
    assert (buffers.read()["image"] == expected["image"]).all()


# ── the real library, without a GPU ──────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def live() -> Any:
    return pytest.importorskip("tensorrt_rtx")


def test_the_real_library_refuses_what_is_no_engine(live: Any, device: HostDevice) -> None:
    row = flavour(RTX)
    with pytest.raises(BackendError, match=r"tensorrt_rtx .* finds the engine of 'vae_decoder' invalid"):
        open_engine(setting.engine_of(live, row, NET, device), b"x" * 1000)


def test_the_real_library_says_that_there_is_no_driver(live: Any, device: HostDevice) -> None:
    from latentrt.engines.cuda import facts as cuda_facts

    if cuda_facts.available() is None:
        pytest.skip("there is a GPU")
    data = _tiny_engine(live)
    with pytest.raises(BackendError, match=r"driver version is insufficient.*update the NVIDIA driver"):
        open_engine(setting.engine_of(live, flavour(RTX), NET, device), data)


def _tiny_engine(trt: Any) -> bytes:
    logger = messages(trt).logger
    builder = trt.Builder(logger)
    network, config = builder.create_network(0), builder.create_builder_config()
    tensor = network.add_input("x", trt.float32, (-1, 4))
    result = network.add_identity(tensor).get_output(0)
    result.name = "y"
    network.mark_output(result)
    profile = builder.create_optimization_profile()
    profile.set_shape("x", (1, 4), (2, 4), (4, 4))
    config.add_optimization_profile(profile)
    return bytes(builder.build_serialized_network(network, config))
