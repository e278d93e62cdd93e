"""The real driver: `python -m pytest -m gpu tests/engines/test_cuda_device_gpu.py`."""

from collections.abc import Iterator

import numpy as np
import pytest

from latentrt.engines.cuda.device import STAGING, CudaDevice
from latentrt.engines.cuda.facts import available
from latentrt.engines.device import ALIGNMENT
from latentrt.engines.errors import BackendError, MemoryLimitError

REASON = available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]


@pytest.fixture
def device() -> Iterator[CudaDevice]:
    device = CudaDevice()
    yield device
    device.close()


def read(device: CudaDevice, address: int, like: np.ndarray) -> np.ndarray:
    target = np.empty_like(like)
    device.download(address, target)
    device.synchronize()
    return target


def test_facts(device: CudaDevice) -> None:
    assert device.name == device.facts.name
    assert device.facts.total > 2**30
    assert device.facts.compute_capability >= (5, 0)
    assert device.facts.uuid.startswith("GPU-")


def test_round_trip(device: CudaDevice) -> None:
    content = np.random.default_rng(0).integers(0, 255, 2 * STAGING + 12345, np.uint8)
    a, b = device.allocate(content.nbytes), device.allocate(content.nbytes)
    assert a % ALIGNMENT == b % ALIGNMENT == 0
    assert not read(device, a, content).any()
    passed = content.copy()
    device.upload(a, passed)
    passed[:] = 0
    device.copy(b, a, content.nbytes)
    np.testing.assert_array_equal(read(device, b, content), content)
    device.free(a)
    device.free(b)


@pytest.mark.parametrize(("to_pitch", "pitch"), [(512, 64), (64, 512), (64, 0), (48, 24)])
def test_runs(device: CudaDevice, to_pitch: int, pitch: int) -> None:
    content = np.arange(4096, dtype=np.uint16).view(np.uint8)
    a, b = device.allocate(content.nbytes), device.allocate(content.nbytes)
    device.upload(a, content)
    device.copy(b, a, 40, rows=5, to_pitch=to_pitch, pitch=pitch)
    expected = np.zeros_like(content)
    for row in range(5):
        expected[row * to_pitch :][:40] = content[row * pitch :][:40]
    np.testing.assert_array_equal(read(device, b, content), expected)


def test_capture_and_launch(device: CudaDevice) -> None:
    like = np.zeros(1000, np.float32)
    a, b = device.allocate(like.nbytes), device.allocate(like.nbytes)
    with device.capture() as graphs:
        device.copy(b, a, like.nbytes)
    assert not read(device, b, like).any()
    for value in (1, 2, 3):
        device.upload(a, like + value)
        graphs[0].launch()
        np.testing.assert_array_equal(read(device, b, like), like + value)
    graphs[0].close()


def test_a_stopwatch_counts_what_the_stream_did(device: CudaDevice) -> None:
    size = 64 * 2**20
    a, b = device.allocate(size), device.allocate(size)
    device.copy(b, a, size)  # warm
    seconds = []
    for copies in (1, 16):
        stopwatch = device.stopwatch()
        stopwatch.start()
        for _ in range(copies):
            device.copy(b, a, size)
        stopwatch.stop()
        device.synchronize()
        seconds.append(stopwatch.seconds())
        stopwatch.close()
    assert 4 < seconds[1] / seconds[0] < 64
    assert 2 * size / seconds[0] < 20e12, "bytes per second: more than any memory has"


def test_a_library_that_allocates_during_capture(device: CudaDevice) -> None:
    from cuda.bindings import runtime

    with pytest.raises(BackendError, match="StreamCapture"), device.capture() as graphs:
        runtime.cudaMalloc(1 << 20)
    assert not graphs
    device.synchronize()
    device.free(device.allocate(1 << 20))


def test_out_of_memory_then_on(device: CudaDevice) -> None:
    with pytest.raises(MemoryLimitError, match="cudaErrorMemoryAllocation"):
        device.allocate(2 * device.facts.total)
    device.free(device.allocate(1 << 20))
    device.synchronize()


def test_memory_is_back_to_baseline(device: CudaDevice) -> None:
    device.upload(device.allocate(4), np.zeros(4, np.uint8))  # the page-locked block
    before, size = device.memory(), 256 * 2**20
    for _ in range(3):
        address = device.allocate(size)
        device.synchronize()
        assert device.memory().free <= before.free - size + 16 * 2**20
        device.free(address)
    assert abs(device.memory().free - before.free) <= 16 * 2**20
    held = device.process_memory()
    assert held is None or held > 0
