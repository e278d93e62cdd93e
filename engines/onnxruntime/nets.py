"""Nets of ONNX Runtime: on the CPU called with arrays, or bound to a device's addresses once and run there.

With the CUDA provider the session gets the device's own stream, so that copies and nets are ordered without a
wait, and a run returns before the GPU is done. With the CPU provider the same code runs on host addresses.

Activations come from the session's arena, which a run may enlarge. Whoever captures a run must have run it
once before, plainly, with the same shapes; then the arena has what it needs. A captured graph uses the arena:
close it before the net, and before `release`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..device import Addresses, Device, MemoryLedger, Shapes, check_addresses
from ..errors import BackendError, LatentrtError, MemoryLimitError, PackageError, UsageError, command
from ..heap import give_back_heap
from ..installed import install_command
from ..net_weights import engine_bytes, reading_changes
from ..package import Package
from ..spec import DTYPES, Array, NetSpec, output_shapes
from ..spilled import available_bytes, spill
from ..store.files import default_root
from .cuda_libraries import load_libraries
from .lowering.files import LoweredGraph, give_weights
from .lowering.winograd import kernels
from .session import (
    CPU,
    LARGE,
    check_boundary,
    library,
    open_session,
    refusal,
    returning_options,
    run_error,
    run_options,
    session_options,
    shrinking_options,
    spare_memory,
)
from .wheels import reinstall_command

CUDA = "CUDAExecutionProvider"
_WIDENED = 4  # times as many bytes as stored, at most: fp8 that is computed with in fp32
_HELD = 2  # times the weights, at most: while a net is opened, or where the next one follows
_FELT = 2**26  # bytes of weights files from which what loading them leaves behind is worth a look

Submit = Callable[[Callable[[], None]], None]


def cuda_refusal() -> BackendError | None:
    """None if ONNX Runtime can run nets on a CUDA device here, else the error. Never raises."""
    if found := refusal():
        return found
    if CUDA not in library().get_available_providers():
        return BackendError(
            "the installed onnxruntime has no CUDA provider",
            expected="the wheel onnxruntime-gpu, alone",
            fix=f"Install it: {reinstall_command(gpu=True)}",
        )
    from ..cuda import facts  # here: "auto" asks at every start, and a CPU needs nothing of CUDA

    return facts.refusal()


def cuda_available() -> str | None:
    """None if ONNX Runtime can run nets on a CUDA device here, else the reason. Never raises."""
    found = cuda_refusal()
    return None if found is None else found.found


class OnnxRuntimeNet:
    """A net on the CPU: one session, which several threads may call at once because it has no state.

    `threads` are for one run (None is every processor); `lowered` runs in place of the package's graph.

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
        self.layout = lowered.layout if lowered else "plain"  # of `tuning.cpu_layouts.layouts_of`
        content = lowered.graph if lowered else None
        file = package.manifest.nets[name]
        self.spec: NetSpec = file.spec
        graph = package.path(file.graph)
        options = session_options(threads)
        self._package, self._lowered = package, lowered
        # Counting reads the graph, which no start shall wait for where a look at the files is enough.
        stored = sum(package.manifest.files[weights].size for weights in file.weights)
        if _WIDENED * stored > LARGE:
            spare_memory(options, self._weights)
        give_weights(options, package, name)
        kernels = _give_kernels(options, package, name, lowered) if lowered else []
        changed = give_changes(options, package, name, content)
        content = changed.graph if changed else content
        self._session: Any = open_session(graph, options, [CPU], culprit=name, content=content)
        self._is_felt = stored > _FELT
        if self._is_felt:
            give_back_heap()
        # ONNX Runtime reads what it was given where it is, so that must live as long as the session, and a
        # call that still runs may hold the session longer than this net does.
        self._session.given = [*kernels, *(changed.values if changed else ())]
        self._outputs = [output.name for output in self.spec.outputs]
        self._kernels = sum(int(value.tensor_size_in_bytes()) for value in kernels)
        self._io = 0
        try:
            check_boundary(self._session, self.spec, graph)
        except PackageError:
            self.close()
            raise

    @property
    def memory(self) -> MemoryLedger:
        """Weights at the width of the arithmetic, and the inputs and outputs of the last call.

        Raises PackageError if the graph cannot be read any more.
        """
        return MemoryLedger(weights=self._weights + self._kernels, activations=None, io=self._io)

    @cached_property
    def _weights(self) -> int:
        """Bytes of the tensors that its graph names, without those that are made as it is opened."""
        content = self._lowered.graph if self._lowered else None
        made = {kernel.name for kernel in self._lowered.kernels} if self._lowered else set[str]()
        return engine_bytes(self._package, self.name, content, without=made)

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
        if self._session is not None:
            self._session = None
            if self._is_felt:
                give_back_heap()

    def __enter__(self) -> OnnxRuntimeNet:
        """The net itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()


def _give_kernels(options: Any, package: Package, name: str, lowered: LoweredGraph) -> list[Any]:
    """Let a session have the transformed weights of a lowered graph.

    Returns them; they must live as long as the session.
    """
    make = library().OrtValue.ortvalue_from_numpy
    values = list[Any]()
    try:
        for kernel, array in kernels(package, name, lowered.kernels):
            values.append(make(array))
            options.add_initializer(kernel.name, values[-1])
    except MemoryError as error:
        raise MemoryLimitError(
            f"the weights of {name!r} for Winograd's convolutions do not fit the memory",
            expected="enough free memory",
            fix="Close other programs, or forget the layout: latentrt cache prune --all",
            culprit=name,
        ) from error
    except (ValueError, KeyError, OSError) as error:
        raise PackageError(
            f"{package.root} has no weights for the layout of {name!r} ({type(error).__name__}: {error})",
            expected="the weights that the layout was measured with",
            fix="Forget the layout with `latentrt cache prune --all`, then measure again: "
            + command("latentrt", "build", package.root, "--backend", "onnxruntime"),
        ) from error
    return values


@dataclass(frozen=True, kw_only=True)
class _Changed:
    """A graph to open in place of the package's, and what must live as long as a session of it."""

    graph: bytes
    values: list[Any]


def give_changes(options: Any, package: Package, name: str, content: bytes | None) -> _Changed | None:
    """Let a session compute with the weights that the package has in place of stored ones.

    Args:
        options: of the session.
        package: the package.
        name: of the net.
        content: the graph that runs in place of the package's.

    Returns:
        What to open, None where there are no changes for this net.

    Raises:
        NumericError: a changed weight is beyond what fp16 holds.
        MemoryLimitError: the weights do not fit.
        PackageError: the weights files are not what the graph says.
    """
    if not package.changes:
        return None
    from ..graphs.changed import changed_graph

    make = library().OrtValue.ortvalue_from_numpy
    path = package.path(package.manifest.nets[name].graph)
    with reading_changes(package, name):
        changed = changed_graph(package, name, content or path.read_bytes())
    if changed is None:
        return None
    available = available_bytes()
    # The library packs matrices, and never looks at these again.
    if available is not None and available < _HELD * engine_bytes(package, name):
        spill(changed.values, default_root())
    values = {key: make(array) for key, array in changed.values.items()}
    options.add_external_initializers(list(values), list(values.values()))
    return _Changed(graph=changed.graph, values=list(values.values()))


def open_onnxruntime_net(
    package: Package,
    name: str,
    device: Device,
    *,
    provider: str = CUDA,
    graph: Path | None = None,
    threads: int | None = None,
    submit: Submit | None = None,
    profile: Path | None = None,
    settings: Mapping[str, str] | None = None,
) -> OnnxRuntimeDeviceNet:
    """Load one net of a package onto a device.

    Args:
        package: where the net is from; its manifest has the boundary.
        name: of the net.
        device: whose addresses it will be bound to, and with CUDA the stream (`device.stream`).
        provider: CUDAExecutionProvider, or CPUExecutionProvider for a device on host memory.
        graph: what to run in place of the package's, with the same boundary: `lowering.lower`
            wrote it, and its weights are still the package's.
        threads: of CPUExecutionProvider; None is every processor. With CUDA a single one computes shapes.
        submit: takes each run in place of calling it: how a device without a CUDA stream orders it.
        profile: a folder for the library's profile of every run.
        settings: of an experiment: options of the CUDA provider in place of ours, and entries of its session
            (`session.…`). Whoever leaves them out has what is best as far as anyone knows.

    Raises:
        BackendError: the provider cannot run here, or `device` has no stream for it.
        PackageError: ONNX Runtime refuses the graph, or its boundary is not the manifest's.
        MemoryLimitError: the weights do not fit.
        UsageError: an unknown provider, or `threads` less than 1.
    """
    if provider not in (CUDA, CPU):
        raise UsageError(
            f"provider is {provider!r}",
            expected=f"{CUDA} or {CPU}",
            fix="Leave it out for the usual one.",
        )
    file = package.manifest.nets[name]
    path = graph or package.path(file.graph)
    options = session_options(1 if provider == CUDA else threads)
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile / name)
    give_weights(options, package, name)
    changed = give_changes(options, package, name, graph.read_bytes() if graph else None)
    content = changed.graph if changed else None
    if provider == CPU:
        session = open_session(path, options, [CPU], culprit=name, content=content)
    else:
        session = _open_cuda_session(path, options, device, settings or {}, name, content)
    session.given = changed.values if changed else []
    try:
        check_boundary(session, file.spec, path)
        if provider == CUDA:
            _check_inputs_stay(session, name)
        weights = engine_bytes(package, name)
    except LatentrtError:
        del session  # its memory, before anyone handles the error
        raise
    layout = "plain" if graph is None else "nhwc"
    return OnnxRuntimeDeviceNet(name, file.spec, session, device, weights, provider, layout, submit)


class OnnxRuntimeDeviceNet:
    """`DeviceNet` of ONNX Runtime; made by `open_onnxruntime_net`."""

    # A session keeps cuDNN's plans of one shape, and destroys them when it runs another: a graph that was
    # recorded from them might launch what is not there any more.
    graphs_outlive_other_shapes = False

    def __init__(
        self,
        name: str,
        spec: NetSpec,
        session: Any,
        device: Device,
        weights: int,
        provider: str,
        layout: str,
        submit: Submit | None,
    ) -> None:
        self.name = name
        self.submit: Submit = submit or _at_once
        self.spec = spec
        self._session = session
        self._device = device
        self._weights = weights
        self.on_cuda = provider == CUDA
        self.run_options = returning_options() if self.on_cuda else run_options()
        self.place = f"CUDA {layout}" if self.on_cuda else "CPU"
        self._kind, self._index = ("cuda", _index(device)) if self.on_cuda else ("cpu", 0)
        self._bound: dict[OnnxRuntimeBoundNet, dict[int, int]] = {}  # with bytes by address

    @property
    def memory(self) -> MemoryLedger:
        """Weights at the width of the arithmetic, and bound inputs and outputs, each address once.

        Activations are None: the arena's statistics are not in the Python API (1.31).
        """
        io: dict[int, int] = {}
        for sizes in self._bound.values():
            for address, size in sizes.items():
                io[address] = max(size, io.get(address, 0))
        return MemoryLedger(weights=self._weights, activations=None, io=sum(io.values()))

    def scratch(self, shapes: Shapes) -> int:
        """0: the session has an arena of its own. Raises UsageError for shapes that are not the net's."""
        output_shapes(self.spec, shapes)
        return 0

    def bind(self, shapes: Shapes, addresses: Addresses, scratch: int) -> OnnxRuntimeBoundNet:
        """Set shapes (inputs) and addresses (inputs and outputs) for good; `scratch` is not used.

        Raises:
            UsageError: shapes or names that are not the net's, or an address that is 0 or not aligned.
            BackendError: the net is closed, or ONNX Runtime refuses.
            MemoryLimitError: ONNX Runtime runs out of memory.
        """
        del scratch
        session = self.session()
        every = {**shapes, **output_shapes(self.spec, shapes)}
        check_addresses(self.name, self.spec, addresses)
        binding = session.io_binding()
        try:
            for bind, group in (
                (binding.bind_input, self.spec.inputs),
                (binding.bind_output, self.spec.outputs),
            ):
                for item in group:
                    place = every[item.name], addresses[item.name]
                    bind(item.name, self._kind, self._index, DTYPES[item.dtype], *place)
        except Exception as error:  # onnxruntime raises a dozen classes of its own, all derived from it
            raise run_error(self.name, error, shapes) from error
        bound = OnnxRuntimeBoundNet(self, binding, dict(shapes))
        self._bound[bound] = {
            addresses[item.name]: item.nbytes(every[item.name])
            for item in (*self.spec.inputs, *self.spec.outputs)
        }
        return bound

    def session(self) -> Any:
        """The session. Raises BackendError once closed."""
        if self._session is None:
            raise BackendError(
                f"the net {self.name!r} is closed", expected="an open net", fix="Open it again before use."
            )
        return self._session

    def forget(self, bound: OnnxRuntimeBoundNet) -> None:
        """For OnnxRuntimeBoundNet: it is closed."""
        self._bound.pop(bound, None)

    def settle(self) -> None:
        """Nothing: a run leaves nothing behind."""

    def release(self) -> None:
        """Give back what the arena holds beyond its blocks in use: activations of earlier calls.

        No graph may be left that was captured. What cannot be given back stays: that is no error.
        """
        if self._session is None:
            return
        shapes = {
            item.name: [1 if isinstance(n, str) else n for n in item.shape] for item in self.spec.inputs
        }
        feeds = {item.name: np.zeros(shapes[item.name], DTYPES[item.dtype]) for item in self.spec.inputs}
        arena = f"{'gpu' if self.on_cuda else 'cpu'}:{self._index}"
        with suppress(Exception):  # it always ends with one: the run is terminated
            self._session.run(None, feeds, shrinking_options(arena))

    def end_profile(self) -> Path:
        """The file with the profile of every run until now. Raises BackendError if nothing was profiled."""
        if file := self.session().end_profiling():
            return Path(file)
        raise BackendError(
            f"the net {self.name!r} has no profile",
            expected="a net opened with a folder for its profile",
            fix="Pass `profile` to open_onnxruntime_net.",
        )

    def stream_weights(self) -> int:
        """0: ONNX Runtime keeps all weights on the device."""
        return 0

    def close(self) -> None:
        """Free the session, and every binding. May be called twice."""
        for bound in list(self._bound):
            bound.close()
        self._session = None


class OnnxRuntimeBoundNet:
    """`BoundNet` of ONNX Runtime."""

    capturable = True

    def __init__(self, net: OnnxRuntimeDeviceNet, binding: Any, shapes: Shapes) -> None:
        self._net = net
        self._binding = binding
        self._shapes = shapes
        self.profile = f"onnxruntime {net.place}, any shape"

    def enqueue(self) -> None:
        """Put one run on the device's stream. Raises BackendError, also once closed, MemoryLimitError."""
        self._check_open()
        self._net.submit(self._run)

    def _run(self) -> None:
        self._check_open()
        session = self._net.session()
        try:
            session.run_with_iobinding(self._binding, self._net.run_options)
        except Exception as error:  # onnxruntime raises a dozen classes of its own, all derived from it
            raise run_error(self._net.name, error, self._shapes) from error

    def _check_open(self) -> None:
        if self._binding is None:
            raise BackendError(
                f"a binding of the net {self._net.name!r} is closed",
                expected="an open binding",
                fix="Bind the net again.",
            )

    def close(self) -> None:
        """Free the binding; the memory behind it is the caller's. May be called twice."""
        self._binding = None
        self._net.forget(self)


def _at_once(work: Callable[[], None]) -> None:
    work()


def _index(device: Device) -> int:
    return int(getattr(device, "index", 0))


def _check_inputs_stay(session: Any, name: str) -> None:
    """Refuse a session that wants an input on the host.

    Binding copies such an input there, once (onnxruntime: core/session/IOBinding.cc, BindInput): every later
    run would silently see what lay at the address then.
    """
    infos = zip(session.get_inputs(), session.get_input_memory_infos(), strict=True)
    if moved := [item.name for item, info in infos if info.name.lower() == "cpu"]:
        raise BackendError(
            f"onnxruntime runs the first nodes of {name!r} behind {moved} on the CPU",
            expected="nodes that its CUDA provider has kernels for",
            fix="Upgrade onnxruntime-gpu, or use --backend onnxruntime",
        )


def _open_cuda_session(
    path: Path,
    options: Any,
    device: Device,
    changed: Mapping[str, str],
    name: str,
    content: bytes | None,
) -> Any:
    if found := cuda_refusal():
        raise BackendError(
            f"onnxruntime cannot run on CUDA: {found.found}", expected=found.expected, fix=found.fix
        )
    stream: object = getattr(device, "stream", None)
    if not (isinstance(stream, int) and stream):
        raise BackendError(
            f"onnxruntime cannot run on CUDA: {device.name} has no CUDA stream",
            expected="a CUDA device",
            fix="Run on the CPU: --backend onnxruntime",
        )
    missing = load_libraries() or "it does not say why"
    # The second run of a shape would allocate one block for the pattern that the first one left
    # (github.com/microsoft/onnxruntime/issues/14942), and a capture must not allocate.
    options.enable_mem_pattern = False
    settings = {
        # Weights outside the arena, so that it holds activations alone.
        "session.use_device_allocator_for_initializers": "1",
        "cudnn_conv_algo_search": "HEURISTIC",  # costs nothing, and is the same in every run
        # With it the provider takes every node, and computes the integers of shapes on the GPU: a copy back
        # stalls the host in the middle of each run, and such a run cannot be captured.
        "prefer_nhwc": "0",
        "device_id": str(_index(device)),
        "user_compute_stream": str(stream),
        "arena_extend_strategy": "kSameAsRequested",  # not the next power of two
        "use_tf32": "0",  # 10 bits of mantissa: fp32 nets are what parity is measured with
        # Flash, memory-efficient, or plain attention (1, 2, 16 of AttentionBackend): kernels that are in the
        # library. On sm_90 and later it would take cuDNN's, which are compiled when they first run.
        "sdpa_kernel": "19",
        **changed,
    }
    of_session = {key: value for key, value in settings.items() if key.startswith("session.")}
    for key, value in of_session.items():
        options.add_session_config_entry(key, value)
    of_provider = {key: value for key, value in settings.items() if key not in of_session}
    session = open_session(path, options, [(CUDA, of_provider), CPU], culprit=name, content=content)
    if CUDA not in session.get_providers():
        raise BackendError(
            f"onnxruntime's CUDA provider did not load, and the CPU would run the net ({missing})",
            expected="the CUDA and cuDNN libraries of its own version",
            fix=f"Install them: {install_command('cuda')}",
        )
    return session
