"""ONNX Runtime. The CPU provider is the default that always works.

Opening a session and telling its errors apart are shared with `onnxruntime/nets.py`, which binds nets to a
device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from ..backend import MemoryLedger
from ..errors import BackendError, LatentrtError, MemoryLimitError, PackageError, UsageError
from ..net_weights import engine_bytes
from ..package import Package
from ..spec import Array, NetSpec
from .tuning.cpu_layouts import LoweredGraph, lowered_graph, usable_processors

_ORT_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(uint8)": "uint8",
}
# How an exhausted memory reads: the CPU's and CUDA's arena (BFCArena), cuBLAS and cuDNN (…_ALLOC_FAILED).
_OUT_OF_MEMORY = ("alloc", "out of memory", "bfcarena")


def available() -> str | None:
    """None if onnxruntime is installed, else the reason."""
    return None if find_spec("onnxruntime") else "onnxruntime is not installed"


def library() -> Any:
    """The library, imported on first use (0.1 s); it has no type stubs, hence Any."""
    return import_module("onnxruntime")


def describe() -> str:
    """Version and device."""
    return f"onnxruntime {library().__version__} (CPU)"


def open_net(package: Package, name: str, *, threads: int | None = None) -> OnnxRuntimeNet:
    """Load one net of a package on the CPU, in the layout that was measured to be the fastest here.

    Opening never measures: without an entry in the engine store (`onnxruntime/cpu_tuning.py`), or where the
    entry's graph does not open, it is the package's own graph.

    Raises:
        PackageError: ONNX Runtime refuses the graph, or its boundary is not the manifest's.
        UsageError: `threads` is less than 1.
    """
    lowered = lowered_graph(package, name, str(library().__version__))
    if lowered is not None:
        with suppress(PackageError, MemoryLimitError):
            return OnnxRuntimeNet(package, name, threads=threads, lowered=lowered)
    return OnnxRuntimeNet(package, name, threads=threads)


class OnnxRuntimeNet:
    """One session. `__call__` may run in several threads at once: a session is stateless.

    Args:
        package: where the net is from; its manifest has the boundary.
        name: of the net.
        threads: for one run; None is every processor.
        lowered: what to run in place of the package's graph, with the same boundary.

    Raises:
        PackageError: ONNX Runtime refuses the graph, or its boundary is not the manifest's.
        MemoryLimitError: the weights do not fit.
        UsageError: `threads` is less than 1.
    """

    def __init__(
        self,
        package: Package,
        name: str,
        *,
        threads: int | None = None,
        lowered: LoweredGraph | None = None,
    ) -> None:
        self.name = name
        self.layout = lowered.layout if lowered else "plain"  # one of `cpu_layouts.CPU_LAYOUTS`
        self._package, self._graph = package, lowered.graph if lowered else None
        self._file = package.manifest.nets[name]
        graph = package.path(self._file.graph)
        options = session_options(threads)
        kernels = _give_kernels(options, package, name, lowered) if lowered else []
        self._session: Any = open_session(
            graph,
            options,
            ["CPUExecutionProvider"],
            culprit=name,
            content=self._graph,
        )
        # ONNX Runtime reads them where they are: they live as long as the session, which a call may hold
        # longer than this net does.
        self._session.kernels = kernels
        self._outputs = [output.name for output in self._file.spec.outputs]
        self._kernels = sum(int(value.tensor_size_in_bytes()) for value in kernels)
        self._io = 0
        try:
            check_boundary(self._session, self._file.spec, graph)
        except PackageError:
            self.close()
            raise

    @property
    def spec(self) -> NetSpec:
        """Inputs and outputs, as the manifest has them."""
        return self._file.spec

    @property
    def memory(self) -> MemoryLedger:
        """Weights at the width of the arithmetic, and the inputs and outputs of the last call.

        Raises PackageError if the weights file's header cannot be read any more.
        """
        return MemoryLedger(weights=self._weights + self._kernels, activations=None, io=self._io)

    @cached_property
    def _weights(self) -> int:
        """Of what its graph names, as nets share files; looked up when asked for, not at every start."""
        return engine_bytes(self._package, self.name, self._graph)

    def __call__(self, **arrays: Array) -> dict[str, Array]:
        """Run once. Raises BackendError after `close` or for wrong inputs, MemoryLimitError."""
        session = self._session
        if session is None:
            raise BackendError(
                f"the net {self.name!r} is closed",
                expected="an open net",
                fix="Call it inside its `with` block.",
            )
        results = self._run(session, arrays)
        self._io = sum(array.nbytes for array in (*arrays.values(), *results))
        return dict(zip(self._outputs, results, strict=True))

    def _run(self, session: Any, arrays: dict[str, Array]) -> list[Any]:
        try:
            return session.run(self._outputs, arrays)
        except Exception as error:  # onnxruntime raises a dozen classes of its own, all derived from it
            shapes = {name: array.shape for name, array in arrays.items()}
            raise run_error(self.name, error, shapes) from error

    def close(self) -> None:
        """Free the session. May be called twice."""
        self._session = None

    def __enter__(self) -> OnnxRuntimeNet:
        """The net itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()


def run_error(name: str, error: Exception, shapes: Mapping[str, tuple[int, ...]]) -> LatentrtError:
    """What a failed run of the net `name` means: MemoryLimitError or BackendError."""
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
                fix="Export the package again: latentrt export CHECKPOINT -o PACKAGE.",
            )


def session_options(threads: int | None) -> Any:
    """Quiet, with `threads` for one run (None: every processor). Raises UsageError for less than 1."""
    if threads is not None and threads < 1:
        raise UsageError(
            f"threads is {threads}", expected="at least 1", fix="Leave it out to use every core."
        )
    options = library().SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or usable_processors()
    # Else threads wait busily for a while after a run, and take the cores from the next net's session.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _give_kernels(options: Any, package: Package, name: str, lowered: LoweredGraph) -> list[Any]:
    """Let a session have the weights of a lowered graph, and the package's; the former, to be kept."""
    from .lowering.lower import session_entries
    from .lowering.winograd_kernels import kernels

    for key, value in session_entries(package, name).items():
        options.add_session_config_entry(key, value)
    weights = package.manifest.nets[name].weights
    if not lowered.kernels or weights is None:
        return []
    make = library().OrtValue.ortvalue_from_numpy
    values = list[Any]()
    try:
        for kernel, array in kernels(package.path(weights), lowered.kernels):
            values.append(make(array))
            options.add_initializer(kernel.name, values[-1])
    except MemoryError as error:
        raise MemoryLimitError(
            f"the weights of {name!r} for Winograd's convolutions do not fit the memory",
            expected="enough free memory",
            fix="Close other programs, or forget the layout: latentrt cache prune --all.",
            culprit=name,
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PackageError(
            f"{weights} has no weights for the layout of {name!r} ({type(error).__name__}: {error})",
            expected="the weights that the layout was measured with",
            fix="Forget the layout: latentrt cache prune --all; then measure again: latentrt build.",
        ) from error
    return values


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
        # without fallback: it would print, and run on the CPU what was asked of another
        return ort.InferenceSession(content or str(path), options, providers=providers, enable_fallback=0)
    except Exception as error:  # onnxruntime raises a dozen classes of its own, all derived from it
        if _is_out_of_memory(error):
            raise MemoryLimitError(
                f"the weights of {path} do not fit the memory: {error}",
                expected="enough free memory",
                fix="Close other programs, or use a package of less weights: latentrt export --dtype fp16.",
                culprit=culprit,
            ) from error
        raise PackageError(
            f"onnxruntime {ort.__version__} refuses {path}: {error}",
            expected="a graph of opset 23 with its weights beside it",
            fix="Upgrade it: pip install --upgrade onnxruntime; or export the package again.",
        ) from error
