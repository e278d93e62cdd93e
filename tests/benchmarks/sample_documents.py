"""Documents of every verb as a run could have written them, from a seed: inputs of tests, never results.

Two scales: a small model whose UNet step takes 5 ms, and a full-size one whose step takes 10 s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latentrt.benchmarks.records import Document, Rounds, Row, Status

MACHINE: Mapping[str, Any] = {
    "cpu": "Made-up(R) Processor(TM) CPU @ 3.00GHz",
    "cores": 2,
    "gpu": None,
    "libraries": {"latentrt": "0.1.0"},
    "commit": "0123abc",
}
DATE = "2026-11-22T03:04:05+00:00"
PEERS = {"diffusers": 1.32, "onnxruntime": 1.04, "openvino": 0.98}  # their times over ours
NETS = ("text_encoder", "unet_context", "unet_time", "unet", "step", "vae_decoder")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Seconds, FLOPs and bytes by workload; rates of the machine; bytes of weights by net."""

    name: str
    size: int
    guidance: float
    seconds: Mapping[str, float]
    work: Mapping[str, tuple[float, float]]
    weights: Mapping[str, float]
    peers: Mapping[str, float]
    steps: int = 20
    gemm: float = 165e9
    copy: float = 17e9

    @property
    def case(self) -> dict[str, Any]:
        about = {"width": self.size, "height": self.size, "guidance_scale": self.guidance}
        return {**about, "pictures": 1, "steps": self.steps, "sampler": "dpmpp_2m", "seed": 7}

    @property
    def model(self) -> dict[str, Any]:
        return {"name": self.name, "family": "sd1", "dtype": "fp32"}

    @property
    def stages(self) -> dict[str, float]:
        times = {"unet": self.steps, "update": self.steps}
        return {name: taken * times.get(name, 1) for name, taken in self.seconds.items()}

    @property
    def picture(self) -> float:
        return sum(self.stages.values()) * 1.01


SMALL = Scale(
    name="demo",
    size=128,
    guidance=5.0,
    seconds={"text_encoder": 9e-4, "invariants": 4e-3, "unet": 5e-3, "update": 6e-5, "vae_decoder": 0.021},
    work={
        "text_encoder": (9e7, 2e6),
        "invariants": (4e7, 3e6),
        "unet": (7.1e8, 8e6),
        "vae_decoder": (2.4e9, 3e6),
    },
    weights={
        "text_encoder": 2.3e6,
        "unet_context": 4e5,
        "unet_time": 2e6,
        "unet": 1.5e7,
        "step": 0,
        "vae_decoder": 4e6,
    },
    peers={**PEERS, "diffusers": 3.4},
)
FULL = Scale(
    name="sd15",
    size=512,
    guidance=7.5,
    seconds={"text_encoder": 0.18, "invariants": 0.09, "unet": 9.9, "update": 4e-4, "vae_decoder": 16.2},
    work={
        "text_encoder": (2.6e10, 5e8),
        "invariants": (5e9, 2e8),
        "unet": (1.61e12, 3.6e9),
        "vae_decoder": (2.52e12, 2e8),
    },
    weights={
        "text_encoder": 4.9e8,
        "unet_context": 1e8,
        "unet_time": 6e7,
        "unet": 3.3e9,
        "step": 0,
        "vae_decoder": 2e8,
    },
    peers=PEERS,
)
SCALES = {"small": SMALL, "full": FULL}


def turns(middle: float, *, seed: int, rounds: int = 8, runs: int = 4, noise: float = 0.015) -> Rounds:
    """Samples with a tail to the right, as timings have."""
    random = np.random.default_rng(seed)
    samples = middle * (1 + noise * np.abs(random.standard_normal((rounds, runs))))
    samples[random.random(samples.shape) < 0.04] *= 1.12
    return tuple(tuple(turn) for turn in samples.tolist())


def document(benchmark: str, scale: Scale, rows: list[Row], **settings: Any) -> Document:
    settings = {"command": f"latentrt bench {benchmark} {scale.name}", **settings}
    return Document(
        benchmark=benchmark,
        model=scale.model,
        settings=settings,
        rows=tuple(rows),
        date=DATE,
        machine=MACHINE,
    )


def latency(scale: Scale) -> Document:
    """All sides at all workloads; one peer cannot run, one has a picture that is not ours."""
    rows: list[Row] = []
    for number, (name, taken) in enumerate({**scale.seconds, "picture": scale.picture}.items()):
        rows += _sides(scale, name, taken, 100 * number)
        flops = scale.gemm * taken
        best = {"during": name, "flops": flops}
        rounds = turns(taken, seed=100 * number + 50, noise=0.02)
        rows.append(Row(side="ceiling", workload="gemm", case=scale.case, rounds=rounds, figures=best))
    moved = {"during": "unet", "bytes": scale.copy}
    rows.append(
        Row(side="ceiling", workload="copy", case=scale.case, rounds=turns(1.0, seed=9), figures=moved)
    )
    reason = "torch.compile needs a C++ compiler, and there is none"
    rows.append(Row(side="diffusers-compile", workload="open", status="not available", reason=reason))
    return document("latency", scale, rows, peers=list(scale.peers))


def _sides(scale: Scale, name: str, taken: float, seed: int) -> list[Row]:
    figures: dict[str, Any] = {}
    if name in scale.work:
        flops, moved = scale.work[name]
        floor = max(flops / scale.gemm, moved / scale.copy)
        rate = flops / taken
        figures = {"flops": flops, "bytes": moved, "flop_per_s": rate, "of_best_gemm": rate / scale.gemm}
        figures |= {"floor_s": floor, "of_floor": floor / taken}
    if name == "picture":
        share = {"non_engine_share": 0.004, "non_engine_s_per_step": scale.seconds.get("update", 0.0)}
        figures = {"stages_p50_s": scale.stages, **share}
    ours, again = (turns(taken, seed=seed + number) for number in (0, 1))
    rows = [
        Row(side="latentrt", workload=name, case=scale.case, rounds=ours, figures=figures),
        Row(side="latentrt again", workload=name, case=scale.case, rounds=again, figures=figures),
    ]
    if name in ("invariants", "update"):
        return rows
    for number, (peer, ratio) in enumerate(scale.peers.items(), start=2):
        if (peer, name) == ("openvino", "picture"):
            reason = "image is not ours: relative L2 3.10e-01, 21.4 dB"
            rows.append(Row(side=peer, workload=name, case=scale.case, status="FAILED", reason=reason))
            continue
        alike = {"relative_l2": 2e-6, "psnr_db": 61.0}
        rounds = turns(taken * ratio, seed=seed + number)
        rows.append(Row(side=peer, workload=name, case=scale.case, rounds=rounds, figures=alike))
    return rows


def memory(scale: Scale) -> Document:
    """The ledger, peaks of two sides, a timeline, and steps that leave nothing."""
    nets = {
        name: {
            "weights": size,
            "activations": None if name == "step" else 0.21 * size,
            "io": 6e4 + 0.01 * size,
        }
        for name, size in scale.weights.items()
    }
    peak = sum(scale.weights.values()) * 1.23 + 1.6e8
    growth = {"steps": 100, "from_step": 3, "growth_per_step": 0.0, "traced_growth": 0, "transient_p50": 4096}
    rows = [
        of_memory(scale, "opened", ((0.7 * peak,),)),
        of_memory(scale, "peak", ((peak,),)),
        of_memory(scale, "ledger", ((0.9 * peak,),), nets=nets, scratch=0.02 * peak),
        of_memory(scale, "peak", ((1.7 * peak,),), side="diffusers"),
        of_memory(scale, "ledger", side="diffusers", status="not available", reason="it does not tell"),
        _timeline(scale, peak),
        of_memory(scale, "growth per step", ((5e6, 5e6),), **growth),
    ]
    return document("memory", scale, rows)


def of_memory(
    scale: Scale,
    workload: str,
    rounds: Rounds = (),
    *,
    side: str = "latentrt",
    status: Status = "ok",
    reason: str = "",
    **figures: Any,
) -> Row:
    return Row(
        side=side,
        workload=workload,
        case=scale.case,
        unit="B",
        rounds=rounds,
        status=status,
        reason=reason,
        figures=figures,
    )


def _timeline(scale: Scale, peak: float) -> Row:
    """Steps alternate between two stages, of which each begins many times."""
    each = scale.seconds["unet"] + scale.seconds["update"]
    marks = [
        {"stage": name, "at_s": step * each} for step in range(scale.steps) for name in ("unet", "update")
    ]
    end = scale.steps * each
    marks.append({"stage": "vae_decoder", "at_s": end})
    sizes = (*(0.8 * peak for _ in range(200)), peak)
    return of_memory(scale, "timeline", (sizes,), interval_s=end / 200, seconds=1.05 * end, marks=marks)


def scaling(scale: Scale) -> Document:
    """The lines through three axes, four points each."""
    unet, decoder = scale.seconds["unet"], scale.seconds["vae_decoder"]
    axes: Mapping[str, tuple[str, tuple[int, ...], float, float]] = {
        "steps": ("picture", (5, 10, 20, 40), unet, decoder),
        "batch": ("unet", (1, 2, 4, 8), unet, 0.0),
        "pixels": ("unet", (4096, 16384, 36864, 65536), unet / 16384, -0.02 * unet),
    }
    rows: list[Row] = []
    for name, (workload, values, slope, intercept) in axes.items():
        points = [[x, slope * x + intercept] for x in values]
        line = {"slope": slope * 1.02, "intercept": intercept, "residual": 0.021}
        fit = {"of": name, "workload": workload, "points": points, **line}
        rows.append(Row(side="latentrt", workload="fit", case=scale.case, figures=fit))
    return document("scaling", scale, rows)


def throughput(scale: Scale) -> Document:
    """A batch sweep, and the scenarios."""
    rate = 1 / scale.picture
    rows = [
        Row(
            side="latentrt",
            workload="batch sweep",
            case={**scale.case, "pictures": pictures},
            rounds=turns(pictures / rate / gain, seed=pictures),
            figures={"batch": pictures, "samples_per_s": rate * gain},
        )
        for pictures, gain in ((1, 1.0), (2, 1.08), (4, 1.11))
    ]
    tails = {"p50": scale.picture, "p90": 1.03 * scale.picture, "p99": 1.1 * scale.picture}
    runs: Mapping[str, Mapping[str, Any]] = {
        "SingleStream": {"scenario": "SingleStream", "batch": 1, "samples_per_s": rate, **tails},
        "Offline": {"scenario": "Offline", "batch": 4, "samples_per_s": 1.11 * rate},
        "Server": {"scenario": "Server", "rate": 0.7 * rate},  # of earlier releases, not shown any more
    }
    rows += [
        Row(side="latentrt", workload=name, case=scale.case, rounds=((scale.picture,),), figures=figures)
        for name, figures in runs.items()
    ]
    return document("throughput", scale, rows)


def cold_start(scale: Scale) -> Document:
    phases = {"import": 0.31, "open": 0.42, "first picture": 0.8 + scale.picture}
    rows = [
        Row(side="latentrt", workload=name, case=scale.case, rounds=turns(taken, seed=seed, runs=1, rounds=7))
        for seed, (name, taken) in enumerate(phases.items())
    ]
    return document("cold-start", scale, rows)


def build(scale: Scale) -> Document:
    rows = [
        Row(
            side="latentrt",
            workload=name,
            rounds=((0.5 + size / 1e8,),),
            figures={"engine_mb": round(size / 2e6, 2), "peak_rss_gb": 0.2 + size / 1e9},
        )
        for name, size in scale.weights.items()
    ]
    return document("build", scale, rows)


def parity(scale: Scale) -> Document:
    alike = {"reference": "diffusers", "relative_l2": 1.4e-6, "max_error": 3.1e-5, "psnr_db": 96.4}
    rows = [
        *(Row(side="latentrt", workload=name, unit="1", figures=alike) for name in ("text_encoder", "unet")),
        Row(side="latentrt", workload="vae_decoder", unit="dB", figures={**alike, "psnr_db": 81.25}),
        Row(
            side="latentrt",
            workload="picture",
            unit="dB",
            figures={**alike, "psnr_db": 58.2, "ssim": 0.99987},
        ),
    ]
    return document("parity", scale, rows)


def detection(scale: Scale) -> Document:
    """One trial in twenty was wrong about the pair."""
    rows = [
        Row(
            side="latentrt",
            workload=name,
            case={"trial": trial, "slow_down": slow_down},
            unit="1",
            rounds=((1 + slow_down,),),
            status="FAILED" if (name, trial) == ("A/A pair", 7) else "ok",
        )
        for trial in range(20)
        for name, slow_down in (("A/A pair", 0.0), ("planted slowdown", 0.1))
    ]
    return document("detection", scale, rows)


VERBS: Mapping[str, Callable[[Scale], Document]] = {
    "latency": latency,
    "memory": memory,
    "scaling": scaling,
    "throughput": throughput,
    "cold-start": cold_start,
    "build": build,
    "parity": parity,
    "detection": detection,
}


def write_samples(folder: Path) -> None:
    """Every verb at both scales: `latency-small.json`, …."""
    for name, scale in SCALES.items():
        for verb, make in VERBS.items():
            make(scale).write(folder / f"{verb}-{name}.json")
