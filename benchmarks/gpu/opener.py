"""What every step of the GPU check uses: a backend's pipeline on a device, and rows that tell its finds.

The opener is a parameter of every step, so that tests can pass one of their own. A step names what it looked
at in a row's `workload`; `check.py` moves that to the case, beside the backend.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, cast

import numpy as np

from ...engines.backend import DeviceBackend, choose_backend
from ...engines.cuda.device import CudaDevice
from ...engines.cuda.facts import facts
from ...engines.device import Device
from ...engines.errors import BackendError, LatentrtError
from ...engines.onnxruntime.lowering.lower import lower
from ...engines.onnxruntime.nets import open_onnxruntime_net
from ...engines.onnxruntime.tuning.cuda_layouts import LOWERED_NETS
from ...engines.package import Manifest, Package
from ...engines.spec import Array
from ...engines.tensorrt.build import built_nets
from ...engines.tensorrt.flavour import ENGINE_BACKENDS, flavour
from ...runtime.loop.device.loop import DeviceLoop
from ...runtime.loop.device.verdicts import Graphs
from ...runtime.pipeline import Pipeline
from ..case import Case
from ..records import Figures, Row
from ..sides.contract import OURS, Task


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much work the steps do. Pixels are multiples of the package's `size_multiple`.

    Attributes:
        case: the usual guided picture, with few steps: it counts how it looks, not how long it takes.
        several: three pictures at once that are not square.
        large: the largest that engines are built for.
        steps, runs: of what is timed, and how often loops are compared.
    """

    case: Case
    several: Case
    large: Case
    steps: int = 20
    runs: int = 12

    @classmethod
    def of(cls, manifest: Manifest) -> Scale:
        """For a GPU: the package's own size, and up to twice that."""
        defaults, multiple = manifest.defaults, manifest.size_multiple
        guidance = defaults.guidance_scale if defaults.guidance_scale > 1 else 5.0
        case = Case.of(manifest, guidance_scale=guidance, steps=8, seed=1)
        short, large = max(case.height * 3 // 4 // multiple, 1) * multiple, 2 * max(case.width, case.height)
        return cls(
            case=case,
            several=replace(case, pictures=3, height=short),
            large=replace(case, width=large, height=large, pictures=16, steps=3),
        )

    @property
    def profile(self) -> str:
        """What engines are built for, in the grammar of profiles: all that the steps draw."""
        low, high = min(self.case.width, self.several.height), self.large.width
        width, height = (f"{low}-{high}@{side}" for side in (self.case.width, self.case.height))
        return f"{width}x{height}:b1-{self.large.pictures}"


class Opened(NamedTuple):
    """An open pipeline, and what is behind it; `log` has the loop's messages."""

    pipe: Pipeline
    loop: DeviceLoop
    log: list[str]


@dataclass(frozen=True, kw_only=True)
class Opener:
    """One backend, ready to open.

    Attributes:
        task, package: as a side opens them.
        open_device: a device with every net of the package, or those that `nets` names. Only ONNX Runtime's
            has other options: `profile`, a folder for profiles of where nodes ran; `layout` and `settings`,
            as `_open_nets` has them.
        watch: the same device for an onlooker: it reads the free memory, and takes memory away.
        folder: where a step leaves what later ones compare with.
    """

    task: Task
    package: Package
    open_device: Callable[..., tuple[Device, Mapping[str, Any]]]
    watch: Callable[[], Device]
    folder: Path

    @property
    def onnxruntime(self) -> bool:
        """Whether `open_device` takes ONNX Runtime's options."""
        return self.task.backend == "onnxruntime-cuda"

    @contextmanager
    def pipeline(self, graphs: Graphs = "off", **options: Any) -> Generator[Opened, None, None]:
        """A pipeline on the device."""
        device, nets = self.open_device(**options)
        log = list[str]()
        loop = DeviceLoop(device, nets, self.package.manifest, graphs=graphs, log=log.append)
        with closing(loop):
            yield Opened(Pipeline.over(self.package, loop, self.task.backend, cache_bytes=0), loop, log)


def why_not(backend: str) -> str:
    """Why a backend cannot run on this GPU, to be asked before anything is made for it; "" if it can."""
    try:
        name, _ = choose_backend(backend)
    except BackendError as error:
        return error.found
    gpu, listed = facts(), flavour(name).compute_capabilities if name in ENGINE_BACKENDS else ()
    if not listed or "{}.{}".format(*gpu.compute_capability) in listed:
        return ""
    return f"{name} lists {', '.join(listed)}, and this GPU is {gpu.sm}"


def backend_opener(backend: str, package: Package, folder: Path) -> Opener:
    """For a backend on the first CUDA device. Raises BackendError, with the reason, if it cannot run here."""
    name, engine = choose_backend(backend)

    def open_device(
        nets: Sequence[str] = built_nets(package), layout: str = "", **options: Any
    ) -> tuple[Device, Mapping[str, Any]]:
        if layout:
            return _open_nets(package, nets, layout, **options)
        return cast(DeviceBackend, engine).open_device(package, nets, **options)

    return Opener(
        task=Task(model=package.root, backend=name, device="cuda"),
        package=package,
        open_device=open_device,
        watch=CudaDevice,
        folder=folder,
    )


def _open_nets(
    package: Package, nets: Sequence[str], layout: str, settings: Mapping[str, str] | None = None
) -> tuple[Device, Mapping[str, Any]]:
    """ONNX Runtime's on CUDA, in a layout that the store does not choose, with options of an experiment."""
    device, opened = CudaDevice(), dict[str, Any]()
    with ExitStack() as stack, TemporaryDirectory() as folder:
        stack.callback(device.close)
        for name in nets:
            made = layout == "nhwc" and name in LOWERED_NETS  # as a user has them
            lowered = lower(package, name, Path(folder)) if made else None
            opened[name] = open_onnxruntime_net(package, name, device, graph=lowered, settings=settings)
            stack.callback(opened[name].close)
        stack.pop_all()
    return device, opened


def draw(pipe: Pipeline, case: Case) -> Array:
    """Pictures (N, H, W, 3) uint8."""
    return np.asarray(pipe(case.prompt, output_type="np", **case.parameters).images)


def encoder_inputs(case: Case) -> dict[str, Array]:
    """What the encoder of pictures is called with: random blocks of 8x8 pixels, nothing masked."""
    shape = 1, case.height // 8, case.width // 8, 3
    blocks = np.random.default_rng(case.seed).integers(0, 256, shape, np.uint8)
    mask = np.zeros((1, case.height, case.width, 1), np.uint8)
    return {"image": blocks.repeat(8, axis=1).repeat(8, axis=2), "mask": mask}


# ── rows ──────────────────────────────────────────────────────────────────────────────────────────


def row_of(
    what: str,
    figures: Figures | None = None,
    problems: Sequence[str] = (),
    samples: Sequence[float] = (),
    missing: str = "",
) -> Row:
    """FAILED with problems, not available where something is missing, else ok; samples are seconds."""
    return Row(
        side=OURS,
        workload=what,
        rounds=(tuple(samples),) if samples else (),
        status="FAILED" if problems else "not available" if missing else "ok",
        reason="; ".join(problems) or missing,
        figures=figures or {},
    )


def failed(what: str, error: BaseException) -> Row:
    """The row of an exception: our own errors in their words, others with the line that raised them."""
    where = ""
    if not isinstance(error, LatentrtError) and (frames := traceback.extract_tb(error.__traceback__)):
        where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})"
    return row_of(what, problems=[f"{type(error).__name__}: {error}{where}"])


def attempt(what: str, make: Callable[..., Row], *arguments: Any) -> Row:
    """The row `make(what, *arguments)`, or that of what it raises: the rows after it are still wanted."""
    try:
        return make(what, *arguments)
    except Exception as error:  # whatever a library raises is a result
        return failed(what, error)


def collect(rows: Iterable[Row]) -> Iterator[Row]:
    """`rows`; an exception among them becomes a last row."""
    try:
        yield from rows
    except Exception as error:  # whatever a library raises is a result
        yield failed("the step", error)


def mebibytes(size: int) -> float:
    """Bytes as MiB, for people."""
    return round(size / 2**20, 2)
