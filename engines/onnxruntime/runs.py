"""How runs of ONNX Runtime on CUDA end: nearly all at once, a few only when the stream is done.

`disable_synchronize_execution_providers` is what makes a run return before the GPU is done. It also takes
away the only moment at which page-locked buffers go back. Concat and Split of unequal parts, among others,
upload their tables through such buffers (CudaAsyncBuffer in core/providers/cuda/cuda_kernel.h), which the
stream collects (CudaStream::EnqueDeferredCPUBuffer) and frees in CudaStream::CleanUpOnRunEnd. That is called
by DeviceStreamCollection::CleanUp, and InferenceSession::Run calls it with `sync_streams` false whenever the
option is set. The stream's object outlives the run (SessionState::RecycleDeviceStreamCollection). So without
any run that waits, page-locked memory grows with every run until the session goes.

A captured graph reads those very buffers each time it is launched. After a capture no run of the session may
wait, then: it would free what the graph still reads.
"""

from __future__ import annotations

from typing import Any

from ..errors import BackendError
from .session import library

# One run in so many waits for the stream: often enough for some MB of page-locked memory at most (an SD 1.5
# UNet leaves 0.2 MB per run), rarely enough to cost nothing.
WAIT_EVERY = 32
_RETURN_AT_ONCE = "disable_synchronize_execution_providers"


class Runs:
    """The options of each run of one session on CUDA.

    Args:
        name: of the net.
        capture: whether runs may be captured.
    """

    def __init__(self, name: str, *, capture: bool) -> None:
        self._name = name
        self.capture = capture
        self._at_once, self._waiting = run_options(), run_options()
        self._at_once.add_run_config_entry(_RETURN_AT_ONCE, "1")
        self._count = 0
        self._captured = False

    def next(self, *, capturing: bool) -> Any:
        """Options of the next run. Raises BackendError if it is recorded (`capturing`) and may not be."""
        if capturing and not self.capture:
            raise BackendError(
                f"a run of {self._name!r} is being captured: onnxruntime may free what the graph would read",
                expected="a net opened with capture=True, or no capture",
                fix="Leave graphs off for onnxruntime-cuda.",
            )
        self._captured = self._captured or capturing
        if self._captured:  # also afterwards: see above
            return self._at_once
        waits = self._count % WAIT_EVERY == 0
        self._count += 1
        return self._waiting if waits else self._at_once

    def restart(self) -> None:
        """No captured graph is left, so the next run waits and frees what there is."""
        self._count = 0
        self._captured = False


def run_options() -> Any:
    """Options of a run that logs nothing but errors."""
    options = library().RunOptions()
    options.log_severity_level = 3
    return options


def shrinking_options(arena: str) -> Any:
    """Options of a run that ends before its first node and gives back the free memory of an arena ("gpu:0").

    InferenceSession::Run shrinks arenas however the run has ended, so that no net has to be computed for it.
    """
    options = run_options()
    options.log_severity_level = 4  # that it was terminated is no error here
    options.terminate = True
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", arena)
    return options
