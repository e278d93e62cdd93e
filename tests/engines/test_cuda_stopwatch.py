import pytest

from latentrt.engines.cuda.device import CudaDevice
from latentrt.engines.device import Device
from latentrt.engines.errors import BackendError, MemoryLimitError
from tests.engines.host_device import HostDevice
from tests.engines.simulated_cuda import SimulatedRuntime, cudaError_t
from tests.engines.simulated_nvml import SimulatedNvml


@pytest.fixture
def cuda() -> SimulatedRuntime:
    return SimulatedRuntime()


@pytest.fixture
def device(cuda: SimulatedRuntime) -> CudaDevice:
    return CudaDevice(runtime=cuda, nvml=SimulatedNvml(unknown=("nvmlInit",)))


def copy(device: Device, count: int) -> None:
    a, b = device.allocate(8), device.allocate(8)
    for _ in range(count):
        device.copy(b, a, 8)


def test_it_counts_what_the_stream_did_between_start_and_stop(device: CudaDevice) -> None:
    seam: Device = device
    stopwatch = seam.stopwatch()
    for copies in (3, 5):  # used again, it begins anew; each copy takes the simulation a millisecond
        copy(device, 2)
        stopwatch.start()
        copy(device, copies)
        stopwatch.stop()
        copy(device, 1)
        device.synchronize()
        assert stopwatch.seconds() == pytest.approx(copies * 1e-3)


def test_it_is_not_read_too_early(cuda: SimulatedRuntime, device: CudaDevice) -> None:
    stopwatch = device.stopwatch()
    with pytest.raises(BackendError, match="that was not stopped"):
        stopwatch.seconds()
    stopwatch.stop()
    device.synchronize()
    with pytest.raises(BackendError, match="cudaErrorInvalidResourceHandle"):  # never started
        stopwatch.seconds()
    stopwatch.start()
    stopwatch.stop()
    with pytest.raises(BackendError, match="reading a stopwatch failed: cudaErrorNotReady"):
        stopwatch.seconds()
    assert cuda.last == cudaError_t.cudaSuccess
    device.synchronize()
    assert stopwatch.seconds() == 0
    stopwatch.start()
    device.synchronize()
    with pytest.raises(BackendError, match="that was not stopped"):  # the last stop is not this start's
        stopwatch.seconds()


def test_closed(cuda: SimulatedRuntime, device: CudaDevice) -> None:
    stopwatch, left_open = device.stopwatch(), device.stopwatch()
    stopwatch.close()
    stopwatch.close()
    for call in (stopwatch.start, stopwatch.stop, stopwatch.seconds):
        with pytest.raises(BackendError, match="stopwatch that is closed"):
            call()
    assert len(cuda.events) == 2
    device.close()
    assert cuda.nothing_left()
    left_open.close()
    for call in (left_open.start, left_open.stop, left_open.seconds, device.stopwatch):
        with pytest.raises(BackendError, match="on Simulated GPU, which is closed"):
            call()


def test_it_is_no_part_of_a_capture(cuda: SimulatedRuntime, device: CudaDevice) -> None:
    stopwatch = device.stopwatch()
    for call in (stopwatch.start, stopwatch.stop, device.stopwatch):
        with pytest.raises(BackendError, match="while work is being captured"), device.capture():
            call()
    assert cuda.recording is None


@pytest.mark.parametrize("name", ["cudaEventCreate", "cudaEventRecord", "cudaEventElapsedTime"])
def test_a_call_that_fails(cuda: SimulatedRuntime, device: CudaDevice, name: str) -> None:
    cuda.fail(name, cudaError_t.cudaErrorLaunchFailure)

    def use() -> None:
        stopwatch = device.stopwatch()
        stopwatch.start()
        stopwatch.stop()
        device.synchronize()
        stopwatch.seconds()

    with pytest.raises(BackendError, match=f"stopwatch failed: {cudaError_t.cudaErrorLaunchFailure.name}"):
        use()
    assert cuda.last == cudaError_t.cudaSuccess
    use()
    device.close()
    assert cuda.nothing_left()


def test_the_second_event_cannot_be_made(cuda: SimulatedRuntime, device: CudaDevice) -> None:
    create, answers = cuda.cudaEventCreate, iter([False, True])

    def once() -> tuple[object, ...]:
        if next(answers):
            cuda.fail("cudaEventCreate", cudaError_t.cudaErrorMemoryAllocation)
        return create()

    cuda.cudaEventCreate = once  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(MemoryLimitError, match="making a stopwatch failed"):
        device.stopwatch()
    assert not cuda.events


def test_closing_in_a_spoiled_context_does_not_raise(cuda: SimulatedRuntime, device: CudaDevice) -> None:
    stopwatch = device.stopwatch()
    cuda.fail("cudaStreamSynchronize", cudaError_t.cudaErrorIllegalAddress, sticky=True)
    with pytest.raises(BackendError, match="cudaErrorIllegalAddress"):
        device.synchronize()
    stopwatch.close()


def test_the_stand_in_on_host_memory_is_as_late_and_as_strict() -> None:
    device = HostDevice()
    stopwatch = device.stopwatch()
    stopwatch.start()
    copy(device, 2)
    stopwatch.stop()
    with pytest.raises(AssertionError, match="has not passed"):
        stopwatch.seconds()
    device.synchronize()
    assert stopwatch.seconds() > 0
    stopwatch.close()
    assert not device.stopwatches
    with pytest.raises(AssertionError, match="closed"):
        stopwatch.start()
