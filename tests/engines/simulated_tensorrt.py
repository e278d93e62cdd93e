"""A stand-in for the TensorRT libraries on host memory.

An engine is a JSON pointer to an ONNX graph, which ONNX Runtime runs at the addresses that were bound. It is
as strict as the libraries: what they refuse returns False or None here, and logs why. Every public name is
one of theirs (`test_tensorrt_names.py` compares).
"""

import ctypes
import json
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

from latentrt.engines.onnxruntime.session import WEIGHTS_FOLDER
from latentrt.engines.profiles import NetProfile
from tests.engines import simulated_tensorrt_names as names
from tests.engines import simulated_tensorrt_refit as refit
from tests.engines.simulated_tensorrt_names import (
    NUMPY_TYPES,
    ONLY,
    ORT_TYPES,
    VARIANTS,
    DataType,
    EngineStat,
    EngineValidity,
    ExecutionContextAllocationStrategy,
    ILogger,
    IRuntimeConfig,
    Severity,
    TensorFormat,
    TensorIOMode,
    TensorLocation,
    World,
)


def simulated_engine(
    variant: str, graph: Path, profiles: Sequence[NetProfile], *, cc: str = "8.9", **extra: Any
) -> bytes:
    """What a builder would have written.

    `extra`: `streamable` (bytes), `budget` (at first), `least` and `most` (of the budget that is accepted),
    `refittable` (names), `merged` (names that must be set together), `stripped`, `resizes` (whether scratch
    follows the shapes), `host` and `vectorised` (names), `stat` (of the weights), `weights` (their folder).
    """
    shapes = [{name: [list(s) for s in span] for name, span in p.shapes.items()} for p in profiles]
    plain = {"graph": str(graph), "profiles": shapes, "library": VARIANTS[variant], "cc": cc}
    return b"engine" + json.dumps({**plain, **extra}).encode()


class Runtime:
    _world: World
    _version: str

    def __init__(self, logger: ILogger) -> None:
        self._logger = logger
        self.engine_host_code_allowed = self._world.host_code

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
        self._world.counts["deserialised"] += 1
        if not serialized_engine.startswith(b"engine"):
            return self._refuse("Serialization assertion header.magicTag == kEXPECTED_MAGIC_TAG failed")
        facts = json.loads(serialized_engine[6:])
        if facts["library"] != self._version:
            return self._refuse(f"engine was built by version {facts['library']}, this is {self._version}")
        if facts["cc"] != self._world.compute_capability:
            return self._refuse(f"engine is for compute {facts['cc']}, not {self._world.compute_capability}")
        if "deserialize" in self._world.failing:
            return self._refuse(self._world.failing.pop("deserialize"))
        return ICudaEngine(self._world, self._logger, facts)

    def _refuse(self, text: str) -> None:
        self._logger.log(Severity.INFO, "Loaded engine size: 0 MiB")
        self._logger.log(Severity.ERROR, f"IRuntime::deserializeCudaEngine: Error Code 1: {text}")

    def get_engine_validity(self, buffer: bytes) -> tuple[EngineValidity, int]:
        self._world.counts["validity"] += 1
        if not buffer.startswith(b"engine"):
            return EngineValidity.INVALID, 32
        if json.loads(buffer[6:])["library"] != self._version:
            return EngineValidity.INVALID, 1
        return EngineValidity(self._world.verdict[0]), self._world.verdict[1]


class ICudaEngine:
    def __init__(self, world: World, logger: ILogger, facts: Mapping[str, Any]) -> None:
        self._world, self._logger, self._facts = world, logger, facts
        self._graph = Path(facts["graph"])
        self._changed: dict[str, np.ndarray] = {}
        self._complete = not facts.get("stripped")
        self._contexts: WeakSet[IExecutionContext] = WeakSet()
        self._open()
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        self._modes = {item.name: TensorIOMode.INPUT for item in inputs}
        self._modes |= {item.name: TensorIOMode.OUTPUT for item in outputs}
        self._types = {item.name: ORT_TYPES[item.type] for item in (*inputs, *outputs)}
        self._shapes = {
            item.name: tuple(size if isinstance(size, int) else -1 for size in item.shape)
            for item in (*inputs, *outputs)
        }
        self._inferred: dict[Any, dict[str, tuple[int, ...]]] = {}
        self._budget = facts.get("budget", self.streamable_weights_size)

    def _open(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        if "weights" in self._facts:
            options.add_session_config_entry(WEIGHTS_FOLDER, self._facts["weights"])
        source: Any = str(self._graph)
        if self._changed:
            model = onnx.load(self._graph)
            for item in model.graph.initializer:
                if item.name in self._changed:
                    item.CopyFrom(numpy_helper.from_array(self._changed[item.name], item.name))
            source = model.SerializeToString()
        self._session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])

    def _error(self, text: str, severity: Severity = Severity.ERROR) -> bool:
        self._logger.log(severity, f"{text}: Error Code 3: API Usage Error")
        return False

    def _fails(self, call: str) -> bool:
        text = self._world.failing.pop(call, "")
        return bool(text) and not self._error(text)

    # ── boundary ───────────────────────────────────────────────────────────────────────────────

    @property
    def num_io_tensors(self) -> int:
        return len(self._modes)

    def get_tensor_name(self, index: int) -> str:
        return list(self._modes)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return self._modes.get(name, TensorIOMode.NONE)

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[self._types[name]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation(int(name in self._facts.get("host", ())))

    def get_tensor_format(self, name: str, profile_index: int) -> TensorFormat:
        assert 0 <= profile_index < self.num_optimization_profiles
        return TensorFormat(int(name in self._facts.get("vectorised", ())))

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._facts["profiles"])

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        assert self._modes[name] == TensorIOMode.INPUT
        return [tuple(shape) for shape in self._facts["profiles"][profile_index][name]]

    # ── memory ─────────────────────────────────────────────────────────────────────────────────

    def _scratch(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """More for larger inputs, and for weights that are streamed."""
        values = sum(map(prod, shapes.values()))
        return 256 * (1 + values // 16) + self._staged()

    def _staged(self) -> int:
        return (self.streamable_weights_size - self._budget) // 512 * 256

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return self._scratch({n: spans[2] for n, spans in self._facts["profiles"][profile_index].items()})

    def get_engine_stat(self, stat: EngineStat) -> int:
        return self._facts.get("stat", 123_456)

    @property
    def streamable_weights_size(self) -> int:
        return self._facts.get("streamable", 0)

    def _streams(self) -> None:
        if not self.streamable_weights_size:
            self._error("the engine was not built with kWEIGHT_STREAMING")

    @property
    def weight_streaming_scratch_memory_size(self) -> int:
        self._streams()
        return self._staged()

    @property
    def weight_streaming_budget_v2(self) -> int:
        self._streams()
        return self._budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget: int) -> None:
        if len(self._contexts):
            self._error("the budget cannot change while there are execution contexts")
        elif budget < self._facts.get("least", 0):
            self._error(f"a budget of {budget} bytes is too small")
            raise RuntimeError("Failed to set the weight streaming budget")
        elif budget > self._facts.get("most", budget):
            self._error(f"out of memory: a budget of {budget} bytes")
            raise RuntimeError("Failed to set the weight streaming budget")
        else:
            self._budget = min(budget, self.streamable_weights_size)

    def get_weight_streaming_automatic_budget(self) -> int:
        return self._facts.get("automatic", self.streamable_weights_size // 2)

    @property
    def refittable(self) -> bool:
        return bool(self._facts.get("refittable"))

    # ── contexts ───────────────────────────────────────────────────────────────────────────────

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig(self._world)

    def create_execution_context(self, strategy: Any) -> Any:
        config = strategy if isinstance(strategy, IRuntimeConfig) else None
        if self._fails("create_execution_context"):
            return None
        allocation = config._strategy if config else strategy
        assert allocation == ExecutionContextAllocationStrategy.USER_MANAGED, "it would allocate by itself"
        self._world.counts["contexts"] += 1
        context = self._world.context(self, config)
        self._contexts.add(context)
        return context

    def _infer(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """The outputs' shapes: of a run on zeros."""
        key = tuple(sorted(shapes.items()))
        if key not in self._inferred:
            zeros = {name: np.zeros(shape, NUMPY_TYPES[self._types[name]]) for name, shape in shapes.items()}
            try:
                results = self._session.run(None, zeros)
            except Exception as error:
                self._error(f"shapes are inconsistent: {str(error)[:200]}")
                raise RuntimeError("shape inference failed") from error
            outputs = [item.name for item in self._session.get_outputs()]
            self._inferred[key] = {n: r.shape for n, r in zip(outputs, results, strict=True)}
        return self._inferred[key]


class IExecutionContext:
    def __init__(self, engine: ICudaEngine, config: IRuntimeConfig | None) -> None:
        self._engine, self._config = engine, config
        self._profile = 0
        self._inputs: dict[str, tuple[int, ...]] = {}
        self._outputs: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._block, self._size = 0, 0
        self._resized = False  # for exactly these shapes
        self._ran = False  # since the shapes were set

    def _forget(self) -> None:
        self._outputs, self._resized, self._ran = {}, False, False

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if not 0 <= profile_index < self._engine.num_optimization_profiles or not stream_handle:
            return self._engine._error(f"there is no profile {profile_index}")
        if self._engine._fails("set_optimization_profile_async"):
            return False
        self._profile, self._inputs = profile_index, {}
        self._forget()
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert isinstance(shape, tuple), "the library's overloads know tuples"
        low, _, high = self._engine._facts["profiles"][self._profile].get(name, ([], [], []))
        fits = len(shape) == len(low) and all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))
        if not fits or self._engine._fails("set_input_shape"):
            return self._engine._error(f"{name} {shape} is outside of profile {self._profile}")
        self._inputs[name] = shape
        self._forget()
        return True

    def infer_shapes(self) -> list[str]:
        wanted = [n for n, mode in self._engine._modes.items() if mode == TensorIOMode.INPUT]
        if unknown := [name for name in wanted if name not in self._inputs]:
            return unknown
        if "infer_shapes" in self._engine._world.failing:
            return [self._engine._world.failing.pop("infer_shapes")]
        self._outputs = self._engine._infer(self._inputs)
        return []

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self._inputs | self._outputs).get(name, self._engine._shapes[name])

    def update_device_memory_size_for_shapes(self) -> int:
        if self.infer_shapes() or self._engine._facts.get("resizes") is False:
            return 0
        self._resized = True
        # Activations alone: the library's documentation can be read like that.
        return self._engine._scratch(self._inputs) - self._engine._staged()

    def _wanted(self) -> int:
        engine = self._engine
        most = engine.get_device_memory_size_for_profile_v2(self._profile)
        return engine._scratch(self._inputs) if self._resized else most

    def set_device_memory(self, memory: int, size: int) -> None:
        if memory % 256 or size < self._wanted() or self._engine._fails("set_device_memory"):
            self._engine._error(f"{size} bytes at {memory:#x}, {self._wanted()} are needed")
            return
        self._block, self._size = memory, size

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._engine._world.counts[f"address {name}"] += 1
        if name not in self._engine._modes or memory % 256 or not memory:
            return self._engine._error(f"{name} at {memory:#x}")
        if self._engine._fails("set_tensor_address"):
            return False
        self._addresses[name] = memory
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        return bool(stream) and "capture" not in self._engine._world.failing

    def execute_async_v3(self, stream_handle: int) -> bool:
        engine = self._engine
        if missing := [name for name in engine._modes if name not in self._addresses]:
            return engine._error(f"no address was set for {missing[0]}")
        if self.infer_shapes() or self._size < self._wanted() or not engine._complete:
            return engine._error("shapes, scratch memory or weights are missing")
        if engine._fails("execute_async_v3"):
            return False
        if self._config is not None:
            self._config._compile(self._profile, self._inputs)
        device = getattr(engine._world.submit, "__self__", None)
        if getattr(device, "recording", None) is not None and not self._ran:
            # "the shapes changed: call enqueueV3() once before graph capture" (TensorRT, CUDA Graphs)
            return engine._error("the first run of a shape cannot be captured")
        self._ran = True
        engine._world.counts["enqueued"] += 1
        engine._world.submit(self._work(engine, dict(self._inputs), dict(self._addresses)))
        return True

    def _work(self, engine: ICudaEngine, shapes: Any, addresses: dict[str, int]) -> Callable[[], None]:
        block, size = self._block, self._size

        def run() -> None:
            arrays = {name: _array(addresses[name], shape, engine, name) for name, shape in shapes.items()}
            ctypes.memset(block, 0xAB, size)  # whatever another context left there is gone
            outputs = [item.name for item in engine._session.get_outputs()]
            for name, result in zip(outputs, engine._session.run(outputs, arrays), strict=True):
                result = np.ascontiguousarray(result)
                ctypes.memmove(addresses[name], result.ctypes.data, result.nbytes)

        return run


def _array(address: int, shape: Sequence[int], engine: ICudaEngine, name: str) -> np.ndarray:
    dtype = np.dtype(NUMPY_TYPES[engine._types[name]])
    buffer = (ctypes.c_char * (prod(shape) * dtype.itemsize)).from_address(address)
    return np.frombuffer(buffer, dtype).reshape(shape).copy()


# What a library's module has. The rest of this file is the test's.
_CLASSES = (
    *(
        getattr(names, name)
        for name in ("DataType", "ILogger", "TensorIOMode", "TensorLocation", "TensorFormat")
    ),
    *(getattr(names, name) for name in ("ExecutionContextAllocationStrategy", *ONLY)),
    *(refit.Weights, refit.Refitter, refit.OnnxParserRefitter, refit.ParserError),
    *(Runtime, ICudaEngine, IExecutionContext),
)


class SimulatedLibrary:
    """The module. `_world` is the test's hold on it."""

    def __init__(self, variant: str, submit: Callable[[Callable[[], None]], Any] | None = None) -> None:
        self._world = World(submit=submit) if submit else World()
        self._world.context = IExecutionContext
        self.__version__ = VARIANTS[variant]
        self.nptype = names.nptype
        for kind in _CLASSES:
            if variant in ONLY.get(kind.__name__, VARIANTS):
                setattr(self, kind.__name__, kind)
        world = {"_world": self._world, "_version": self.__version__}
        self.Runtime = type("Runtime", (Runtime,), world)
        if variant != "tensorrt-rtx":
            self.IExecutionContext = _without(IExecutionContext, "is_stream_capturable")
            self._world.context = self.IExecutionContext
            self.Runtime.get_engine_validity = property()


def _without(kind: type, name: str) -> type:
    """The class as a library that does not have `name` has it."""
    rest = {key: value for key, value in vars(kind).items() if key not in (name, "__dict__", "__weakref__")}
    return type(kind.__name__, (), rest)
