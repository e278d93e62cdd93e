"""The stand-in's own rules, which are CUDA's: no provider, no GPU, a C compiler.

The error codes are those of driver_types.h; what is forbidden while a stream is captured is in the CUDA C++
Programming Guide ("Prohibited and Unhandled Operations") and in the API's reference
(cudaThreadExchangeStreamCaptureMode, cudaStreamBeginCapture, cudaStreamEndCapture).
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.engines.cuda.device import CudaDevice
from latentrt.engines.errors import BackendError, MemoryLimitError
from tests.cuda import libraries
from tests.cuda.runtime import MemcpyKind, Nvml, StandIn

INVALID_VALUE, OUT_OF_MEMORY, NO_DEVICE, INVALID_DEVICE = 1, 2, 100, 101
INVALID_HANDLE, ILLEGAL_STATE, ILLEGAL_ADDRESS = 400, 401, 700
UNSUPPORTED, INVALIDATED, UNMATCHED, ISOLATION, IMPLICIT = 900, 901, 903, 905, 906
CAPTURED_EVENT, WRONG_THREAD = 907, 908
GLOBAL, THREAD_LOCAL, RELAXED = 0, 1, 2
UP, DOWN, ACROSS = (
    MemcpyKind.cudaMemcpyHostToDevice,
    MemcpyKind.cudaMemcpyDeviceToHost,
    MemcpyKind.cudaMemcpyDeviceToDevice,
)
LEGACY = 0
MIB = 2**20
PAGE = 2 * MIB

pytestmark = pytest.mark.skipif(bool(libraries.missing()), reason=libraries.missing())


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return libraries.build_runtime(tmp_path_factory.mktemp("cudart"))


@pytest.fixture
def cuda(library: Path) -> Iterator[Any]:
    """The runtime; a test leaves it as it was."""
    runtime: Any = StandIn(str(library))
    before = runtime.report()
    yield runtime
    runtime.mend()
    runtime.set_total(80 * 1024 * MIB)
    runtime.set_devices(1)
    runtime.set_copied(4 * MIB)
    runtime.cudaSetDevice(0)
    runtime.cudaGetLastError()
    assert runtime.report().since(before).of("open") == {}


@pytest.fixture
def stream(cuda: Any) -> Iterator[int]:
    """One that does not wait for the legacy stream."""
    yield from open_stream(cuda, cuda.cudaStreamNonBlocking)


@pytest.fixture
def blocking(cuda: Any) -> Iterator[int]:
    """One that does."""
    yield from open_stream(cuda, 0)


@pytest.fixture
def block(cuda: Any) -> Iterator[int]:
    """A KiB of the device."""
    error, address = cuda.cudaMalloc(1024)
    assert not error
    yield address
    assert cuda.cudaFree(address) == (0,)


@pytest.fixture
def event(cuda: Any) -> Iterator[int]:
    _, event = cuda.cudaEventCreate()
    yield event
    assert cuda.cudaEventDestroy(event) == (0,)


def open_stream(cuda: Any, flags: int) -> Iterator[int]:
    error, stream = cuda.cudaStreamCreateWithFlags(flags)
    assert not error
    yield stream
    cuda.cudaStreamEndCapture(stream)  # of a capture that the test left
    assert cuda.cudaStreamDestroy(stream) == (0,)


def address_of(array: np.ndarray[Any, Any]) -> int:
    return array.ctypes.data


def elsewhere(work: Callable[[], Any]) -> Any:
    """The result of the work on another thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


# ── what a capture forbids ────────────────────────────────────────────────────────────────────

HOST = np.zeros(1024, np.uint8)
FORBIDDEN: dict[str, Callable[[Any, int, int, int], int]] = {
    "cudaMalloc": lambda cuda, stream, block, event: cuda.cudaMalloc(16)[0],
    "cudaFree": lambda cuda, stream, block, event: cuda.cudaFree(block)[0],
    "cudaMallocHost": lambda cuda, stream, block, event: cuda.cudaMallocHost(16)[0],
    "cudaFreeHost": lambda cuda, stream, block, event: cuda.cudaFreeHost(block)[0],
    "cudaStreamSynchronize": lambda cuda, stream, block, event: cuda.cudaStreamSynchronize(stream)[0],
    "cudaDeviceSynchronize": lambda cuda, stream, block, event: cuda.cudaDeviceSynchronize()[0],
    "cudaEventSynchronize": lambda cuda, stream, block, event: cuda.cudaEventSynchronize(event)[0],
    "cudaMemcpy": lambda cuda, stream, block, event: cuda.cudaMemcpy(block, address_of(HOST), 16, UP)[0],
    "cudaGraphInstantiate": lambda cuda, stream, block, event: cuda.cudaGraphInstantiate(block, 0)[0],
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_a_capture_is_ended_by_what_it_forbids(
    cuda: Any, stream: int, block: int, event: int, name: str
) -> None:
    before = cuda.report()
    assert cuda.cudaStreamBeginCapture(stream, THREAD_LOCAL) == (0,)
    assert FORBIDDEN[name](cuda, stream, block, event) == UNSUPPORTED
    assert cuda.cudaMemsetAsync(block, 0, 16, stream) == (INVALIDATED,)
    assert cuda.cudaStreamEndCapture(stream) == (INVALIDATED, None)
    assert cuda.report().since(before).of("forbidden") == {name: 1}
    assert cuda.cudaStreamSynchronize(stream) == (0,)


@pytest.mark.parametrize("kind", [UP, DOWN])
def test_a_capture_refuses_pageable_memory(cuda: Any, stream: int, block: int, kind: MemcpyKind) -> None:
    ends = (block, address_of(HOST)) if kind == UP else (address_of(HOST), block)
    assert cuda.cudaMemcpyAsync(*ends, 1024, kind, stream) == (0,)
    cuda.cudaStreamBeginCapture(stream, THREAD_LOCAL)
    assert cuda.cudaMemcpyAsync(*ends, 1024, kind, stream) == (UNSUPPORTED,)
    assert cuda.cudaStreamEndCapture(stream) == (INVALIDATED, None)


def test_a_second_capture_of_a_stream_is_refused_and_so_is_a_default_stream(cuda: Any, stream: int) -> None:
    assert cuda.cudaStreamBeginCapture(LEGACY, THREAD_LOCAL) == (UNSUPPORTED,)
    assert cuda.cudaStreamBeginCapture(stream, 7) == (INVALID_VALUE,)
    assert cuda.cudaStreamEndCapture(stream) == (ILLEGAL_STATE, None)
    cuda.cudaStreamBeginCapture(stream, THREAD_LOCAL)
    assert cuda.cudaStreamBeginCapture(stream, THREAD_LOCAL) == (ILLEGAL_STATE,)


def test_a_stream_that_is_captured_is_not_destroyed(cuda: Any, stream: int) -> None:
    cuda.cudaStreamBeginCapture(stream, THREAD_LOCAL)
    assert cuda.cudaStreamDestroy(stream) == (UNSUPPORTED,)


@pytest.mark.parametrize(("mode", "error"), [(GLOBAL, UNSUPPORTED), (THREAD_LOCAL, 0), (RELAXED, 0)])
def test_the_mode_decides_whether_other_threads_may_allocate(
    cuda: Any, stream: int, mode: int, error: int
) -> None:
    cuda.cudaStreamBeginCapture(stream, mode)
    found, address = elsewhere(lambda: cuda.cudaMalloc(16))
    assert found == error
    ended, graph = cuda.cudaStreamEndCapture(stream)
    assert ended == (INVALIDATED if error else 0)
    if not error:
        assert (cuda.cudaGraphDestroy(graph), cuda.cudaFree(address)) == ((0,), (0,))


def test_a_wait_for_the_device_ends_a_capture_of_another_thread(cuda: Any, stream: int) -> None:
    cuda.cudaStreamBeginCapture(stream, THREAD_LOCAL)
    assert elsewhere(cuda.cudaDeviceSynchronize) == (UNSUPPORTED,)


def test_a_relaxed_capture_may_allocate(cuda: Any, stream: int) -> None:
    cuda.cudaStreamBeginCapture(stream, RELAXED)
    error, address = cuda.cudaMalloc(16)
    assert not error
    assert cuda.cudaFree(address) == (0,)
    error, graph = cuda.cudaStreamEndCapture(stream)
    assert not error
    assert cuda.cudaGraphDestroy(graph) == (0,)


@pytest.mark.parametrize(("mode", "error"), [(THREAD_LOCAL, WRONG_THREAD), (RELAXED, 0)])
def test_the_thread_that_began_a_capture_ends_it(cuda: Any, stream: int, mode: int, error: int) -> None:
    cuda.cudaStreamBeginCapture(stream, mode)
    found, graph = elsewhere(lambda: cuda.cudaStreamEndCapture(stream))
    assert found == error
    if not error:
        assert cuda.cudaGraphDestroy(graph) == (0,)


def test_events_draw_another_stream_into_the_capture(
    cuda: Any, stream: int, blocking: int, event: int
) -> None:
    cuda.cudaStreamBeginCapture(stream, THREAD_LOCAL)
    assert cuda.cudaEventRecord(event, stream) == (0,)
    assert cuda.cudaStreamWaitEvent(blocking, event, 0) == (0,)
    assert cuda.cudaStreamEndCapture(blocking) == (UNMATCHED, None)
    assert cuda.cudaEventSynchronize(event) == (CAPTURED_EVENT,)
    assert cuda.cudaStreamEndCapture(stream) == (INVALIDATED, None)


def test_a_captured_stream_waits_for_no_event_from_outside(cuda: Any, stream: int, event: int) -> None:
    cuda.cudaEventRecord(event, stream)
    cuda.cudaStreamBeginCapture(stream, THREAD_LOCAL)
    assert cuda.cudaStreamWaitEvent(stream, event, 0) == (ISOLATION,)


def test_the_legacy_stream_is_closed_while_a_blocking_one_is_captured(
    cuda: Any, stream: int, blocking: int, block: int
) -> None:
    for captured, error in ((stream, 0), (blocking, IMPLICIT)):
        cuda.cudaStreamBeginCapture(captured, RELAXED)
        assert cuda.cudaMemsetAsync(block, 0, 16, LEGACY) == (error,)
        _, graph = cuda.cudaStreamEndCapture(captured)
        assert (graph is None) == bool(error)
        if graph:
            cuda.cudaGraphDestroy(graph)


# ── graphs ────────────────────────────────────────────────────────────────────────────────────


def test_a_graph_copies_when_it_is_launched(cuda: Any, stream: int, block: int) -> None:
    _, locked = cuda.cudaMallocHost(16)
    ctypes.memset(locked, 7, 16)
    cuda.cudaStreamBeginCapture(stream, THREAD_LOCAL)
    assert cuda.cudaMemcpyAsync(block, locked, 16, UP, stream) == (0,)
    _, graph = cuda.cudaStreamEndCapture(stream)
    _, executable = cuda.cudaGraphInstantiate(graph, 0)
    assert cuda.cudaGraphDestroy(graph) == (0,)
    found = np.full(16, 1, np.uint8)
    for value in (0, 8, 9):
        if value:
            ctypes.memset(locked, value, 16)
            assert cuda.cudaGraphLaunch(executable, stream) == (0,)
        assert cuda.cudaMemcpyAsync(address_of(found), block, 16, DOWN, stream) == (0,)
        assert set(found) == {value}
    assert cuda.cudaGraphExecDestroy(executable) == (0,)
    assert cuda.cudaGraphExecDestroy(executable) == (INVALID_VALUE,)
    assert cuda.cudaGraphLaunch(executable, stream) == (INVALID_VALUE,)
    cuda.cudaFreeHost(locked)


def test_a_graph_over_freed_memory_spoils_the_context(cuda: Any, stream: int, block: int) -> None:
    _, gone = cuda.cudaMalloc(1024)
    cuda.cudaStreamBeginCapture(stream, THREAD_LOCAL)
    cuda.cudaMemcpyAsync(block, gone, 1024, ACROSS, stream)
    _, graph = cuda.cudaStreamEndCapture(stream)
    _, executable = cuda.cudaGraphInstantiate(graph, 0)
    cuda.cudaFree(gone)
    assert cuda.cudaGraphLaunch(executable, stream) == (ILLEGAL_ADDRESS,)
    assert cuda.cudaStreamSynchronize(stream) == (ILLEGAL_ADDRESS,)
    cuda.mend()
    assert (cuda.cudaGraphDestroy(graph), cuda.cudaGraphExecDestroy(executable)) == ((0,), (0,))


def test_a_graph_is_not_launched_into_a_capture(cuda: Any, stream: int) -> None:
    cuda.cudaStreamBeginCapture(stream, THREAD_LOCAL)
    _, graph = cuda.cudaStreamEndCapture(stream)
    _, executable = cuda.cudaGraphInstantiate(graph, 0)
    cuda.cudaStreamBeginCapture(stream, THREAD_LOCAL)
    assert cuda.cudaGraphLaunch(executable, stream) == (UNSUPPORTED,)
    assert (cuda.cudaGraphDestroy(graph), cuda.cudaGraphExecDestroy(executable)) == ((0,), (0,))


# ── memory ────────────────────────────────────────────────────────────────────────────────────


def used(cuda: Any) -> int:
    return cuda.report().of("memory").get("used", 0)


def test_memory_is_taken_in_pages_that_small_blocks_share(cuda: Any) -> None:
    blocks = [cuda.cudaMalloc(size)[1] for size in (1, MIB // 2, MIB // 4)]
    assert used(cuda) == PAGE
    blocks += [cuda.cudaMalloc(size)[1] for size in (MIB, PAGE + 1)]
    assert used(cuda) == PAGE + PAGE + 2 * PAGE
    assert not any(address % 256 for address in blocks)
    assert len(set(blocks)) == len(blocks)
    assert cuda.cudaMemGetInfo() == (0, 80 * 1024 * MIB - used(cuda), 80 * 1024 * MIB)
    for address in blocks:
        assert cuda.cudaFree(address) == (0,)
    assert used(cuda) == 0
    assert cuda.cudaFree(blocks[0]) == (INVALID_VALUE,)
    assert cuda.cudaMalloc(0) == (0, None)
    assert cuda.cudaFree(None) == (0,)


def test_memory_ends(cuda: Any) -> None:
    cuda.set_total(3 * PAGE)
    error, first = cuda.cudaMalloc(PAGE + 1)
    assert not error
    assert cuda.cudaMalloc(PAGE + 1) == (OUT_OF_MEMORY, None)
    assert cuda.cudaGetLastError() == (OUT_OF_MEMORY,)
    assert cuda.cudaGetLastError() == (0,)
    error, second = cuda.cudaMalloc(1)
    assert not error
    assert cuda.cudaMalloc(PAGE) == (OUT_OF_MEMORY, None)
    assert (cuda.cudaFree(first), cuda.cudaFree(second)) == ((0,), (0,))


def test_memory_is_zeros_and_a_block_ends_where_it_ends(cuda: Any, stream: int, block: int) -> None:
    found = np.full(1024, 7, np.uint8)
    assert cuda.cudaMemcpyAsync(address_of(found), block, 1024, DOWN, stream) == (0,)
    assert not found.any()
    assert cuda.cudaMemcpyAsync(address_of(found), block, 1025, DOWN, stream) == (INVALID_VALUE,)
    assert cuda.cudaMemcpyAsync(block, block + 512, 513, ACROSS, stream) == (INVALID_VALUE,)
    assert cuda.cudaMemsetAsync(block + 1, 0, 1024, stream) == (INVALID_VALUE,)
    assert cuda.cudaMemcpyAsync(block, address_of(found), 1, 9, stream) == (INVALID_VALUE,)


def test_a_small_block_is_zeros_again_when_it_is_used_again(cuda: Any, stream: int, block: int) -> None:
    _, first = cuda.cudaMalloc(600)
    cuda.cudaMemsetAsync(first, 5, 600, stream)
    cuda.cudaFree(first)
    error, again = cuda.cudaMalloc(600)
    assert (error, again) == (0, first)
    found = np.full(600, 7, np.uint8)
    cuda.cudaMemcpyAsync(address_of(found), again, 600, DOWN, stream)
    assert not found.any()
    cuda.cudaFree(again)


def test_a_large_copy_to_the_device_moves_nothing_and_one_to_the_host_does(cuda: Any, stream: int) -> None:
    size = 3 * MIB
    given, found = np.full(size, 7, np.uint8), np.full(size, 9, np.uint8)
    _, block = cuda.cudaMalloc(size)
    for limit, value in ((MIB, 0), (4 * MIB, 7)):
        cuda.set_copied(limit)
        assert cuda.cudaMemcpyAsync(block, address_of(given), size, UP, stream) == (0,)
        assert cuda.cudaMemcpyAsync(address_of(found), block, size, DOWN, stream) == (0,)
        assert set(found[:: MIB // 2]) == {value}
    assert cuda.cudaMemsetAsync(block, 0, size, stream) == (0,)
    cuda.cudaMemcpyAsync(address_of(found), block, size, DOWN, stream)
    assert not found.any()
    cuda.cudaFree(block)


def test_rows_are_copied_by_pitch(cuda: Any, stream: int, block: int) -> None:
    given, found = np.arange(12, dtype=np.uint8).reshape(3, 4), np.zeros((3, 8), np.uint8)
    assert cuda.cudaMemcpy2DAsync(block, 8, address_of(given), 4, 4, 3, UP, stream) == (0,)
    assert cuda.cudaMemcpyAsync(address_of(found), block, 24, DOWN, stream) == (0,)
    assert (found[:, :4] == given).all()
    assert not found[:, 4:].any()
    assert cuda.cudaMemcpy2DAsync(block, 3, address_of(given), 4, 4, 3, UP, stream) == (12,)


# ── streams, devices, failures ────────────────────────────────────────────────────────────────


def test_each_thread_has_a_current_device_of_its_own(cuda: Any) -> None:
    cuda.set_devices(2)
    assert cuda.cudaSetDevice(1) == (0,)
    assert cuda.cudaGetDevice() == (0, 1)
    assert elsewhere(cuda.cudaGetDevice) == (0, 0)
    assert cuda.cudaSetDevice(2) == (INVALID_DEVICE,)
    cuda.set_devices(0)
    assert cuda.cudaGetDeviceCount() == (NO_DEVICE, 0)


def test_handles_are_known(cuda: Any, stream: int, event: int) -> None:
    assert cuda.cudaStreamSynchronize(event) == (INVALID_HANDLE,)
    assert cuda.cudaEventRecord(stream, stream) == (INVALID_HANDLE,)
    assert cuda.cudaEventElapsedTime(event, event)[0] == INVALID_HANDLE
    assert cuda.cudaEventDestroy(stream) == (INVALID_HANDLE,)
    cuda.cudaEventRecord(event, stream)
    assert cuda.cudaEventElapsedTime(event, event) == (0, 0.0)


def test_a_failure_is_injected_into_the_call_that_was_named(cuda: Any) -> None:
    cuda.fail("cudaMalloc", OUT_OF_MEMORY, call=2)
    error, first = cuda.cudaMalloc(16)
    assert not error
    assert cuda.cudaMalloc(16)[0] == OUT_OF_MEMORY
    error, second = cuda.cudaMalloc(16)
    assert not error
    cuda.fail("cudaMemGetInfo", ILLEGAL_ADDRESS, sticky=True)
    assert cuda.cudaMemGetInfo()[0] == ILLEGAL_ADDRESS
    assert cuda.cudaFree(first) == (ILLEGAL_ADDRESS,)
    assert [cuda.cudaGetLastError() for _ in range(2)] == [(ILLEGAL_ADDRESS,)] * 2
    cuda.mend()
    assert (cuda.cudaFree(first), cuda.cudaFree(second)) == ((0,), (0,))


def test_a_name_that_latentrt_does_not_call_says_where_to_add_it(cuda: Any) -> None:
    with pytest.raises(AttributeError, match=r"add it to tests/cuda/runtime\.py"):
        cuda.cudaTomorrow()


# ── the device of the product on it ───────────────────────────────────────────────────────────


def test_a_device_moves_data_and_counts_its_memory(cuda: Any) -> None:
    device = CudaDevice(runtime=cuda, nvml=Nvml(cuda))
    assert (device.name, device.facts.sm, device.facts.driver) == ("Stand-in", "sm_90", "580.82.07")
    first, second = device.allocate(4096), device.allocate(4096)
    assert device.process_memory() == used(cuda) == PAGE
    assert device.memory().total - device.memory().free == PAGE
    given, found = np.arange(1024, dtype=np.float32), np.empty(1024, np.float32)
    device.upload(first, given)
    with device.capture() as graphs:
        device.copy(second, first, 4096)
    graphs[0].launch()
    device.download(second, found)
    device.synchronize()
    assert (found == given).all()
    device.close()


def test_a_device_takes_errors_for_what_they_are(cuda: Any) -> None:
    cuda.set_total(2 * PAGE)
    device = CudaDevice(runtime=cuda, nvml=Nvml(cuda))
    with pytest.raises(MemoryLimitError, match=r"cudaErrorMemoryAllocation.*of 4194304 bytes are free"):
        device.allocate(3 * PAGE)
    with pytest.raises(BackendError, match="while work is being captured"), device.capture():
        device.allocate(16)
    with pytest.raises(BackendError, match="cudaErrorStreamCaptureInvalidated"), device.capture():
        cuda.cudaMalloc(16)
    device.allocate(16)
    device.close()


# ── building ──────────────────────────────────────────────────────────────────────────────────


def test_a_provider_that_wants_more_fails_with_the_names(tmp_path: Path) -> None:
    names = ("cudaMalloc", "cudaTomorrow", "cublasGemmEx", "cublasUnheardOf")
    for library in ("libcudart.so.13", "libcublas.so.13"):
        stem = library.partition(".")[0].removeprefix("lib")
        start = {"cudart": "cuda", "cublas": "cublas"}[stem]
        text = "".join(f"int {name}(void) {{ return 0; }}\n" for name in names if name.startswith(start))
        (tmp_path / f"{stem}.c").write_text(text)
        (tmp_path / f"{stem}.map").write_text(f"{library} {{ global: *; }};\n")
        compile_library(
            tmp_path / library,
            *(str(tmp_path / f"{stem}.c"), f"-Wl,-soname,{library}"),
            f"-Wl,--version-script,{tmp_path / stem}.map",
        )
    calls = "".join(f"int {name}(void);\n" for name in names)
    uses = " + ".join(f"{name}()" for name in names)
    (tmp_path / "provider.c").write_text(f"{calls}int use(void) {{ return {uses}; }}\n")
    provider = tmp_path / libraries.PROVIDER
    compile_library(
        provider,
        *(str(tmp_path / name) for name in ("provider.c", "libcudart.so.13")),
        *(str(tmp_path / "libcublas.so.13"),),
    )
    with pytest.raises(NotImplementedError, match=r"cublasUnheardOf.*cudaTomorrow") as caught:
        libraries.build(tmp_path / "built", provider)
    assert "cudaMalloc" not in str(caught.value)
    assert "cublasGemmEx" not in str(caught.value)


def test_a_source_that_does_not_compile_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no_such_file"):
        libraries.build(tmp_path / "built", tmp_path / "no_such_file.so")


def compile_library(target: Path, *arguments: str) -> None:
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", str(target), *arguments], check=True)
