"""Builds one engine in a process of its own: `python -m latentrt.engines.tensorrt.builder`.

A builder takes gigabytes, may be killed for them, and has been known to crash; the application must survive
that. So the library is loaded here only. The job is one line of JSON on stdin (see `Job`), the engine goes to
the path that the job names, and stdout has one JSON object per line::

    {"phase": "Optimizing graph", "fraction": 0.4}       any number of these, fractions never fall
    {"error": {"type": "PackageError", "found": …}}      at most one of these, instead of the facts
    {"facts": {"size": …, "layers": …}}                  the last line

stdin stays open for as long as the parent lives. When it closes, this process ends.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, TextIO

from ..errors import BackendError, LatentrtError, MemoryLimitError, StorageError, UsageError
from ..external_data import external_tensors
from ..spec import NetSpec
from .flavour import FLAGS_NEEDING_GPU, REFITTABLE, Flavour, Trt, flavour, load
from .log import failure, messages
from .network import check_contract, mark_weights, parse_graph

if TYPE_CHECKING:
    from ..store.engine_store import Report


class Weights(str, Enum):
    """Where an engine's weights are, and which of them may change afterwards."""

    embedded = "embedded"  # in the engine, for good: what the optimiser likes best
    stripped = "stripped"  # not in the engine, but taken from the package when it is loaded
    streamed = "streamed"  # in the engine; on the device only as far as a budget allows
    refittable = "refittable"  # in the engine; matrices and convolutions may be replaced, as adapters do


# Names in `BuilderFlag`. REFIT alone is in no policy: it costs fusions, and TensorRT 11.3 documents wrong
# results with it. REFIT_IDENTICAL does neither, and REFIT_INDIVIDUAL leaves alone what is not marked.
FLAGS: Mapping[Weights, tuple[str, ...]] = {
    Weights.embedded: (),
    Weights.stripped: ("REFIT_IDENTICAL", "STRIP_PLAN"),
    Weights.streamed: ("WEIGHT_STREAMING",),
    Weights.refittable: (REFITTABLE,),
}

_COMPATIBILITY = ("", "ampere_plus", "same_compute_capability")


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How to build an engine.

    Attributes:
        weights: see `Weights`.
        optimization_level: 0 (quick build) to 5 (long search); 3 is the libraries' own default.
        workspace_limit: bytes of scratch memory a tactic may use; 0 for the libraries' own default.
        hardware_compatibility: "" for this GPU alone, `ampere_plus`, or `same_compute_capability`.
    """

    weights: Weights = Weights.embedded
    optimization_level: int = 3
    workspace_limit: int = 0
    hardware_compatibility: str = ""

    def __post_init__(self) -> None:
        """Raise UsageError for values that no library takes."""
        if not 0 <= self.optimization_level <= 5:
            raise UsageError(
                f"the optimization level is {self.optimization_level}",
                expected="0 (quick build) to 5 (long search)",
                fix="Use the default: --optimization-level 3.",
            )
        if self.workspace_limit < 0:
            raise UsageError(
                f"the workspace limit is {self.workspace_limit} bytes",
                expected="0 for no limit, or a number of bytes",
                fix="Leave it out, or give MiB: --workspace 4096.",
            )
        if self.hardware_compatibility not in _COMPATIBILITY:
            raise UsageError(
                f"the hardware compatibility is {self.hardware_compatibility!r}",
                expected=", ".join(name or "none at all" for name in _COMPATIBILITY),
                fix="Leave it out for an engine of this GPU alone.",
            )

    @property
    def flags(self) -> tuple[str, ...]:
        """Names in `BuilderFlag`, in alphabetical order."""
        return FLAGS[self.weights]

    def check(self, row: Flavour, *, has_gpu: bool) -> None:
        """Refuse what a library cannot do here, before minutes of building.

        Raises:
            BackendError: the library, or one of the flags, needs a GPU and there is none; or the option has
                no effect with this library.
        """
        name = f"{row.backend} ({row.module} {row.line})"
        if not (row.builds_without_gpu or has_gpu):
            raise BackendError(
                f"{name} builds engines on the GPU that runs them, and there is none here",
                expected="an NVIDIA GPU and its driver",
                fix="Build on the machine that has it, or here with: latentrt build --backend tensorrt-rtx",
            )
        needing = [flag for flag in self.flags if flag in FLAGS_NEEDING_GPU]
        if needing and not has_gpu:
            raise BackendError(
                f"--weights {self.weights.value} ({', '.join(needing)}) needs a GPU with {name}; none found",
                expected="an NVIDIA GPU, or a policy that builds without one: embedded, streamed",
                fix="Build here with --weights embedded, or with this policy where the GPU is.",
            )
        if self.hardware_compatibility and not row.hardware_compatibility:
            raise BackendError(
                f"{name} ignores the hardware compatibility {self.hardware_compatibility!r}",
                expected=f"none: its engines run on compute capability {', '.join(row.compute_capabilities)}",
                fix="Leave the option out.",
            )

    def to_json(self) -> dict[str, Any]:
        """As the builder's job has it."""
        plain = {item.name: getattr(self, item.name) for item in fields(self)}
        return {**plain, "weights": self.weights.value}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> BuildOptions:
        """The reverse of `to_json`."""
        values: dict[str, Any] = {item.name: data[item.name] for item in fields(cls)}
        values["weights"] = Weights(values["weights"])
        return cls(**values)


Facts = dict[str, Any]

_SHOWN = 20  # warnings in the facts
_DEEPEST = 8  # phases within phases
_CHUNK = 1 << 24  # bytes per write


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one build needs. `profiles` are (min, opt, max) per input; `weights` is the weights' folder."""

    backend: str
    net: str
    graph: Path
    weights: Path
    spec: NetSpec
    profiles: tuple[Mapping[str, tuple[tuple[int, ...], ...]], ...]
    options: BuildOptions
    engine: Path
    timing_cache: Path | None = None  # read if it is there, and written; for libraries that have one

    def to_json(self) -> dict[str, Any]:
        """One line for stdin."""
        return {
            **{name: str(getattr(self, name)) for name in ("backend", "net", "graph", "weights", "engine")},
            "spec": self.spec.to_json(),
            "profiles": [dict(profile) for profile in self.profiles],
            "options": self.options.to_json(),
            "timing_cache": str(self.timing_cache) if self.timing_cache else None,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Job:
        """The reverse of `to_json`."""
        return cls(
            backend=data["backend"],
            net=data["net"],
            graph=Path(data["graph"]),
            weights=Path(data["weights"]),
            spec=NetSpec.from_json(data["spec"]),
            profiles=tuple(data["profiles"]),
            options=BuildOptions.from_json(data["options"]),
            engine=Path(data["engine"]),
            timing_cache=Path(data["timing_cache"]) if data["timing_cache"] else None,
        )


@dataclass(kw_only=True)
class _Phase:
    parent: str
    steps: int
    done: int = 0


@dataclass(kw_only=True)
class Phases:
    """TensorRT's nested phases as one fraction that never falls.

    A phase is a number of steps; the phase within it is a part of its current step. Several may run at once,
    in threads of the library: the furthest one counts.
    """

    report: Report
    share: float = 1.0  # of the whole that the phases cover
    _open: dict[str, _Phase] = field(default_factory=dict[str, _Phase])
    _best: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self, name: str, parent: str, steps: int) -> None:
        """A phase begins; `parent` is "" for the outermost."""
        with self._lock:
            self._open[name] = _Phase(parent=parent, steps=max(steps, 1))
            self._report(name)

    def step(self, name: str, index: int) -> None:
        """Step `index`, counted from 0, is complete."""
        with self._lock:
            if name in self._open:
                self._open[name].done = index + 1
                self._report(name)

    def finish(self, name: str) -> None:
        """A phase is over, whether or not all of its steps were reported."""
        with self._lock:
            self._open.pop(name, None)

    def _report(self, name: str) -> None:
        roots = [root for root, phase in self._open.items() if phase.parent not in self._open]
        fraction = max((self._fraction(root, depth=0) for root in roots), default=0.0)
        if fraction >= self._best + 0.005:
            self._best = fraction
            self.report(self._shown(name), round(fraction * self.share, 3))

    def _shown(self, name: str) -> str:
        """The phase of a build that people can follow: the outermost but one."""
        for _ in range(_DEEPEST):
            parent = self._open[name].parent
            if parent not in self._open or self._open[parent].parent not in self._open:
                break
            name = parent
        return name

    def _fraction(self, name: str, *, depth: int) -> float:
        phase = self._open[name]
        within = 0.0
        if depth < _DEEPEST:  # a cycle of names would never end
            inner = [child for child, other in self._open.items() if other.parent == name and child != name]
            within = max((self._fraction(child, depth=depth + 1) for child in inner), default=0.0)
        return min(1.0, (phase.done + min(within, 1.0)) / phase.steps)


def build(job: Job, report: Report) -> Facts:
    """Build the engine of `job` in this process.

    Raises:
        PackageError: the graph cannot be parsed, or does not keep its contract.
        BackendError: the library is missing, or refuses the network.
        MemoryLimitError: the builder ran out of memory and reported it.
        StorageError: the engine cannot be written.
    """
    row = flavour(job.backend)
    trt = load(row)
    log = messages(trt)
    mark = log.mark()
    began = perf_counter()
    report("Parsing", 0.0)
    builder = trt.Builder(log.logger)
    network, parser = parse_graph(trt, row, builder, log.logger, job.graph, job.weights)
    check_contract(trt, network, job.spec, graph=job.graph)
    marked = _replaceable(job) if REFITTABLE in job.options.flags else ()
    mark_weights(row, network, marked, graph=job.graph)
    layers = int(network.num_layers)
    parsed = perf_counter()
    config = _configure(
        trt, row, builder, job, _monitor(trt, Phases(report=report, share=row.reported_share))
    )
    # As one block of the library's memory: a stream writer gets the engine as one `bytes`, a second copy.
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _refused(job, row, log.since(mark, errors_only=True))
    del parser
    report("Writing", 1.0)
    _write(job.engine, plan)
    unsaved = _save_timings(config, job.timing_cache) if row.cache == "timing" and job.timing_cache else []
    return {
        "size": int(plan.nbytes),
        "layers": layers,
        "refittable": len(marked),
        "inputs": [tensor.name for tensor in job.spec.inputs],
        "outputs": [tensor.name for tensor in job.spec.outputs],
        "parse_seconds": round(parsed - began, 3),
        "seconds": round(perf_counter() - began, 3),
        "peak_rss": peak_rss(),
        "library": f"{row.module} {trt.__version__}",
        "warnings": [*unsaved, *log.since(mark)][:_SHOWN],
    }


def _replaceable(job: Job) -> tuple[str, ...]:
    """The weights that an engine which is built refittable lets go of: matrices and convolutions.

    Biases and scales stay where the optimiser folds them: few adapters have any, and with the flag REFIT,
    which frees those too, TensorRT 11.3 documents biases that are lost.
    """
    tensors = external_tensors(job.graph.read_bytes(), job.graph)
    return tuple(tensor.name for tensor in tensors if len(tensor.shape) > 1)


def _configure(trt: Trt, row: Flavour, builder: Trt, job: Job, monitor: Trt) -> Trt:
    config = builder.create_builder_config()
    config.progress_monitor = monitor
    config.builder_optimization_level = job.options.optimization_level
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default, and then fp32 islands have ten bits of mantissa
    # Lets the runtime ask what a call needs at its own shapes, where it would get the profile's largest.
    config.set_preview_feature(trt.PreviewFeature.RUNTIME_ACTIVATION_RESIZE_10_10, True)
    for name in job.options.flags:
        config.set_flag(trt.BuilderFlag.__members__[name])
    if job.options.workspace_limit:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.options.workspace_limit)
    if job.options.hardware_compatibility:
        level = trt.HardwareCompatibilityLevel.__members__[job.options.hardware_compatibility.upper()]
        config.hardware_compatibility_level = level
    for shapes in job.profiles:
        profile = builder.create_optimization_profile()
        for name, (low, opt, high) in shapes.items():
            profile.set_shape(name, trt.Dims(low), trt.Dims(opt), trt.Dims(high))
        config.add_optimization_profile(profile)
    if row.cache == "timing" and job.timing_cache:
        _use_timings(config, job.timing_cache)
    return config


def _use_timings(config: Trt, path: Path) -> None:
    """Those of earlier builds; a new cache where there are none, or the library does not take them.

    It makes no cache of damaged bytes, and refuses one of another device or version.
    """
    known = path.read_bytes() if path.is_file() else b""
    for data in dict.fromkeys((known, b"")):
        cache = config.create_timing_cache(data)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return


def _save_timings(config: Trt, path: Path) -> list[str]:
    """Warnings, never an error: minutes of building must not be lost for what saves some of the next ones."""
    try:
        path.unlink(missing_ok=True)
        cache = config.get_timing_cache()
        data = None if cache is None else cache.serialize()
        if data is None:
            return ["the timing cache was not kept: the library has none"]
        path.write_bytes(memoryview(data))
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            path.unlink(missing_ok=True)  # half a cache is none
        return [f"the timing cache was not kept: {error}"]
    return []


def _refused(job: Job, row: Flavour, errors: list[str]) -> LatentrtError:
    found = failure(
        errors,
        f"{row.module} cannot build the net {job.net!r}",
        net=job.net,
        expected="a network that the library supports",
        fix="Report it with the package's manifest, or use another backend.",
    )
    if isinstance(found, MemoryLimitError):  # to draw smaller pictures is no help here
        fix = "Limit what it tries: --workspace 2048 (MiB), or a smaller --profile."
        expected = "enough memory for the tactics it tries"
        return MemoryLimitError(found.found, expected=expected, fix=fix, culprit=job.net)
    return found


def _write(path: Path, plan: Trt) -> None:
    data = memoryview(plan)
    try:
        with path.open("wb", buffering=0) as file:
            start = 0
            while start < len(data):
                start += file.write(data[start : start + _CHUNK])
    except OSError as error:
        raise StorageError(
            f"the engine of {len(data)} bytes cannot be written: {error.strerror} ({path.parent})",
            expected=f"{len(data)} bytes of free disk",
            fix="Free some (latentrt cache prune), or name another folder: --store FOLDER.",
        ) from error


def _monitor(trt: Trt, phases: Phases) -> Trt:
    """A monitor that hands TensorRT's progress to `phases`."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            phases.start(phase_name, parent_phase or "", num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            phases.step(phase_name, step)
            return True  # to stop a build, the parent ends this process

        def phase_finish(self, phase_name: str) -> None:
            phases.finish(phase_name)

    return Monitor()


def peak_rss() -> int | None:
    """The most memory this process has had, in bytes; None where the system does not tell."""
    status = Path("/proc/self/status")
    if status.is_file():  # not getrusage: its mark survives exec, and would be the parent's
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def _end_with_parent() -> None:
    """End this process when stdin closes: a parent that was killed cannot kill its child."""
    while os.read(0, 1):  # not sys.stdin: its lock would be held when the interpreter wants to end
        pass
    os._exit(1)


def _claim_stdout() -> TextIO:
    """The real stdout, for the protocol; whatever else the library prints goes to stderr."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    return channel


def main() -> int:
    """Read the job, build, report. The exit code is 0 or that of the error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    channel = _claim_stdout()

    def say(**line: Any) -> None:
        print(json.dumps(line), file=channel, flush=True)

    job = Job.from_json(json.loads(sys.stdin.buffer.readline()))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        facts = build(job, lambda phase, fraction: say(phase=phase, fraction=fraction))
    except LatentrtError as error:
        parts = {"found": error.found, "expected": error.expected, "fix": error.fix}
        say(error={"type": type(error).__name__, **parts})
        return error.exit_code
    say(facts=facts)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
