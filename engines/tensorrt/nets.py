"""TensorRT's nets on a device: engines, and execution contexts bound to shapes and addresses for good.

A context is made per binding, gets its profile, shapes, addresses and scratch memory once, and is only
enqueued from then on. Contexts own no activations. All of a process's contexts may share one scratch block,
because they run in order on one stream: whatever one leaves there is dead before the next begins. (The
library documents that the block is in use until execution completes, and that contexts which overlap in time
must not share it.)

The library is the parameter `trt`; where its kinds differ is in `flavour.py`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, TypeAlias
from weakref import WeakSet

from ..device import Addresses, MemoryLedger, Shapes, check_addresses
from ..errors import BackendError, LatentrtError, StorageError
from ..package import Package
from ..profiles import NetProfile, choose
from ..spec import NetSpec, output_shapes
from ..store.engine_store import Entry
from ..store.folder import StoreFolder
from .contract import check_outputs
from .flavour import Engine, Trt, abilities
from .loading import EngineOf, Loaded, check_room, load_engine
from .log import messages
from .refit import refit_changed, refit_stripped

Context: TypeAlias = Any  # IExecutionContext

_LOG = logging.getLogger(__name__)

CACHE_KIND = "runtime"  # the store's folder of these side files


@dataclass(frozen=True, kw_only=True)
class StoredCache:
    """A runtime cache among the store's side files: one per engine and kind of GPU.

    The library takes a cache back on the same kind of GPU alone, so two kinds must not overwrite each
    other's.
    """

    store: StoreFolder
    digest: str  # of the engine's key
    device: str  # its name

    @property
    def name(self) -> str:
        """The file's name."""
        return f"{self.digest[:32]}-{re.sub(r'[^A-Za-z0-9]+', '_', self.device)}"

    def read(self) -> bytes:
        """What was written last; b"" if nothing, or nothing sound."""
        return self.store.read_side_file(self.store.side_file(CACHE_KIND, self.name))

    def write(self, data: bytes) -> None:
        """Replace it. Raises StorageError."""
        self.store.write_side_file(self.store.side_file(CACHE_KIND, self.name), data)


class Contexts:
    """Makes the execution contexts of one engine."""

    def __init__(self, trt: Trt, engine: Engine, file: StoredCache | None) -> None:
        self._trt, self._file = trt, file
        self._config: Any = None
        self._cache: Any = None
        self._stored = b""
        self._new = False  # kernels may have been compiled since `settle`
        if abilities(trt).compiles:
            self._config = self._configure(engine)

    def make(self, engine: Engine) -> Context | None:
        """A context that owns no activations: whoever binds it brings them. None if the library cannot."""
        if self._config is not None:
            return engine.create_execution_context(self._config)
        return engine.create_execution_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)

    def ran(self) -> None:
        """A context has been enqueued for the first time, which is when kernels are compiled."""
        self._new = True

    def settle(self) -> None:
        """Save, if there may be something new. That fails in silence: it would only have saved time."""
        new, self._new = self._new, False
        if new:
            with suppress(StorageError):
                self.save()

    def save(self) -> None:
        """Keep the kernels compiled so far, if any are new. Raises StorageError."""
        cache, file = self._cache, self._file
        if cache is None or file is None:
            return
        data = bytes(cache.serialize())
        if data != self._stored:
            file.write(data)
            self._stored = data

    def close(self) -> None:
        """Let go of the engine. May be called twice."""
        self._cache = self._config = None

    def _configure(self, engine: Engine) -> Any:
        trt, config = self._trt, engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        # Rows are captured by us; a graph of the library's own inside would be a second one.
        config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
        # Otherwise the first pictures run on fallback kernels, several times slower (NVIDIA's demo of 1.5).
        config.dynamic_shapes_kernel_specialization_strategy = (
            trt.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        cache = config.create_runtime_cache()
        if self._file is not None and (stored := self._file.read()):
            # Refused after an update of the driver or the library: then everything is compiled once more.
            self._stored = stored if cache.deserialize(stored) else b""
        config.set_runtime_cache(cache)
        self._cache = cache
        return config


_Binding = tuple[int, tuple[tuple[str, tuple[int, ...]], ...]]  # a profile, and the sorted shapes


def open_entry(
    of: EngineOf, entry: Entry, graph: Path, weights: Path | None = None, changed: Package | None = None
) -> TensorRTNet:
    """`open_engine` for an engine of the store: its bytes are hashed first, and kernels are cached beside it.

    `graph` is the net's own, in the package; it is read only if the engine was built without its weights,
    which are in the folder `weights`, beside the graph where None is given. `changed` is as in `open_engine`.

    Raises:
        EngineError: the entry is damaged (it is in quarantine then), or is another net's.
        StorageError: others could have changed it.
        BackendError, MemoryLimitError: as `open_engine`; or its bytes would not fit beside it.
    """
    check_room(entry, of.device, net=of.net)
    data = entry.read()
    cache = StoredCache(store=entry.store, digest=entry.key.digest, device=of.device.name)
    stripped = "STRIP_PLAN" in entry.key.flags
    return open_engine(
        of, data, cache=cache, graph=graph if stripped else None, weights=weights, changed=changed
    )


def open_engine(
    of: EngineOf,
    data: bytes,
    *,
    cache: StoredCache | None = None,
    graph: Path | None = None,
    weights: Path | None = None,
    changed: Package | None = None,
) -> TensorRTNet:
    """Put an engine on the device.

    Args:
        of: what it is of, and where it goes.
        data: the engine, already checked against its sha256. An engine is code.
        cache: where kernels compiled at run time are kept; libraries that compile none ignore it.
        graph: for a stripped engine, the graph it was built from, whose weights it gets.
        weights: the folder of these weights; None is that of `graph`.
        changed: the package, where it has other weights for this net than it stores.

    Raises:
        BackendError: the engine does not suit the library, driver or device, or refuses weights.
        EngineError: its boundary or profiles are not those of the net.
        MemoryLimitError: it does not fit.
        LatentrtError: as `refit_changed`.
    """
    loaded = load_engine(of, data)
    if graph is not None:
        refit_stripped(of, loaded.engine, graph, weights or graph.parent)
    if changed is not None:
        began = perf_counter()
        count = refit_changed(of, loaded.engine, changed)
        _LOG.info("%d weights of %r were replaced in %.2f s", count, of.net, perf_counter() - began)
    return TensorRTNet(loaded, Contexts(of.trt, loaded.engine, cache))


class TensorRTNet:
    """One engine on one device. Not safe to share between threads without a lock, as its device is not."""

    graphs_outlive_other_shapes = True  # each binding has an execution context of its own

    def __init__(self, loaded: Loaded, contexts: Contexts) -> None:
        self.spec: NetSpec = loaded.spec
        self._name, self._profiles = loaded.net, loaded.profiles
        self.remark = loaded.remark
        self._loaded: Loaded | None = loaded
        self._contexts = contexts
        # `scratch` has made it to learn the size of its scratch memory, and it is not bound yet.
        self._spare: Context | None = None
        self._scratch_sizes: dict[_Binding, int] = {}
        self._bound: WeakSet[BoundTensorRTNet] = WeakSet()
        self._weights = _weight_bytes(loaded)
        self._largest = 0

    @property
    def memory(self) -> MemoryLedger:
        """What it holds now, in bytes.

        Weights are as the library counts them (else the engine's size), less what is streamed. Activations
        are the largest scratch memory that `scratch` returned; nets share it. Inputs and outputs are those of
        the open bindings.
        """
        if self._loaded is None:
            return MemoryLedger(weights=0, activations=0, io=0)
        io = sum(bound.io for bound in self._bound)
        return MemoryLedger(weights=self._weights, activations=self._largest, io=io)

    def scratch(self, shapes: Shapes) -> int:
        """Bytes of activations that a call of these input shapes needs. See DeviceNet.

        Raises:
            UsageError: no profile covers the shapes, or they are none of this net's.
            BackendError, EngineError: after `close`, or the library does not take the shapes as the contract.
            MemoryLimitError: no memory for a context.
        """
        loaded, call = self._call(shapes)
        if call not in self._scratch_sizes:
            with self._context(loaded, call) as context:
                self._scratch_sizes[call] = _needed(loaded, context, call[0])
            self._spare = context
        self._largest = max(self._largest, self._scratch_sizes[call])
        return self._scratch_sizes[call]

    def bind(self, shapes: Shapes, addresses: Addresses, scratch: int) -> BoundTensorRTNet:
        """Set shapes and addresses for good. See DeviceNet; `scratch` is a block as large as it returned.

        Raises:
            UsageError: as `scratch`; or addresses of other names, or not aligned.
            BackendError, EngineError: as `scratch`; or the block is smaller than is needed now.
            MemoryLimitError: no memory for a context.
        """
        loaded, call = self._call(shapes)
        check_addresses(self._name, self.spec, addresses, scratch)
        with self._context(loaded, call) as context:
            self._give(loaded, context, call, addresses, scratch)
        every = {**shapes, **output_shapes(self.spec, shapes)}
        io = sum(tensor.nbytes(every[tensor.name]) for tensor in (*self.spec.inputs, *self.spec.outputs))
        bound = BoundTensorRTNet(loaded, context, self._contexts, profile=self._profiles[call[0]], io=io)
        self._bound.add(bound)
        return bound

    def settle(self) -> None:
        """Keep kernels that were compiled since the last time for later processes. See DeviceNet."""
        self._contexts.settle()

    def release(self) -> None:
        """Free the context that is not bound. See DeviceNet."""
        if self._loaded is not None:
            self._drop_spare(self._loaded)

    def stream_weights(self) -> int:
        """Keep as few of the weights on the device as the library can; the bytes freed, 0 if it cannot.

        Only engines built with WEIGHT_STREAMING can. All bindings are closed, since the library allows the
        change only while the engine has no context. Scratch memory grows: ask `scratch` again.

        Raises:
            BackendError: after `close`, or what failed on the device before.
        """
        loaded = self._opened()
        engine = loaded.engine
        before = min(int(engine.weight_streaming_budget_v2), loaded.streamable) if loaded.streamable else 0
        if before <= 0:
            return 0
        self._close_contexts(loaded)
        # 0 streams the most; where a single layer's weights are too large for that, the library's own choice.
        for budget in (0, int(engine.get_weight_streaming_automatic_budget())):
            with suppress(RuntimeError):
                engine.weight_streaming_budget_v2 = budget
            if (freed := before - int(engine.weight_streaming_budget_v2)) > 0:
                self._weights = max(0, self._weights - freed)
                return freed
        return 0

    def close(self) -> None:
        """Free contexts, then the engine. May be called twice."""
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            with ExitStack() as stack:
                stack.callback(self._contexts.close)
                self._close_contexts(loaded)
                with suppress(StorageError):  # it would only have saved time
                    self._contexts.save()

    # ── contexts ─────────────────────────────────────────────────────────────────────────────────

    def _opened(self) -> Loaded:
        if self._loaded is None:
            raise BackendError(
                f"the net {self._name!r} is closed", expected="an open net", fix="Open it again."
            )
        return self._loaded

    def _call(self, shapes: Shapes) -> tuple[Loaded, _Binding]:
        loaded = self._opened()
        backend = loaded.flavour.backend
        index = choose(self._profiles, shapes, backend=backend, package=loaded.package)
        output_shapes(self.spec, shapes)  # `choose` looks at each shape by itself
        return loaded, (index, tuple(sorted((name, tuple(shape)) for name, shape in shapes.items())))

    @contextmanager
    def _context(self, loaded: Loaded, call: _Binding) -> Generator[Context]:
        """A context with profile and shapes set: the spare one, or a new one."""
        mark = messages(loaded.trt).mark()
        context, self._spare = self._spare, None
        if context is None:
            context = self._contexts.make(loaded.engine)
        if context is None:
            raise loaded.failed(mark, "gets no execution context")
        try:
            self._shape(loaded, context, call, mark)
            yield context
        except BaseException:
            # The change of profile may have enqueued copies, and an error drops the context they are for.
            with suppress(LatentrtError):
                loaded.device.synchronize()
            raise

    def _shape(self, loaded: Loaded, context: Context, call: _Binding, mark: int) -> None:
        index, shapes = call
        # In this order: a change of profile forgets all shapes.
        if not context.set_optimization_profile_async(index, loaded.device.stream):
            raise loaded.failed(mark, f"refuses its profile {index} ({self._profiles[index].label})")
        refused = [name for name, shape in shapes if not context.set_input_shape(name, shape)]
        if refused:
            raise loaded.failed(mark, f"refuses the shapes {dict(shapes)}, first that of {refused[0]!r}")
        try:
            unknown = list(context.infer_shapes())
        except RuntimeError as error:
            raise loaded.failed(mark, f"finds the shapes {dict(shapes)} inconsistent ({error})") from error
        if unknown:
            raise loaded.failed(mark, f"does not know the shapes of {unknown}")
        found = {item.name: tuple(context.get_tensor_shape(item.name)) for item in self.spec.outputs}
        check_outputs(self.spec, dict(shapes), found, net=self._name, fix=loaded.rebuild)

    def _give(
        self, loaded: Loaded, context: Context, call: _Binding, addresses: Addresses, scratch: int
    ) -> None:
        """Scratch memory and addresses, to a context that has its shapes."""
        known, needed = self._scratch_sizes.get(call, 0), _needed(loaded, context, call[0])
        if needed > known or (needed and not scratch):
            raise BackendError(
                f"the net {self._name!r} needs {needed} bytes of scratch memory for {dict(call[1])}",
                expected=f"at most the {known if scratch else 0} bytes that it was given",
                fix="Ask scratch(shapes) first, again after weights were moved, and allocate that much.",
            )
        log = messages(loaded.trt)
        mark = log.mark()
        if needed:
            context.set_device_memory(scratch, needed)
        refused = [
            name for name, address in addresses.items() if not context.set_tensor_address(name, address)
        ]
        # `set_device_memory` returns nothing: a refusal shows in the log alone.
        if refused or log.since(mark, errors_only=True):
            raise loaded.failed(mark, f"refuses the addresses of {refused or 'its scratch memory'}")

    def _close_contexts(self, loaded: Loaded) -> None:
        self._scratch_sizes.clear()
        with ExitStack() as stack:  # every one, also when the device reports an old error at the first
            for bound in list(self._bound):
                stack.callback(bound.close)
            self._drop_spare(loaded)

    def _drop_spare(self, loaded: Loaded) -> None:
        spare, self._spare = self._spare, None
        if spare is not None:
            loaded.device.synchronize()  # its change of profile may still be under way


class BoundTensorRTNet:
    """`BoundNet`: a context with everything set, only enqueued from now on. `io` is bytes in and out."""

    def __init__(
        self, loaded: Loaded, context: Context, contexts: Contexts, *, profile: NetProfile, io: int
    ) -> None:
        self.profile, self.io = profile.label, io
        self._contexts: Contexts | None = contexts  # until the first run
        self._held: tuple[Loaded, Context] | None = (loaded, context)
        self._stream = loaded.device.stream

    @property
    def capturable(self) -> bool:
        """Whether the library says that a run can be captured; True where it does not say."""
        loaded, context = self._opened()
        tells = abilities(loaded.trt).tells_capturable
        return not tells or bool(context.is_stream_capturable(self._stream))

    def enqueue(self) -> None:
        """Put one run on the stream. Raises BackendError (also after `close`), MemoryLimitError."""
        loaded, context = self._opened()
        mark = messages(loaded.trt).mark()
        if not context.execute_async_v3(self._stream):
            raise loaded.failed(mark, "could not be enqueued")
        if self._contexts is not None:
            self._contexts.ran()
            self._contexts = None

    def close(self) -> None:
        """Free the context, once the stream is done with it. May be called twice."""
        held, self._held, self.io = self._held, None, 0
        if held is not None:
            # `held` has the last reference: destroying a context that still runs is undefined behaviour.
            held[0].device.synchronize()

    def _opened(self) -> tuple[Loaded, Context]:
        if self._held is None:
            raise BackendError(
                f"a binding of the profile {self.profile!r} is closed",
                expected="one that is open",
                fix="Bind the net again; moving weights off the device closes all bindings.",
            )
        return self._held


def _needed(loaded: Loaded, context: Context, profile: int) -> int:
    """Bytes of scratch memory. Asking also makes the context content with that little."""
    size = int(context.update_device_memory_size_for_shapes())
    most = int(loaded.engine.get_device_memory_size_for_profile_v2(profile))
    # 0 is none, or an error; the upper bound of the profile is right in both cases.
    if not size or not loaded.streamable:
        return size or most
    # ICudaEngine's documentation: the V2 sizes (of the engine, of a profile) include the memory through which
    # weights are streamed, and where a block has no room for it, the library allocates by itself. Of the size
    # for shapes it only says that it is the total: so both, up to what is known to be enough.
    staged = int(loaded.engine.weight_streaming_scratch_memory_size)
    return max(size, min(size + staged, most))


def _weight_bytes(loaded: Loaded) -> int:
    known = 0
    if abilities(loaded.trt).statistics:
        known = int(loaded.engine.get_engine_stat(loaded.trt.EngineStat.TOTAL_WEIGHTS_SIZE))
    # -1 is an engine that does not know.
    weights = known if known > 0 else loaded.size
    if not loaded.streamable:
        return weights
    return max(0, weights - max(0, loaded.streamable - int(loaded.engine.weight_streaming_budget_v2)))
