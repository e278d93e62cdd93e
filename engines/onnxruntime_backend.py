"""ONNX Runtime. The CPU provider is the default that always works."""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from types import TracebackType
from typing import Any

from .backend import MemoryLedger
from .errors import BackendError, MemoryLimitError, PackageError, UsageError
from .package import Package
from .spec import Array, NetSpec

_ORT_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(uint8)": "uint8",
}


def available() -> str | None:
    """None if onnxruntime is installed, else the reason."""
    return None if find_spec("onnxruntime") else "onnxruntime is not installed"


def _onnxruntime() -> Any:
    """The library, imported on first use (0.1 s); it has no type stubs, hence Any."""
    return import_module("onnxruntime")


def describe() -> str:
    """Version and device."""
    return f"onnxruntime {_onnxruntime().__version__} (CPU)"


def open_net(package: Package, name: str, *, threads: int | None = None) -> OnnxRuntimeNet:
    """Load one net of a package on the CPU.

    Raises:
        PackageError: ONNX Runtime refuses the graph, or its boundary is not the manifest's.
        UsageError: `threads` is less than 1.
    """
    return OnnxRuntimeNet(package, name, threads=threads)


class OnnxRuntimeNet:
    """One session. `__call__` may run in several threads at once: a session is stateless."""

    def __init__(self, package: Package, name: str, *, threads: int | None = None) -> None:
        self.name = name
        self._file = package.manifest.nets[name]
        self._session: Any = _open_session(package, self._file.graph, threads)
        self._outputs = [output.name for output in self._file.spec.outputs]
        self._weights = package.path(self._file.weights).stat().st_size if self._file.weights else 0
        self._io = 0
        try:
            self._check_boundary(package)
        except PackageError:
            self.close()
            raise

    @property
    def spec(self) -> NetSpec:
        """Inputs and outputs, as the manifest has them."""
        return self._file.spec

    @property
    def memory(self) -> MemoryLedger:
        """Weights as stored, and the inputs and outputs of the last call."""
        return MemoryLedger(weights=self._weights, activations=None, io=self._io)

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
        except (
            Exception
        ) as error:  # onnxruntime raises a dozen classes of its own, all derived from Exception
            shapes = {name: array.shape for name, array in arrays.items()}
            if "alloc" in str(error).lower():
                raise MemoryLimitError(
                    f"the net {self.name!r} ran out of memory: {error}",
                    expected="a size and batch that fit",
                    fix="Draw fewer or smaller pictures at once.",
                ) from error
            raise BackendError(
                f"the net {self.name!r} failed on {shapes}: {error}",
                expected="inputs as in the net's spec (`latentrt inspect PACKAGE --json`)",
                fix="Check the inputs; if they are right, report this with the package's manifest.",
            ) from error

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

    def _check_boundary(self, package: Package) -> None:
        for kind, found, expected in (
            ("input", self._session.get_inputs(), self.spec.inputs),
            ("output", self._session.get_outputs(), self.spec.outputs),
        ):
            graph = {item.name: (_ORT_TYPES.get(item.type, item.type), len(item.shape)) for item in found}
            manifest = {item.name: (item.dtype, len(item.shape)) for item in expected}
            if graph != manifest:
                differing = sorted(set(graph.items()) ^ set(manifest.items()))
                raise PackageError(
                    f"{package.path(self._file.graph)}: {kind}s differ from the manifest's: {differing[:4]}",
                    expected="the boundary that the manifest records",
                    fix="Export the package again: latentrt export CHECKPOINT -o PACKAGE.",
                )


def _open_session(package: Package, graph: str, threads: int | None) -> Any:
    ort = _onnxruntime()
    if threads is not None and threads < 1:
        raise UsageError(
            f"threads is {threads}", expected="at least 1", fix="Leave it out to use every core."
        )
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or _usable_processors()
    path = package.path(graph)
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a dozen classes of its own, all derived from Exception
        raise PackageError(
            f"onnxruntime {ort.__version__} refuses {path}: {error}",
            expected="a graph of opset 23 with its weights beside it",
            fix="Upgrade onnxruntime (>= 1.25), or export the package again.",
        ) from error


def _usable_processors() -> int:
    """The processors this process may run on, which may be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
