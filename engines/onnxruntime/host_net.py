"""A net of a package in a session on ONNX Runtime's CPU provider, called with arrays."""

from __future__ import annotations

from functools import cached_property
from types import TracebackType
from typing import Any

from ..device import MemoryLedger
from ..errors import BackendError, MemoryLimitError, PackageError
from ..net_weights import engine_bytes
from ..package import Package
from ..spec import Array, NetSpec
from .lowering.files import LoweredGraph, session_entries
from .lowering.winograd_kernels import kernels
from .session import check_boundary, library, open_session, run_error, session_options


class OnnxRuntimeNet:
    """A net on the CPU: one session, which several threads may call at once because it has no state.

    Args:
        package: where the net is from; its manifest has the boundary.
        name: the net's name.
        threads: for one run; None is every processor.
        lowered: a graph to run in place of the package's, with the same boundary.

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
        self.layout = lowered.layout if lowered else "plain"  # one of `tuning.cpu_layouts.CPU_LAYOUTS`
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
        # ONNX Runtime reads the kernels where they are, so they must live as long as the session, and a call
        # that still runs may hold the session longer than this net does.
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
        """Bytes of the tensors that its graph names. They are counted on demand, not at every start."""
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


def _give_kernels(options: Any, package: Package, name: str, lowered: LoweredGraph) -> list[Any]:
    """Let a session have the package's weights, and the transformed ones of a lowered graph.

    Returns the transformed weights, which must live as long as the session.
    """
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
