"""What every section of the GPU check uses: a backend's nets on a device, and rows that tell what was found.

The opener is a parameter of every section, so that tests can pass one of their own. A section names what it
looked at in a row's `workload`; `check.py` moves that to the case, beside the backend.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from ...engines.backend import DeviceBackend, choose_backend, to_stderr
from ...engines.cuda.device import CudaDevice
from ...engines.cuda.facts import Nvml, facts
from ...engines.device import Device
from ...engines.errors import BackendError, LatentrtError
from ...engines.package import Manifest, Package
from ...engines.tensorrt.build import built_nets
from ...engines.tensorrt.flavour import ENGINE_BACKENDS, flavour
from ...runtime.loop.device.cuda_graphs import Graphs
from ...runtime.loop.device.loop import DeviceLoop
from ...runtime.pipeline import Pipeline
from ..case import Case
from ..records import Figures, Row
from ..sides.contract import OURS, SIDES, Task
from ..sides.device_work import CountedDevice


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much work the sections do. Pixels are multiples of the package's `size_multiple`.

    Attributes:
        case: the usual guided picture, with few steps: it counts how it looks, not how long it takes.
        short: height of a picture that is not square.
        large, many: side and number of pictures of the request that must not fit (the ladder).
        timed_steps, runs: of what is timed.
        shares: of what the large request takes with memory to spare: how much is left free, in turn.
        pictures: that must leave the host's memory as it is.
        cycles: of opening, drawing and closing, after a first one that is not counted.
        threads: of ONNX Runtime's CPU nets, which say what is right; None is every processor.
    """

    case: Case
    short: int
    large: int
    many: int = 16
    timed_steps: int = 20
    runs: int = 12
    cycles: int = 3
    pictures: int = 200
    shares: tuple[float, ...] = (0.8, 0.65, 0.5, 0.35, 0.25, 0.15, 0.08)
    threads: int | None = None

    @classmethod
    def of(cls, manifest: Manifest) -> Scale:
        """For a GPU: the package's own size, and up to twice that."""
        defaults, multiple = manifest.defaults, manifest.size_multiple
        guidance = defaults.guidance_scale if defaults.guidance_scale > 1 else 5.0
        return cls(
            case=Case.of(manifest, guidance_scale=guidance, steps=8, seed=1),
            short=max(defaults.height * 3 // 4 // multiple, 1) * multiple,
            large=2 * max(defaults.width, defaults.height),
        )

    @property
    def profile(self) -> str:
        """What engines are built for, in the grammar of profiles: all that the sections draw."""
        sizes = self.case.width, self.case.height
        low, high = min(*sizes, self.short), max(*sizes, self.large)
        return f"{'x'.join(f'{low}-{high}@{side}' for side in sizes)}:b1-{self.many}"

    @property
    def timed(self) -> Case:
        """What is timed."""
        return replace(self.case, steps=self.timed_steps)

    @property
    def large_case(self) -> Case:
        """The pictures that must not fit."""
        return replace(self.case, width=self.large, height=self.large, pictures=self.many, steps=3)


@dataclass(frozen=True, kw_only=True)
class Opened:
    """An open pipeline, and what is behind it. `log` has the loop's messages."""

    pipe: Pipeline
    loop: DeviceLoop
    device: CountedDevice
    log: list[str]


@dataclass(frozen=True, kw_only=True)
class Opener:
    """One backend, ready to open.

    Attributes:
        task: the backend's name and the package, as a side opens them.
        package: what is drawn with.
        open_device: from the package and names of nets, a device and the nets on it. Only ONNX Runtime's
            has options: `capture`, runs may be captured; `profile`, a folder for profiles of where nodes ran.
        watch: the same device for an onlooker: it reads the free memory, and takes memory away.
        measured_by: who says how much is free.
        peers: plain loops over the same library, which ours is timed against.
        onnxruntime: whether it takes these options.
        unsupported: why this GPU is none of the backend's, so that being refused is no failure; "" if it is.
    """

    task: Task
    package: Package
    open_device: Callable[..., tuple[Device, Mapping[str, Any]]]
    watch: Callable[[], Device]
    measured_by: str
    peers: tuple[str, ...] = ()
    onnxruntime: bool = False
    unsupported: str = ""

    @contextmanager
    def nets(self, **options: Any) -> Generator[tuple[Device, Mapping[str, Any]], None, None]:
        """A device and every net of the loop."""
        device, nets = self.open_device(self.package, built_nets(self.package), **options)
        with ExitStack() as stack:
            stack.callback(device.close)
            for net in nets.values():
                stack.callback(net.close)
            yield device, nets

    @contextmanager
    def pipeline(self, graphs: Graphs = "off") -> Generator[Opened, None, None]:
        """A pipeline on the device. With graphs "on", runs may be captured, whatever the default is."""
        options = {"capture": True} if graphs == "on" and self.onnxruntime else {}
        device, nets = self.open_device(self.package, built_nets(self.package), **options)
        counted, log = CountedDevice(device), list[str]()
        loop = DeviceLoop(cast(Device, counted), nets, self.package.manifest, graphs=graphs, log=log.append)
        with ExitStack() as stack:
            stack.enter_context(closing(loop))
            pipe = Pipeline.over(self.package, loop, self.task.backend, cache_bytes=0)
            yield Opened(pipe=pipe, loop=loop, device=counted, log=log)


def backend_opener(backend: str, package: Package) -> Opener:
    """For a backend on the first CUDA device.

    Raises:
        BackendError: it cannot run here, with the reason; or it runs on no device.
    """
    name, engine = choose_backend(backend)
    if not isinstance(engine, DeviceBackend):
        raise BackendError(
            f"the backend {name!r} runs on no device",
            expected="onnxruntime-cuda, tensorrt or tensorrt-rtx",
            fix="Leave --backends out to check all of them.",
        )
    gpu = facts()
    listed = flavour(name).compute_capabilities if name in ENGINE_BACKENDS else ()
    supported = not listed or "{}.{}".format(*gpu.compute_capability) in listed
    nvml_sees = not gpu.unified and Nvml(gpu.uuid).memory() is not None
    return Opener(
        task=Task(package=package.root, backend=name, device="cuda"),
        package=package,
        open_device=partial(engine.open_device, log=to_stderr),
        watch=CudaDevice,
        measured_by="NVML, all processes" if nvml_sees else "cudaMemGetInfo",
        peers=(name,) if name in SIDES else (),
        unsupported="" if supported else f"{gpu.sm} is none of {', '.join(listed)}",
        onnxruntime=name == "onnxruntime-cuda",
    )


# ── rows ──────────────────────────────────────────────────────────────────────────────────────────


def judged(what: str, problems: Sequence[str], figures: Figures, samples: Sequence[float] = ()) -> Row:
    """A row that is ok if there are no problems; samples are seconds."""
    return Row(
        side=OURS,
        workload=what,
        rounds=(tuple(samples),) if samples else (),
        status="FAILED" if problems else "ok",
        reason="; ".join(problems),
        figures=figures,
    )


def too_far(likeness_db: float, bar_db: float) -> list[str]:
    """The problem of pictures that are not alike enough, if they are not."""
    return [] if likeness_db >= bar_db else [f"{likeness_db:.1f} dB, below {bar_db:g}"]


def not_available(what: str, reason: str, figures: Figures | None = None) -> Row:
    """The row of what cannot be looked at here."""
    return Row(side=OURS, workload=what, status="not available", reason=reason, figures=figures or {})


def failed(what: str, error: BaseException) -> Row:
    """The row of an exception: our own errors in their words, others with the line that raised them."""
    where = ""
    if not isinstance(error, LatentrtError) and (frames := traceback.extract_tb(error.__traceback__)):
        where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})"
    return judged(what, [f"{type(error).__name__}: {error}{where}"], {})


def attempt(what: str, make: Callable[[], Row]) -> Row:
    """The row that `make` returns, or the row of what it raises: the rows after it are still wanted."""
    try:
        return make()
    except Exception as error:  # whatever a library raises is a result
        return failed(what, error)


def collect(rows: Iterable[Row]) -> Iterator[Row]:
    """`rows`; an exception among them becomes a last row."""
    try:
        yield from rows
    except Exception as error:  # whatever a library raises is a result
        yield failed("the section", error)


def mebibytes(size: int) -> float:
    """Bytes as MiB, for people."""
    return round(size / 2**20, 2)
