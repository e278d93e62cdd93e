"""Opens sessions of ONNX Runtime on any provider, compares them with the contract, and sorts their errors."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import BackendError, LatentrtError, MemoryLimitError, PackageError, command
from ..installed import install_command
from ..processors import thread_count
from ..spec import NetSpec
from .wheels import imported_wheel, installed_wheels, reinstall_command, several_wheels

_LOG = logging.getLogger(__name__)

CPU = "CPUExecutionProvider"
# A session option: the folder that external data's locations are relative to. ONNX Runtime 1.31 refuses
# external data outside of the graph's folder, be it by `..`, an absolute path or a symbolic link; this names
# another folder, so nothing is copied or linked. A graph given as bytes has no folder of its own.
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
# Bytes of weights above which a net on the CPU does without the last level of ONNX Runtime's optimisations,
# the blocked layout of convolutions (NCHWc). It costs a second copy of their weights, and half of the time of
# opening; docs/design.md has what it is worth in a run.
LARGE = 2**30
_ORT_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(uint8)": "uint8",
}
# How an exhausted memory reads: the CPU's and CUDA's arena (BFCArena), cuBLAS and cuDNN (…_ALLOC_FAILED).
_OUT_OF_MEMORY = ("alloc", "out of memory", "bfcarena")


def refusal() -> BackendError | None:
    """None if onnxruntime can open sessions, else the error that says why not. Never raises.

    A second wheel in the same folder is no error, but is logged.
    """
    try:
        if find_spec("onnxruntime") is None:
            return BackendError(
                "onnxruntime is not installed",
                expected="the library that runs nets on any CPU",
                fix=f"Install it: {install_command('cpu')}",
            )
        library().InferenceSession  # noqa: B018 (an empty folder imports as well)
    except Exception as error:  # ImportError, OSError, AttributeError and others
        wheels = " and ".join(installed_wheels()) or "no wheel that pip knows"
        return BackendError(
            f"onnxruntime is installed ({wheels}) and broken: {type(error).__name__}: {error}",
            expected="all files of one wheel",
            fix=f"Install it anew: {reinstall_command()}",
        )
    _tell_several_wheels()
    return None


def available() -> str | None:
    """None if onnxruntime can open sessions, else the reason why nothing runs. Never raises."""
    found = refusal()
    return None if found is None else found.found


@cache
def _tell_several_wheels() -> None:
    if text := several_wheels():
        _LOG.warning("%s", text)


def library() -> Any:
    """The library, imported on first use (0.1 s); it has no type stubs, hence Any.

    A signal that stops the program while it is imported would look like a broken library: pybind11 makes an
    ImportError of whatever is raised meanwhile.
    """
    try:
        return import_module("onnxruntime")
    except ImportError as error:
        if error.__cause__ is not None and not isinstance(error.__cause__, Exception):
            raise error.__cause__ from None
        raise


def run_error(name: str, error: Exception, shapes: Mapping[str, tuple[int, ...]]) -> LatentrtError:
    """What a failed run of the net `name` means: MemoryLimitError or BackendError."""
    if "cudnn is unavailable" in str(error).lower():
        return missing_cudnn(f"the net {name!r} failed: {error}")
    if _is_out_of_memory(error):
        return MemoryLimitError(
            f"the net {name!r} ran out of memory: {error}",
            expected="a size and batch that fit",
            fix="Draw fewer or smaller pictures at once.",
            culprit=name,
        )
    return BackendError(
        f"the net {name!r} failed on {dict(shapes)}: {error}",
        expected="inputs as in the net's spec (`latentrt inspect PACKAGE --json`)",
        fix="Check the inputs; if they are right, report this with the package's manifest.",
    )


def missing_cudnn(found: str) -> BackendError:
    """The error for what needs cuDNN where it is not."""
    return BackendError(
        found,
        expected="NVIDIA's library for convolutions beside onnxruntime-gpu",
        fix=f"Install it: {install_command('cuda')}",
    )


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    # cudaMalloc is refused while a stream is captured, however much memory there is
    return "captur" not in text and any(sign in text for sign in _OUT_OF_MEMORY)


def check_boundary(session: Any, spec: NetSpec, path: Path) -> None:
    """Raise PackageError unless the inputs and outputs of the graph at `path` are those of `spec`."""
    for kind, found, expected in (
        ("input", session.get_inputs(), spec.inputs),
        ("output", session.get_outputs(), spec.outputs),
    ):
        graph = {item.name: (_ORT_TYPES.get(item.type, item.type), len(item.shape)) for item in found}
        manifest = {item.name: (item.dtype, len(item.shape)) for item in expected}
        if graph != manifest:
            differing = sorted(set(graph.items()) ^ set(manifest.items()))
            raise PackageError(
                f"{path}: {kind}s differ from the manifest's: {differing[:4]}",
                expected="the boundary that the manifest records",
                fix="Export the package again: latentrt export CHECKPOINT -o PACKAGE",
            )


def session_options(threads: int | None) -> Any:
    """Quiet, with `thread_count(threads)` threads for one run. Raises UsageError for less than 1."""
    options = library().SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = thread_count(threads)
    # Else threads wait busily for a while after a run, and take the cores from the next net's session.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def spare_memory(options: Any, weights: int) -> None:
    """Have a session on the CPU of so many bytes of weights do without a second copy of some, if large."""
    if weights > LARGE:
        options.graph_optimization_level = library().GraphOptimizationLevel.ORT_ENABLE_EXTENDED


def open_session(
    path: Path, options: Any, providers: Sequence[Any], *, culprit: str, content: bytes | None = None
) -> Any:
    """A session of the graph at `path`, on `providers` and no others. `culprit`: the net, for errors.

    `content` is what to read in place of the file.

    Raises:
        PackageError: ONNX Runtime refuses the graph.
        MemoryLimitError: its weights do not fit.
    """
    ort = library()
    try:
        # A fallback would print, and run on the CPU what was meant for another provider.
        return ort.InferenceSession(content or str(path), options, providers=providers, enable_fallback=0)
    except Exception as error:  # onnxruntime raises a dozen classes of its own, all derived from it
        if _is_out_of_memory(error):
            raise MemoryLimitError(
                f"the weights of {path} do not fit the memory: {error}",
                expected="enough free memory",
                fix="Close other programs, or export with less weights:"
                " latentrt export CHECKPOINT -o PACKAGE --dtype fp16",
                culprit=culprit,
            ) from error
        raise PackageError(
            f"onnxruntime {ort.__version__} refuses {path}: {error}",
            expected="a graph of opset 23 with its weights beside it",
            fix="Export the package again, or upgrade the library: "
            + command("pip", "install", "--upgrade", imported_wheel() or "onnxruntime"),
        ) from error


def run_options() -> Any:
    """Options of a run that logs nothing but errors."""
    options = library().RunOptions()
    options.log_severity_level = 3
    return options


def returning_options() -> Any:
    """Options of a run on CUDA that returns before the GPU is done.

    They also take away the only moment at which page-locked buffers go back (InferenceSession::Run calls
    DeviceStreamCollection::CleanUp with `sync_streams` false). Concat and Split of unequal parts, among
    others, upload their tables through such buffers (CudaAsyncBuffer in core/providers/cuda/cuda_kernel.h).
    The nets of this project upload nothing, as `tests/cuda` counts, so nothing is left behind.
    """
    options = run_options()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
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
