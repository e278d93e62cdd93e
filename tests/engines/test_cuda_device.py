import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import pytest

from latentrt.engines.cuda import facts as cuda_facts
from latentrt.engines.cuda.device import STAGING, CudaDevice
from latentrt.engines.device import ALIGNMENT, Device, DeviceMemory
from latentrt.engines.errors import BackendError, MemoryLimitError, UsageError
from tests.engines.simulated_cuda import SimulatedRuntime, cudaError_t
from tests.engines.simulated_nvml import SimulatedNvml

NO_NVML = SimulatedNvml(unknown=("nvmlInit",))


@pytest.fixture
def cuda() -> SimulatedRuntime:
    return SimulatedRuntime(total=64 * 2**20)


@pytest.fixture
def device(cuda: SimulatedRuntime) -> CudaDevice:
    return CudaDevice(runtime=cuda, nvml=NO_NVML)


def read(device: CudaDevice, address: int, count: int) -> list[int]:
    array = np.empty(count, np.uint8)
    device.download(address, array)
    device.synchronize()
    return array.tolist()


# ── memory ─────────────────────────────────────────────────────────────────────────────────────────


def test_it_is_the_seams_device(device: CudaDevice) -> None:
    seam: Device = device
    assert seam.name == "Simulated GPU"
    assert isinstance(device.stream, int)
    assert device.stream


def test_memory_is_zero_aligned_and_returned(cuda: SimulatedRuntime, device: CudaDevice) -> None:
    blocks = [device.allocate(size) for size in (1, 300, 0)]
    assert all(address % ALIGNMENT == 0 for address in blocks)
    assert read(device, blocks[1], 300) == [0] * 300
    for address in blocks:
        device.free(address)
    assert cuda.used == 0
    device.close()
    device.close()
    assert cuda.nothing_left()


def test_out_of_memory_has_the_numbers_and_leaves_no_error(
    cuda: SimulatedRuntime, device: CudaDevice
) -> None:
    device.allocate(60 * 2**20)
    with pytest.raises(MemoryLimitError, match=r"allocating 8388608 bytes .*4194304 of 67108864 bytes") as e:
        device.allocate(8 * 2**20)
    assert e.value.exit_code == 5
    assert cuda.cudaGetLastError() == (cudaError_t.cudaSuccess,)
    device.allocate(2**20)


def test_memory_that_cannot_be_cleared_is_freed(cuda: SimulatedRuntime, device: CudaDevice) -> None:
    cuda.fail("cudaMemsetAsync", cudaError_t.cudaErrorInvalidValue)
    with pytest.raises(BackendError, match=r"allocating 100 bytes failed: cudaErrorInvalidValue"):
        device.allocate(100)
    assert cuda.used == 0


def test_free_of_what_is_not_allocated(device: CudaDevice) -> None:
    address = device.allocate(100)
    device.free(address)
    for bad in (address, address + 256, 0):
        with pytest.raises(BackendError, match="is not allocated, or is free already"):
            device.free(bad)


def test_free_waits_for_the_stream(device: CudaDevice) -> None:
    address = device.allocate(4)
    target = np.zeros(4, np.uint8)
    device.upload(address, np.full(4, 7, np.uint8))
    device.download(address, target)
    device.free(address)
    assert target.tolist() == [7] * 4


def test_free_frees_although_the_stream_has_failed(cuda: SimulatedRuntime, device: CudaDevice) -> None:
    address = device.allocate(4)
    cuda.fail("cudaStreamSynchronize", cudaError_t.cudaErrorLaunchFailure)
    with pytest.raises(BackendError, match="cudaErrorLaunchFailure"):
        device.free(address)
    assert cuda.used == 0


# ── copies ─────────────────────────────────────────────────────────────────────────────────────────


def test_upload_takes_the_content_at_once(device: CudaDevice) -> None:
    address = device.allocate(12)
    array = np.arange(12, dtype=np.uint8).reshape(3, 4)
    device.upload(address, array.T)  # any strides
    array[:] = 99
    expected = np.arange(12).reshape(3, 4).T.ravel().tolist()
    assert read(device, address, 12) == expected


def test_uploads_larger_than_the_staging_block(cuda: SimulatedRuntime, device: CudaDevice) -> None:
    size = 2 * STAGING + 1000
    content = np.random.default_rng(0).integers(0, 255, size, np.uint8)
    address, other = device.allocate(size), device.allocate(8)
    device.upload(other, np.full(8, 5, np.uint8))
    device.upload(address, content)
    target = np.empty_like(content)
    device.download(address, target)
    device.synchronize()
    np.testing.assert_array_equal(target, content)
    assert read(device, other, 8) == [5] * 8
    assert cuda.calls.count("cudaMallocHost") == 1


def test_nothing_is_there_before_synchronize_and_the_array_lives_until_then(device: CudaDevice) -> None:
    address = device.allocate(4)
    device.upload(address, np.full(4, 7, np.uint8))
    array = np.zeros(4, np.uint8)
    device.download(address, array)
    assert array.tolist() == [0] * 4
    alive = weakref.ref(array)
    del array
    gc.collect()
    assert alive() is not None
    device.synchronize()
    gc.collect()
    assert alive() is None


def test_download_into_what_it_cannot_fill(device: CudaDevice) -> None:
    address = device.allocate(16)
    fixed = np.zeros(4, np.uint8)
    fixed.flags.writeable = False
    for array in (np.zeros((4, 4), np.uint8)[:, :2], fixed):
        with pytest.raises(UsageError, match="read-only or not contiguous"):
            device.download(address, array)
    device.download(address, np.empty(0, np.uint8))


@pytest.mark.parametrize(("to_pitch", "pitch"), [(8, 4), (4, 0), (3, 2), (8, 2)])
def test_copy_runs(device: CudaDevice, to_pitch: int, pitch: int) -> None:
    content = np.arange(32, dtype=np.uint8)
    a, b = device.allocate(32), device.allocate(32)
    device.upload(a, content)
    device.copy(b, a, 3, rows=3, to_pitch=to_pitch, pitch=pitch)
    expected = np.zeros(32, np.uint8)
    for row in range(3):
        expected[row * to_pitch : row * to_pitch + 3] = content[row * pitch : row * pitch + 3]
    assert read(device, b, 32) == expected.tolist()


def test_copy_one_run(cuda: SimulatedRuntime, device: CudaDevice) -> None:
    a, b = device.allocate(8), device.allocate(8)
    device.upload(a, np.arange(8, dtype=np.uint8))
    device.copy(b + 2, a, 4)
    assert read(device, b, 8) == [0, 0, 0, 1, 2, 3, 0, 0]
    assert "cudaMemcpy2DAsync" not in cuda.calls


def test_copy_outside_memory(device: CudaDevice) -> None:
    a, b = device.allocate(8), device.allocate(8)
    with pytest.raises(BackendError, match="copying 2 runs of 8 bytes failed: cudaErrorInvalidValue"):
        device.copy(b, a, 8, rows=2, to_pitch=8, pitch=8)
    device.free(a)
    with pytest.raises(BackendError, match="copying 8 bytes failed"):
        device.copy(b, a, 8)


# ── errors of the stream ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (cudaError_t.cudaErrorLaunchFailure, BackendError),
        (cudaError_t.cudaErrorMemoryAllocation, MemoryLimitError),
    ],
)
def test_synchronize_reports_what_failed(
    cuda: SimulatedRuntime, device: CudaDevice, error: cudaError_t, kind: type[Exception]
) -> None:
    device.synchronize()
    cuda.fail("cudaStreamSynchronize", error)
    with pytest.raises(kind, match=f"the work on the device failed: {error.name} \\(error {error.value}\\)"):
        device.synchronize()
    assert cuda.last == cudaError_t.cudaSuccess
    device.synchronize()


def test_a_spoiled_context_is_told_by_every_call_and_close_does_not_raise(
    cuda: SimulatedRuntime, device: CudaDevice
) -> None:
    address = device.allocate(4)
    cuda.fail("cudaStreamSynchronize", cudaError_t.cudaErrorIllegalAddress, sticky=True)
    for call in (device.synchronize, device.memory, lambda: device.allocate(1), lambda: device.free(address)):
        with pytest.raises(BackendError, match=r"cudaErrorIllegalAddress.*start again"):
            call()
    device.close()


def test_out_of_memory_in_a_spoiled_context_has_no_numbers(cuda: SimulatedRuntime) -> None:
    cuda.fail("cudaMemGetInfo", cudaError_t.cudaErrorLaunchFailure)
    with pytest.raises(MemoryLimitError, match="how much is free is not known"):
        cuda_facts.checked(cuda, (cudaError_t.cudaErrorMemoryAllocation, None), "allocating")


def test_a_closed_device(device: CudaDevice) -> None:
    device.close()
    for call in (device.synchronize, device.memory, lambda: device.allocate(1), lambda: device.free(256)):
        with pytest.raises(BackendError, match="on Simulated GPU, which is closed"):
            call()


def test_close_frees_what_is_left(cuda: SimulatedRuntime, device: CudaDevice) -> None:
    a, b = device.allocate(8), device.allocate(8)
    device.upload(a, np.zeros(8, np.uint8))
    with device.capture() as graphs:
        device.copy(b, a, 8)
    device.close()
    assert cuda.nothing_left()
    graphs[0].close()
    with pytest.raises(BackendError, match="the graph is closed"):
        graphs[0].launch()


# ── capture ────────────────────────────────────────────────────────────────────────────────────────


def test_capture_records_and_launch_runs(cuda: SimulatedRuntime, device: CudaDevice) -> None:
    a, b = device.allocate(4), device.allocate(4)
    with device.capture() as graphs:
        device.copy(b, a, 4)
    assert len(graphs) == 1
    assert not cuda.graphs
    device.upload(a, np.full(4, 3, np.uint8))
    assert read(device, b, 4) == [0] * 4
    for value in (4, 5):
        device.upload(a, np.full(4, value, np.uint8))
        graphs[0].launch()
        assert read(device, b, 4) == [value] * 4
    graphs[0].close()
    graphs[0].close()
    assert not cuda.executables
    with pytest.raises(BackendError, match="the graph is closed"):
        graphs[0].launch()


def test_what_cannot_be_captured_is_refused_before_it_spoils_anything(
    cuda: SimulatedRuntime, device: CudaDevice
) -> None:
    address, array = device.allocate(4), np.zeros(4, np.uint8)
    for forbidden in (
        lambda: device.allocate(4),
        lambda: device.free(address),
        lambda: device.upload(address, array),
        lambda: device.download(address, array),
        device.synchronize,
        lambda: device.capture().__enter__(),
    ):
        with pytest.raises(BackendError, match="while work is being captured"), device.capture():
            forbidden()
        assert not cuda.graphs
        assert cuda.recording is None
    device.free(address)


def test_a_library_that_allocates_during_capture(cuda: SimulatedRuntime, device: CudaDevice) -> None:
    with pytest.raises(BackendError, match="cudaErrorStreamCaptureInvalidated"), device.capture() as graphs:
        cuda.cudaMalloc(100)  # and swallows the error
    assert not graphs
    assert cuda.last == cudaError_t.cudaSuccess
    device.synchronize()


@pytest.mark.parametrize("error", [RuntimeError("no"), MemoryLimitError("no", expected="", fix="")])
def test_any_failure_in_the_block_ends_the_capture(
    cuda: SimulatedRuntime, device: CudaDevice, error: Exception
) -> None:
    with pytest.raises(BackendError, match="the work cannot be captured: no") as caught, device.capture():
        raise error
    assert caught.value.__cause__ is error
    assert cuda.recording is None
    assert not cuda.graphs


def test_an_interruption_ends_the_capture_too(cuda: SimulatedRuntime, device: CudaDevice) -> None:
    with pytest.raises(KeyboardInterrupt), device.capture():
        raise KeyboardInterrupt
    assert cuda.recording is None
    assert not cuda.graphs


@pytest.mark.parametrize(
    "name", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate", "cudaGraphUpload"]
)
@pytest.mark.parametrize(
    "error", [cudaError_t.cudaErrorMemoryAllocation, cudaError_t.cudaErrorStreamCaptureInvalidated]
)
def test_a_graph_that_cannot_be_made_leaves_nothing(
    cuda: SimulatedRuntime, device: CudaDevice, name: str, error: cudaError_t
) -> None:
    cuda.fail(name, error)
    with pytest.raises(BackendError, match=error.name), device.capture() as graphs:
        pass
    assert not cuda.graphs
    assert not cuda.executables
    assert cuda.last == cudaError_t.cudaSuccess
    with device.capture() as graphs:  # the next one works
        pass
    assert len(graphs) == 1


def test_a_launch_that_fails(cuda: SimulatedRuntime, device: CudaDevice) -> None:
    with device.capture() as graphs:
        pass
    cuda.fail("cudaGraphLaunch", cudaError_t.cudaErrorMemoryAllocation)
    with pytest.raises(MemoryLimitError, match="launching a CUDA graph failed"):
        graphs[0].launch()
    graphs[0].launch()


# ── memory, as people see it ───────────────────────────────────────────────────────────────────────


def test_memory_from_nvml_or_cuda(cuda: SimulatedRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    known = CudaDevice(runtime=cuda, nvml=SimulatedNvml())
    assert known.memory() == DeviceMemory(free=600, total=1000, unified=False)
    unknown = CudaDevice(runtime=cuda, nvml=SimulatedNvml(unknown=("nvmlDeviceGetMemoryInfo",)))
    assert unknown.memory() == DeviceMemory(free=cuda.total, total=cuda.total, unified=False)
    monkeypatch.setattr("tests.engines.simulated_cuda.Properties.integrated", 1)
    shared = CudaDevice(runtime=cuda, nvml=SimulatedNvml())
    assert shared.memory() == DeviceMemory(free=cuda.total, total=cuda.total, unified=True)
    assert shared.process_memory() is None


# ── what CUDA refuses, and so the simulation ───────────────────────────────────────────────────────


def test_memory_comes_in_blocks_of_the_drivers_size(cuda: SimulatedRuntime, device: CudaDevice) -> None:
    for _ in range(32):
        device.allocate(1)
    with pytest.raises(MemoryLimitError, match="0 of 67108864 bytes are free"):
        device.allocate(1)


def test_memory_that_others_hold_is_not_there(cuda: SimulatedRuntime, device: CudaDevice) -> None:
    cuda.taken = 60 * 2**20
    assert device.memory() == DeviceMemory(free=4 * 2**20, total=64 * 2**20, unified=False)
    with pytest.raises(MemoryLimitError, match="4194304 of 67108864 bytes are free"):
        device.allocate(5 * 2**20)


def test_a_graph_needs_memory_that_may_not_be_there(cuda: SimulatedRuntime, device: CudaDevice) -> None:
    a, b = device.allocate(4), device.allocate(4)
    cuda.taken = 60 * 2**20
    with (
        pytest.raises(BackendError, match=r"cannot be captured.*making a CUDA graph failed"),
        device.capture(),
    ):
        device.copy(b, a, 4)
    cuda.taken = 0
    with device.capture() as graphs:
        device.copy(b, a, 4)
    used = cuda.used
    graphs[0].close()
    assert cuda.used < used


def test_captures_that_cuda_refuses(cuda: SimulatedRuntime, device: CudaDevice) -> None:
    mode = cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    error = cudaError_t
    assert cuda.cudaStreamBeginCapture(0, mode) == (error.cudaErrorStreamCaptureUnsupported,)
    assert cuda.cudaStreamBeginCapture(77, mode) == (error.cudaErrorInvalidResourceHandle,)
    with device.capture():
        assert cuda.cudaStreamBeginCapture(device.stream, mode) == (error.cudaErrorIllegalState,)
        with ThreadPoolExecutor(1) as other:
            ended = other.submit(cuda.cudaStreamEndCapture, device.stream).result()
        assert ended == (error.cudaErrorStreamCaptureWrongThread, None)
        assert cuda.cudaStreamEndCapture(77) == (error.cudaErrorIllegalState, None)


def test_what_another_stream_does_is_not_captured(cuda: SimulatedRuntime, device: CudaDevice) -> None:
    a, b = device.allocate(4), device.allocate(4)
    _, other = cuda.cudaStreamCreateWithFlags(1)
    kind = cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
    with device.capture() as graphs:
        cuda.cudaMemcpyAsync(b, a, 4, kind, other)
    assert cuda.executables[graphs[0]._executable] == []  # type: ignore[attr-defined]


def test_another_thread_uses_the_second_device_too(cuda: SimulatedRuntime) -> None:
    """Each thread begins with device 0: what is made there would be no use to a stream of device 1."""
    cuda.devices = 2
    with closing(CudaDevice(1, runtime=cuda, nvml=NO_NVML)) as device, ThreadPoolExecutor(1) as other:
        address = other.submit(device.allocate, 4).result()
        assert cuda.places[address] == cuda.places[device.stream] == 1
        watch = other.submit(device.stopwatch).result()
        other.submit(watch.start).result()
        watch.stop()
        device.synchronize()
        assert watch.seconds() >= 0
    _, elsewhere = cuda.cudaEventCreate()  # here device 1 is current, in a new thread device 0
    with ThreadPoolExecutor(1) as other:
        _, stream = other.submit(cuda.cudaStreamCreateWithFlags, 1).result()
    assert cuda.cudaEventRecord(elsewhere, stream) == (cudaError_t.cudaErrorInvalidResourceHandle,)
