"""`latentrt bench parity`: is it still right? Nets and whole pictures of ours against a reference.

Both sides get the same seeded random inputs. A net's output is judged by its relative L2 error, a picture by
its PSNR; a row beyond the bar FAILED. Any side can be the reference, and ours may run on any backend.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np

from ...engines.errors import UsageError
from ...engines.package import Package
from ...engines.spec import Array
from ...engines.tolerances import NET_RELATIVE_L2, PICTURE_DB
from ..case import NETS, PROMPT, Case
from ..likeness import WINDOW, difference, psnr, ssim
from ..process import SideError, SideProcess
from ..records import Document, Row, Status
from ..sides.contract import OURS, REFERENCES, SIDES, Task
from .latency import describe_model, settings_of

Said = Callable[[str], None]

# The last draws noise in every row; "heun" calls the UNet twice in a step.
SAMPLERS = ("dpmpp_2m", "ddim", "unipc", "heun", "euler_a")
SAMPLES, QUICK_SAMPLES = 3, 1
# JSON has no infinity. One shade in one of a 4K picture's values is 122 dB.
IDENTICAL_DB = 150.0
# Text encoders see no seed: sample i encodes line i. From one token to about forty.
PROMPTS = (
    PROMPT,
    "star",
    "three green triangles above a row of small white squares, and a purple cross in the corner",
    "a circle, " * 12 + "and a line",
)


class Asked(Protocol):
    """A side that is open: a SideProcess."""

    @property
    def name(self) -> str:
        """Of the row."""
        ...

    @property
    def stamp(self) -> Mapping[str, Any]:
        """What it runs on."""
        ...

    def prepare(self, workload: str, case: Case) -> tuple[Mapping[str, Any], Mapping[str, Array]]:
        """Run a workload once; what it told, and the outputs. Raises SideError."""
        ...


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What both sides are given.

    Attributes:
        cases: sizes, batches and guidance; each net and each sampler is looked at for all of them.
        nets: of `case.NETS`.
        samplers: of whole pictures.
        samples: seeds for each row, the case's own and those after it.
    """

    cases: tuple[Case, ...]
    nets: tuple[str, ...] = NETS
    samplers: tuple[str, ...] = SAMPLERS
    samples: int = SAMPLES

    def __post_init__(self) -> None:
        """Raise UsageError for pictures that are too small for SSIM."""
        for case in self.cases:
            if min(case.width, case.height) < WINDOW:
                raise UsageError(
                    f"pictures of {case.width}x{case.height} cannot be compared",
                    expected=f"at least {WINDOW} pixels on a side, the window of SSIM",
                    fix="Choose a larger size: --size 64x64.",
                )

    def rows(self) -> Iterator[tuple[str, Case]]:
        """(workload, case) of each."""
        for case in self.cases:
            yield from ((net, case) for net in self.nets)
            yield from (("picture", replace(case, sampler=sampler)) for sampler in self.samplers)

    def each(self, case: Case) -> Iterator[Case]:
        """The samples of a row: other seeds, other prompts."""
        for number in range(self.samples):
            prompt = case.prompt if number == 0 else PROMPTS[number % len(PROMPTS)]
            yield replace(case, seed=case.seed + number, prompt=prompt)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Whom ours is compared with: a name of `SIDES`, and what it opens."""

    name: str
    task: Task

    @classmethod
    def of(cls, task: Task, name: str = "") -> Reference:
        """That side, else diffusers where it and the checkpoint are at hand, else the package's graphs.

        It runs on the CPU, but for a peer that is on a GPU alone.

        Raises:
            UsageError: another name than those of sides that have nets.
        """
        known = [side for side in SIDES if side not in REFERENCES]
        if name and name not in known:
            raise UsageError(
                f"{name!r} cannot be the reference",
                expected=", ".join(known),
                fix="Choose one of these: --reference onnxruntime.",
            )
        torch = all(find_spec(library) is not None for library in ("torch", "diffusers"))
        usual = "diffusers" if task.checkpoint is not None and torch else "onnxruntime"
        return cls(name=name or usual, task=replace(task, backend="onnxruntime", device="cpu", slow_down=0.0))


def measure_parity(
    package: Package,
    task: Task,
    inputs: Inputs,
    *,
    reference: Reference | None = None,
    said: Said = lambda line: None,
) -> Document:
    """A row for each net and for each sampler; samples are relative L2 (unit "1"), or PSNR (unit "dB").

    Args:
        package: the model.
        task: what ours opens; its backend is what is checked.
        inputs: what both are given.
        reference: default: `Reference.of(task)`.
        said: is told how far it is.

    Raises:
        SideError: ours cannot be opened.
    """
    chosen = reference or Reference.of(task)
    with ExitStack() as stack:
        said(f"opening {OURS}")
        ours = stack.enter_context(SideProcess(OURS, OURS, task))
        said(f"opening {chosen.name}")
        try:
            other = stack.enter_context(SideProcess(f"{chosen.name} (reference)", chosen.name, chosen.task))
        except SideError as error:
            rows = [Row(side=chosen.name, workload="open", status=error.status, reason=error.reason)]
        else:
            rows = list(compare_sides(ours, other, inputs, package.manifest.dtype, said=said))
    told = {"nets": inputs.nets, "samplers": inputs.samplers, "samples": inputs.samples}
    return Document(
        benchmark="parity",
        model=describe_model(package),
        settings={"reference": chosen.name, **told, **settings_of(task)},
        rows=tuple(rows),
    )


def compare_sides(
    ours: Asked, reference: Asked, inputs: Inputs, dtype: str, *, said: Said = lambda line: None
) -> Iterator[Row]:
    """The rows of `measure_parity`, of two sides that are open; `dtype` is that of the package's graphs."""
    for workload, case in inputs.rows():
        told = f"{workload} {case.width}x{case.height}"
        said(f"{told} {case.sampler}" if workload == "picture" else told)
        yield _compare(ours, reference, workload, tuple(inputs.each(case)), dtype)


@dataclass(kw_only=True)
class _Found:
    """What was found so far about a row."""

    unit: str = "1"
    values: list[float] = field(default_factory=list[float])
    samples: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    problems: list[str] = field(default_factory=list[str])
    status: Status = "ok"


def _compare(ours: Asked, reference: Asked, workload: str, cases: Sequence[Case], dtype: str) -> Row:
    found = _Found()
    for case in cases:
        try:
            wanted = _outputs(reference, workload, case)
            outputs = _outputs(ours, workload, case)
        except SideError as error:
            found.status, found.problems = error.status, [error.reason]
            break
        sample = _worst(outputs, wanted)
        found.samples.append({"seed": case.seed, **sample})
        found.unit = "dB" if "ssim" in sample else "1"
        _judge(found, sample, _bar(found, dtype))
    alone = {name for name in ("sampler", "steps") if workload != "picture"}  # nets know no schedule
    return Row(
        side=ours.name,
        workload=workload,
        case={name: value for name, value in cases[0].to_json().items() if name not in alone},
        unit=found.unit,
        rounds=tuple((value,) for value in found.values),
        status=found.status,
        reason="; ".join(found.problems[:4]),
        figures={"reference": reference.name, **_figures(found, _bar(found, dtype))},
        stamp={**ours.stamp, "reference": reference.stamp.get("side")},
    )


def _outputs(side: Asked, workload: str, case: Case) -> Mapping[str, Array]:
    """Raises SideError, which says whose."""
    try:
        _, outputs = side.prepare(workload, case)
    except SideError as error:
        raise SideError(error.status, f"{side.name}: {error.reason}") from error
    if not outputs:
        raise SideError("not available", f"{side.name}: {workload} has no output to compare")
    return outputs


def _worst(found: Mapping[str, Array], wanted: Mapping[str, Array]) -> dict[str, Any]:
    """The figures of that output of the reference which is the furthest from ours."""
    worst: dict[str, Any] = {}
    for name, array in wanted.items():
        other = found.get(name, np.empty(0, array.dtype))
        figures: dict[str, Any] = {"output": name, **difference(name, other, array)}
        if array.dtype == np.uint8:  # (N, H, W, 3): the worst of N counts
            shades = {"psnr_db": psnr(other, array), "ssim": ssim(other, array)}
            figures |= {**shades, "contrast": float(array.std())}
        figures["psnr_db"] = min(figures["psnr_db"], IDENTICAL_DB)
        if not worst or figures["relative_l2"] > worst["relative_l2"]:
            worst = figures
    return worst


def _bar(found: _Found, dtype: str) -> float:
    """At least so many dB, or at most so large a relative L2."""
    return (PICTURE_DB if found.unit == "dB" else NET_RELATIVE_L2)[dtype]


def _judge(found: _Found, sample: Mapping[str, Any], bar: float) -> None:
    """One more sample; what is infinitely far is a problem, and no number."""
    if found.unit == "dB":
        value, good = sample["psnr_db"], sample["psnr_db"] >= bar
        told = f"{value:.1f} dB, below {bar:g}"
    else:
        value, good = sample["relative_l2"], sample["relative_l2"] <= bar
        told = f"relative L2 {value:.2e}, above {bar:g}"
    if math.isfinite(value):
        found.values.append(value)
    if not good:
        found.status = "FAILED"
        found.problems.append(f"{sample['output']}, seed {found.samples[-1]['seed']}: {told}")


def _figures(found: _Found, bar: float) -> dict[str, Any]:
    """The worst of all samples, and each of them."""
    if not found.samples:
        return {}
    figures: dict[str, Any] = {
        "bar": bar,
        "relative_l2": max(sample["relative_l2"] for sample in found.samples),
        "max_error": max(sample["max_error"] for sample in found.samples),
        "psnr_db": min(sample["psnr_db"] for sample in found.samples),
    }
    if found.unit == "dB":
        figures["ssim"] = min(sample["ssim"] for sample in found.samples)
        # of the reference, in shades: a flat picture is like any other
        figures["contrast"] = min(sample["contrast"] for sample in found.samples)
        figures["identical"] = sum(sample["max_error"] == 0 for sample in found.samples)
    return {**figures, "samples": found.samples}
