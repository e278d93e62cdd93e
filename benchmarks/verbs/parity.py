"""`latentrt bench parity`: is it still right? Nets and whole pictures of ours against a reference.

Both sides get the same seeded random inputs; a row beyond the bar (`engines/tolerances.py`) FAILED.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...engines.errors import UsageError
from ...engines.package import Package
from ...engines.spec import Array
from ...engines.tolerances import DECODED_DB, NET_RELATIVE_L2, PICTURE_DB
from ..case import NETS, PROMPT, Case
from ..likeness import WINDOW, ssim
from ..process import SideError, SideProcess
from ..records import Document, Row, Status
from ..sides.contract import OF_ONE_VERB, OURS, REFERENCES, SIDES, Task, missing_modules
from .latency import Progress, document_of, silent, worst_output

# The last draws noise in every row; "heun" calls the UNet twice in a step.
SAMPLERS = ("dpmpp_2m", "ddim", "unipc", "heun", "euler_a")
# JSON has no infinity. One shade in one of a 4K picture's values is 122 dB.
IDENTICAL_DB = 150.0
# Text encoders see no seed: sample i encodes line i. From one token to about forty.
PROMPTS = (
    PROMPT,
    "star",
    "three green triangles above a row of small white squares, and a purple cross in the corner",
    "a circle, " * 12 + "and a line",
)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What both sides draw: each net, and pictures by each sampler, of each case.

    `samples` are seeds for each row, the case's own and those after it.
    """

    cases: tuple[Case, ...]
    nets: tuple[str, ...] = NETS
    samplers: tuple[str, ...] = SAMPLERS
    samples: int = 3

    def __post_init__(self) -> None:
        """Raise UsageError for pictures that are too small for SSIM."""
        for case in self.cases:
            if min(case.width, case.height) < WINDOW:
                raise UsageError(
                    f"pictures of {case.width}x{case.height} cannot be compared",
                    expected=f"at least {WINDOW} pixels on a side, the window of SSIM",
                    fix="Choose a larger size: --size 64x64.",
                )


def choose_reference(task: Task, name: str = "") -> tuple[str, Task]:
    """That side, else diffusers where it and the checkpoint are at hand, else the package's graphs.

    It runs on the CPU, but for a peer that is on a GPU alone.

    Raises:
        UsageError: another name than those of sides that have nets.
    """
    known = [side for side in SIDES if side not in (*REFERENCES, *OF_ONE_VERB)]
    if name and name not in known:
        raise UsageError(
            f"{name!r} cannot be the reference",
            expected=", ".join(known),
            fix="Choose one of these: --reference onnxruntime.",
        )
    usual = "diffusers" if task.checkpoint and not missing_modules("torch", "diffusers") else "onnxruntime"
    return name or usual, replace(task, backend="onnxruntime", device="cpu")


def measure_parity(
    package: Package, task: Task, inputs: Inputs, *, reference: str = "", progress: Progress = silent
) -> Document:
    """A row for each net and for each sampler; samples are relative L2 (unit "1"), or PSNR (unit "dB").

    What is checked is the backend of `task`, against `choose_reference(task, reference)`.

    Raises:
        UsageError: no such reference.
        SideError: ours cannot be opened.
    """
    name, theirs = choose_reference(task, reference)
    with ExitStack() as stack:
        progress(f"opening {OURS}")
        ours = stack.enter_context(SideProcess(OURS, OURS, task))
        progress(f"opening {name}")
        try:
            other = stack.enter_context(SideProcess(f"{name} (reference)", name, theirs))
        except SideError as error:
            rows = [Row(side=name, workload="open", status=error.status, reason=error.reason)]
        else:
            rows = list(compare_sides(ours, other, inputs, package.manifest.dtype, progress=progress))
    looked_at = {"nets": inputs.nets, "samplers": inputs.samplers, "samples": inputs.samples}
    return document_of("parity", package, task, rows, {"reference": name, **looked_at})


def compare_sides(
    ours: SideProcess, reference: SideProcess, inputs: Inputs, dtype: str, *, progress: Progress = silent
) -> Iterator[Row]:
    """The rows of `measure_parity`, of two sides that are open; `dtype` is that of the package's graphs."""
    for case in inputs.cases:
        drawn = [("picture", replace(case, sampler=sampler)) for sampler in inputs.samplers]
        for workload, first in (*((net, case) for net in inputs.nets), *drawn):
            sampler = f" {first.sampler}" if workload == "picture" else ""
            progress(f"{workload} {first.width}x{first.height}{sampler}")
            prompts = (first.prompt, *PROMPTS[1:])
            several = [
                replace(first, seed=first.seed + number, prompt=prompts[number % len(prompts)])
                for number in range(inputs.samples)
            ]
            yield _compare(ours, reference, workload, several, dtype)


def _compare(
    ours: SideProcess, reference: SideProcess, workload: str, cases: Sequence[Case], dtype: str
) -> Row:
    """One row: a sample for each case; the first that fails to run ends it."""
    status: Status = "ok"
    problems: list[str] = []
    samples: list[dict[str, Any]] = []
    # One net makes a picture of the same latent: that is held to more than a whole generation.
    decibels = DECODED_DB if workload == "vae_decoder" else PICTURE_DB
    unit, bar, judged = "1", NET_RELATIVE_L2[dtype], "relative_l2"
    for case in cases:
        try:
            wanted, found = (_outputs(side, workload, case) for side in (reference, ours))
            name, alike, problem = worst_output(
                found, wanted, net_bar=NET_RELATIVE_L2[dtype], picture_bar=decibels[dtype]
            )
        except SideError as error:
            status, problems = error.status, [error.reason]
            break
        sample = {"output": name, **alike, "psnr_db": min(alike["psnr_db"], IDENTICAL_DB)}
        if wanted[name].dtype == np.uint8:
            unit, bar, judged = "dB", decibels[dtype], "psnr_db"
            likeness = ssim(found.get(name, wanted[name][:0]), wanted[name])
            sample |= {"ssim": likeness, "contrast": float(wanted[name].std())}
        samples.append({"seed": case.seed, **sample})
        if problem:
            status = "FAILED"
            problems.append(f"{name}, seed {case.seed}: {problem}")
    figures: dict[str, Any] = {"reference": reference.name}
    if samples:
        # contrast is the reference's, in shades: a flat picture is like any other
        worst = {"relative_l2": max, "max_error": max, "psnr_db": min, "ssim": min, "contrast": min}
        known = [name for name in worst if name in samples[0]]
        figures |= {name: worst[name](sample[name] for sample in samples) for name in known}
        figures |= {"bar": bar, "samples": samples}
    alone = {name for name in ("sampler", "steps") if workload != "picture"}  # nets know no schedule
    return Row(
        side=ours.name,
        workload=workload,
        case={name: value for name, value in cases[0].to_json().items() if name not in alone},
        unit=unit,
        # what is infinitely far is a problem, and no number
        rounds=tuple((sample[judged],) for sample in samples if math.isfinite(sample[judged])),
        status=status,
        reason="; ".join(problems[:4]),
        figures=figures,
        stamp={**ours.stamp, "reference": reference.stamp.get("side")},
    )


def _outputs(side: SideProcess, workload: str, case: Case) -> Mapping[str, Array]:
    """Raises SideError, which says whose."""
    try:
        _, outputs = side.prepare(workload, case)
    except SideError as error:
        raise SideError(error.status, f"{side.name}: {error.reason}") from error
    if not outputs:
        raise SideError("not available", f"{side.name}: {workload} has no output to compare")
    return outputs
