"""ONNX Runtime's CPU provider as a backend: the default that always works."""

from __future__ import annotations

from contextlib import suppress

from ..errors import BackendError, MemoryLimitError, PackageError
from ..package import Package
from .nets import OnnxRuntimeNet
from .session import library, refusal
from .tuning.cpu_layouts import lowered_graph


class OnnxRuntimeBackend:
    """`HostBackend` of ONNX Runtime."""

    def refusal(self) -> BackendError | None:
        """None if onnxruntime works, else the error that says why not."""
        return refusal()

    def describe(self) -> str:
        """Version and device."""
        return f"onnxruntime {library().__version__} (CPU)"

    def open_net(self, package: Package, name: str, *, threads: int | None = None) -> OnnxRuntimeNet:
        """Load one net of a package on the CPU, in the layout that was measured to be the fastest here.

        Opening never measures. Without an entry in the engine store (`tuning/cpu.py` makes them), or where
        the entry's graph does not open, the package's own graph runs.

        Raises:
            PackageError: ONNX Runtime refuses the graph, or its boundary is not the manifest's.
            MemoryLimitError: the weights do not fit.
            UsageError: `threads` is less than 1.
        """
        lowered = lowered_graph(package, name, str(library().__version__))
        if lowered is not None:
            with suppress(PackageError, MemoryLimitError):
                return OnnxRuntimeNet(package, name, threads=threads, lowered=lowered)
        return OnnxRuntimeNet(package, name, threads=threads)


ONNXRUNTIME = OnnxRuntimeBackend()
