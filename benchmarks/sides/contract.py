"""The seam between a benchmark and whom it measures: open, prepare a workload, run it, look at the outputs.

A side is a module with `available` and `open_side`. It runs in a process of its own (`process.py`), and its
library is imported by `open_side`, not before.

    workload       outputs, the same from every side
    text_encoder   context (P, T, D) float
    text_encoder_2   the same of SDXL's second one, and the pooled embedding (P, D)
    invariants     none: what a side computes once per prompt and schedule; only ours has it
    unet           prediction (B, C, H/8, W/8) float, before guidance
    update         latent (N, C, H/8, W/8) float after several steps: everything of a step of the loop but the
                   UNet, and on the host but all nets; only ours has it
    vae_decoder    image (N, H, W, 3) uint8
    picture        image (N, H, W, 3) uint8, in the host's memory
    gemm, copy     none; what the machine can do at best (`ceiling`)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from ...engines.backend import choose_backend
from ...engines.backends import BACKENDS
from ...engines.errors import BackendError, UsageError
from ...engines.installed import install_command
from ...engines.package import Package
from ...engines.spec import TEXT_ENCODERS, Array
from ...runtime.model import Note, open_model
from ..case import WORKLOADS, Case

# The module that implements each, or a class in it. "latentrt" is measured twice, to stand against itself.
SIDES: Mapping[str, str] = {
    "latentrt": "ours",
    "diffusers": "diffusers_pipeline",
    "diffusers-compile": "diffusers_pipeline.Compiled",
    "onnxruntime": "plain_loop",
    "onnxruntime-cuda": "plain_loop.OnCuda",
    "openvino": "openvino_loop",
    "openvino-bf16": "openvino_loop.Bf16",
    "openvino-nncf": "openvino_loop.Nncf",
    "sdcpp-f16": "stable_diffusion_cpp.F16",
    "sdcpp-q8_0": "stable_diffusion_cpp.Q8",
    "tensorrt": "tensorrt_loop",
    "ceiling": "ceiling",
    "latentrt watched": "watched",
    "latentrt adapted": "adapted",
    "diffusers adapted": "adapted.OfDiffusers",
    "latentrt controlled": "controlled",
    "diffusers controlled": "controlled.OfDiffusers",
}
OURS = "latentrt"
DIFFUSERS = "diffusers"
WATCHED = "latentrt watched"  # ours, while it watches its own memory
ADAPTED = "latentrt adapted"  # ours, while its adapters are changed
DIFFUSERS_ADAPTED = "diffusers adapted"
CONTROLLED = "latentrt controlled"  # ours, with a ControlNet at hand
DIFFUSERS_CONTROLLED = "diffusers controlled"
# Peers in fewer bits -> the precision whose bars their outputs are held to (`engines.tolerances`).
ROUNDED_PEERS: Mapping[str, str] = {
    "openvino-bf16": "bf16",
    "openvino-nncf": "int8",
    "sdcpp-f16": "fp16",
    "sdcpp-q8_0": "int8",
}
# With workloads or bars of their own; no peers of other verbs.
OF_ONE_VERB = (WATCHED, ADAPTED, DIFFUSERS_ADAPTED, CONTROLLED, DIFFUSERS_CONTROLLED, *ROUNDED_PEERS)
AGAIN = "latentrt again"  # the other half of the A/A pair
CEILING = "ceiling"  # what the machine can do at best
YARDSTICK = "yardstick"  # ours over a network that is always the same, see `yardstick.py`
REFERENCES = (AGAIN, YARDSTICK, CEILING)  # sides of rows that are no peers'

PICTURE = "picture"
UNUSED = "unused"  # a picture without, of a side that has adapters or a ControlNet loaded
STEPS = "steps"  # the stage of a side that does not tell what a step spends in which net
_PATHS = ("model", "checkpoint", "loras", "control")  # of a Task


class NotAvailableError(BackendError):
    """A side does not have this workload, or cannot run here: no failure, but no time either."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a side opens.

    Attributes:
        model: a package's folder, or a checkpoint: a file, or a diffusers folder.
        checkpoint: the diffusers folder with the same weights; None where that is not at hand.
        threads: of a CPU; None is every processor this process may use.
        backend: which of latentrt's own (`engines.backend.BACKENDS`, or "auto").
        device: "cpu" or "cuda", of the peers that can do both.
        compile_mode: torch.compile's; "" is max-autotune on CUDA, which takes minutes, and default on a CPU.
        loras: a folder of adapters' files, for the sides that change adapters.
        control: a ControlNet's folder, for the sides that draw with one.
    """

    model: Path
    checkpoint: Path | None = None
    threads: int | None = None
    backend: str = "auto"
    device: str = "cpu"
    compile_mode: str = ""
    loras: Path | None = None
    control: Path | None = None

    @property
    def text(self) -> str:
        """As JSON, for the child."""
        return json.dumps(vars(self), default=str)

    @classmethod
    def parse(cls, text: str) -> Task:
        """The reverse of `text`."""
        values = json.loads(text)
        paths = {name: Path(values[name]) for name in _PATHS if values[name]}
        return cls(**values | paths)


@dataclass(kw_only=True)
class Work:
    """A workload with its inputs in place, ready to be timed.

    Attributes:
        call: one run; returns the outputs once they are there (of `picture` in the host's memory).
            Where `fetch` gets them, it returns nothing of use.
        fetch: the outputs of the last run, where getting them is not to be timed.
        figures: what is known of the last run: `device_s` by the device's own events, `stages_s` by name, …
        repeats: how often one run does the workload; reported seconds and figures are of one of them.
        held: what it holds until it is closed, such as a device's memory.
    """

    call: Callable[[], Mapping[str, Array]]
    fetch: Callable[[], Mapping[str, Array]] | None = None
    figures: Callable[[], Mapping[str, Any]] = dict[str, Any]
    repeats: int = 1
    held: ExitStack = field(default_factory=ExitStack)
    _left: Mapping[str, Array] = field(default_factory=dict[str, Array])

    def run(self) -> None:
        """Once."""
        self._left = self.call()

    def outputs(self) -> Mapping[str, Array]:
        """The outputs of the last run, by the names above."""
        return self.fetch() if self.fetch else self._left

    def close(self) -> None:
        """Free what it holds, once nobody runs it any more. May be called twice."""
        self.held.close()


Make = Callable[[Case, ExitStack], Work]  # the stack frees what the work holds


@dataclass(kw_only=True)
class OpenSide:
    """A side with its nets loaded.

    Attributes:
        name: of the side, for errors.
        versions: of the libraries that do the work, and what they run on.
        makers: prepare a workload, by name. May raise NotAvailableError, MemoryLimitError, UsageError.
        resources: what is freed with it.
        memory: what it knows of its own memory, in bytes: a ledger, an allocator's peak; may be empty.
    """

    name: str
    versions: Mapping[str, str]
    makers: Mapping[str, Make]
    resources: ExitStack = field(default_factory=ExitStack)
    memory: Callable[[], Mapping[str, Any]] = dict[str, Any]

    def prepare(self, workload: str, case: Case) -> Work:
        """A workload, which is freed when it is closed or the side is.

        Raises:
            NotAvailableError: this side does not have it, or not for this case.
            MemoryLimitError: it does not fit; nothing of it is left.
            UsageError: no engine covers the case's shapes.
        """
        if workload not in self.makers:
            raise not_available(self.name, workload)
        with ExitStack() as stack:
            work = self.makers[workload](case, stack)
            work.held = stack.pop_all()
        self.resources.callback(work.held.close)  # not `work.close`: what nobody runs may go
        return work

    def close(self) -> None:
        """Free what was prepared, then everything else, whatever fails on the way. May be called twice."""
        self.resources.close()


def makers_of(workloads: object) -> dict[str, Make]:
    """The methods that are called like a workload."""
    names = dict.fromkeys((*WORKLOADS, *TEXT_ENCODERS))
    return {name: getattr(workloads, name) for name in names if hasattr(workloads, name)}


class Side(Protocol):
    """What a module of this folder offers, or a class in one.

    `available` returns None if it can run here, else the reason: a library or a checkpoint that is missing.
    `open_side` loads every net, where it is available, and raises NotAvailableError or LatentrtError.
    """

    def available(self, task: Task) -> str | None: ...  # noqa: D102

    def open_side(self, task: Task) -> OpenSide: ...  # noqa: D102


def side(name: str) -> Side:
    """The side of that name; nothing of its library is imported yet. Raises UsageError for another name."""
    if name not in SIDES:
        raise UsageError(
            f"unknown side {name!r}",
            expected=", ".join(SIDES),
            fix=f"Choose of these: --peers {list(SIDES)[1]}.",
        )
    module, _, part = SIDES[name].partition(".")
    found: Any = import_module(f".{module}", __package__)
    return getattr(found, part) if part else found


def open_side(name: str, task: Task) -> OpenSide:
    """The side of that name, open. Raises UsageError, NotAvailableError, or other LatentrtErrors."""
    module = side(name)
    if reason := module.available(task):
        raise NotAvailableError(reason, expected=f"all that {name} needs", fix=f"Leave {name} out.")
    return module.open_side(task)


def not_available(name: str, workload: str) -> NotAvailableError:
    """The error of a side that does not have a workload."""
    return NotAvailableError(
        f"{name} has no workload {workload!r}",
        expected="another workload",
        fix=f"Leave {name} out, or choose other workloads.",
    )


# ── what is needed ─────────────────────────────────────────────────────────────────────────────────


def bench_library(name: str) -> Any:
    """A library of the extra [bench]. Raises BackendError where it cannot be imported."""
    try:
        return import_module(name)
    except ImportError as error:
        raise BackendError(
            f"{name} cannot be imported ({error})",
            expected=f"{name}, which the extra [bench] has",
            fix=f"Install it: {install_command('bench')}",
        ) from error


def missing_modules(*names: str) -> str | None:
    """None if all of these modules are installed, else which are not; none of them is imported."""
    missing = [name for name in names if find_spec(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


def missing_checkpoint(task: Task) -> str | None:
    """None if the diffusers folder that the package was exported from is at hand, else the reason."""
    if task.checkpoint is None:
        return "needs the diffusers checkpoint that the package was exported from; none was given"
    if not (task.checkpoint / "model_index.json").is_file():
        return f"{task.checkpoint.name} holds no diffusers checkpoint: there is no model_index.json"
    return None


def open_package(task: Task, *, note: Note | None = None) -> Package:
    """The model of a task as a package, as `Pipeline.open` does it.

    A checkpoint is opened for the task's backend. Whoever measures opens it first, so that a side finds it in
    the cache.

    Args:
        task: what is opened.
        note: is given each line on what was assumed about a checkpoint, or left out.

    Raises:
        ModelError: nothing there that can be opened.
        BackendError: the backend is unknown, or "auto" finds none.
        StorageError: the disk is full.
    """
    name = task.backend
    backend = (lambda: name) if name in BACKENDS else (lambda: choose_backend(name)[0])
    return open_model(task.model, backend=backend, note=note)


def open_plain_package(task: Task) -> Package:
    """The package with the UNet before hoisting. Raises ModelError, NotAvailableError if it has none."""
    package = open_package(task)
    if "unet_whole" in package.manifest.nets:
        return package
    raise NotAvailableError(
        f"{package.manifest.name} has no UNet before hoisting (unet_whole)",
        expected="a package that `latentrt export` of this release wrote",
        fix="Export the checkpoint again: latentrt export CHECKPOINT -o PACKAGE",
    )


def open_whole_package(task: Task) -> Package:
    """`open_plain_package`, for a library that looks for weights beside the graph and nowhere else.

    Raises:
        ModelError: nothing there that can be opened.
        NotAvailableError: a checkpoint that was opened as it is, or a package without the plain UNet.
    """
    package = open_plain_package(task)
    if not package.elsewhere:
        return package
    raise NotAvailableError(
        f"{package.manifest.name} is a checkpoint, whose weights are not beside the graphs",
        expected="a package",
        fix="Export the checkpoint: latentrt export CHECKPOINT -o PACKAGE",
    )
