"""Parity on sides whose outputs are known, with defects planted; and one real pair of processes."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.benchmarks.case import NETS, Case
from latentrt.benchmarks.process import SideError
from latentrt.benchmarks.records import Row, read_document
from latentrt.benchmarks.sides.contract import Task, not_available
from latentrt.benchmarks.verbs import parity
from latentrt.benchmarks.verbs.parity import Inputs, choose_reference, compare_sides, measure_parity
from latentrt.engines.errors import UsageError
from latentrt.engines.spec import Array
from latentrt.runtime.prompts.tokenizer import ClipTokenizer
from latentrt.runtime.request.request import make_request
from tests.benchmarks.stand_in_side import PACKAGE, TASK

CASE = Case(width=24, height=16, guidance_scale=3.0, pictures=2, steps=4)

Defect = Callable[[str, Case, dict[str, Array]], None]


@dataclass
class Known:
    """A side whose outputs are random numbers of the seed, but for a defect."""

    name: str
    defect: Defect | None = None
    asked: list[tuple[str, Case]] = field(default_factory=list)
    stamp: Mapping[str, Any] = field(default_factory=lambda: {"cpu": "abacus", "side": {"backend": "beads"}})

    def prepare(self, workload: str, case: Case) -> tuple[dict[str, Any], dict[str, Array]]:
        self.asked.append((workload, case))
        random = np.random.default_rng([case.seed, len(case.prompt)])
        if workload in ("vae_decoder", "picture"):
            shape = case.pictures, case.height, case.width, 3
            outputs = {"image": random.integers(0, 256, shape).astype(np.uint8)}
        else:
            name = {"text_encoder": "context", "unet": "prediction"}[workload]
            outputs = {name: random.standard_normal((4, 10)).astype(np.float32)}
        if self.defect:
            self.defect(workload, case, outputs)
        return {"seconds": 0.1}, outputs


def compare(ours: Defect | None, inputs: Inputs, dtype: str = "fp32") -> list[Row]:
    return list(compare_sides(Known("latentrt", ours), Known("peer (reference)"), inputs, dtype))


def test_equal_sides() -> None:
    inputs = Inputs(cases=(CASE, replace(CASE, guidance_scale=1.0)), samplers=("ddim", "euler_a"), samples=2)
    rows = compare(None, inputs)
    assert {row.status for row in rows} == {"ok"}
    assert [row.workload for row in rows] == [*NETS, "picture", "picture"] * 2
    assert [row.case.get("sampler") for row in rows[:5]] == [None, None, None, "ddim", "euler_a"]
    assert [row.unit for row in rows[:5]] == ["1", "1", "dB", "dB", "dB"]
    assert rows[1].rounds == ((0.0,), (0.0,))
    assert rows[3].rounds == ((parity.IDENTICAL_DB,), (parity.IDENTICAL_DB,)), "JSON has no infinity"
    assert rows[3].figures["ssim"] == 1
    assert 70 < rows[3].figures["contrast"] < 78  # of uniform shades 255 / sqrt(12)
    assert rows[0].stamp == {"cpu": "abacus", "side": {"backend": "beads"}, "reference": {"backend": "beads"}}


def test_both_sides_are_asked_the_same_with_other_seeds_and_prompts() -> None:
    ours, other = Known("latentrt"), Known("peer")
    list(compare_sides(ours, other, Inputs(cases=(CASE,), samplers=("heun",)), "fp32"))
    assert ours.asked == other.asked
    unets = [case for workload, case in ours.asked if workload == "unet"]
    assert [(case.seed, case.prompt) for case in unets] == [*zip((7, 8, 9), parity.PROMPTS, strict=False)]
    assert [case.sampler for workload, case in ours.asked if workload == "picture"] == ["heun"] * 3
    tokens = ClipTokenizer.open(PACKAGE.root / "tokenizer").encode(list(parity.PROMPTS), length=77)
    assert not any(tokens.dropped)
    for sampler in parity.SAMPLERS:
        make_request(PACKAGE.manifest, parity.PROMPTS[3], sampler=sampler)  # raises for another name


@pytest.mark.parametrize(("dtype", "good"), [("fp32", False), ("fp16", True)])
def test_a_net_beyond_the_bar_of_its_arithmetic_fails(dtype: str, good: bool) -> None:
    def scaled(workload: str, case: Case, outputs: dict[str, Array]) -> None:
        if workload == "unet" and case.seed == 8:
            outputs["prediction"] = (outputs["prediction"] * 1.002).astype(np.float32)

    rows = {row.workload: row for row in compare(scaled, Inputs(cases=(CASE,), samplers=()), dtype)}
    row = rows["unet"]
    assert row.status == ("ok" if good else "FAILED")
    assert row.reason == ("" if good else "prediction, seed 8: relative L2 2.00e-03, above 0.0001")
    assert row.samples == (0.0, pytest.approx(0.002, rel=1e-3), 0.0)
    assert row.figures["relative_l2"] == pytest.approx(0.002, rel=1e-3)
    assert row.figures["bar"] == (5e-3 if good else 1e-4)
    assert rows["text_encoder"].status == "ok"


@pytest.mark.parametrize(
    ("nets", "dtype", "shades", "bar"),
    [((), "fp32", 1, 48), ((), "fp32", 2, 48), ((), "fp16", 2, 40), (("vae_decoder",), "fp32", 1, 60)],
)
def test_the_worst_picture_counts(nets: tuple[str, ...], dtype: str, shades: int, bar: float) -> None:
    """The decoder alone is held to more: one net makes a picture of the same latent."""

    def flipped(workload: str, case: Case, outputs: dict[str, Array]) -> None:
        outputs["image"][1] ^= shades  # one bit: every value is off by exactly so many

    samplers = () if nets else ("ddim",)
    (row,) = compare(flipped, Inputs(cases=(CASE,), nets=nets, samplers=samplers, samples=1), dtype)
    # 1 and 2 shades are 48.1 and 42.1 dB; over both pictures together it would be 3 dB more
    psnr = 20 * math.log10(255 / shades)
    assert row.samples[0] == pytest.approx(psnr)
    assert row.figures["bar"] == bar
    assert row.status == ("ok" if psnr >= bar else "FAILED")
    assert row.reason.endswith("" if psnr >= bar else f"dB, below {bar}")
    assert 0.9 < row.figures["ssim"] < 1


@pytest.mark.parametrize("workload", ["unet", "picture"])
def test_another_shape_or_no_such_output_is_a_failure_and_no_number(workload: str) -> None:
    def lost(name: str, case: Case, outputs: dict[str, Array]) -> None:
        outputs["else"] = outputs.popitem()[1]

    def cut(name: str, case: Case, outputs: dict[str, Array]) -> None:
        name, array = outputs.popitem()
        outputs[name] = array[:1]

    nets, samplers = (("unet",), ()) if workload == "unet" else ((), ("ddim",))
    for defect in (lost, cut):
        (row,) = compare(defect, Inputs(cases=(CASE,), nets=nets, samplers=samplers))
        assert (row.status, row.rounds) == ("FAILED", ())
        assert "inf" in row.reason


def test_a_side_that_fails_or_cannot_is_named() -> None:
    def breaks(workload: str, case: Case, outputs: dict[str, Array]) -> None:
        if workload == "unet" and case.seed == 8:
            raise SideError("FAILED", "unet: the output is not finite")
        if workload == "vae_decoder":
            raise SideError("not available", not_available("latentrt", workload).found)
        if workload == "text_encoder":
            outputs.clear()

    text, unet, decoder = compare(breaks, Inputs(cases=(CASE,), samplers=()))
    assert (text.status, text.reason) == ("not available", "latentrt: text_encoder has no output to compare")
    assert (unet.status, unet.reason) == ("FAILED", "latentrt: unet: the output is not finite")
    assert decoder.status == "not available"


def test_pictures_below_the_window_of_ssim_are_refused() -> None:
    with pytest.raises(UsageError, match="at least 11 pixels"):
        Inputs(cases=(replace(CASE, width=8),))


def test_the_reference(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    task = Task(model=tmp_path, checkpoint=tmp_path, backend="tensorrt", device="cuda", threads=2)
    theirs = Task(model=tmp_path, checkpoint=tmp_path, backend="onnxruntime", threads=2)
    assert choose_reference(task) == ("diffusers", theirs)
    assert choose_reference(replace(task, checkpoint=None))[0] == "onnxruntime"
    assert choose_reference(task, "openvino") == ("openvino", theirs)
    monkeypatch.setattr(parity, "missing_modules", lambda *names: "not installed: torch")
    assert choose_reference(task)[0] == "onnxruntime"
    assert choose_reference(task, "diffusers")[0] == "diffusers", "what was asked for is not replaced"
    with pytest.raises(UsageError, match=r"'ceiling' cannot be the reference; expected latentrt, diffusers"):
        choose_reference(task, "ceiling")


def test_ours_against_the_packages_own_graphs(tmp_path: Path) -> None:
    case = Case.of(PACKAGE.manifest, width=64, height=48, steps=2)
    document = measure_parity(PACKAGE, TASK, Inputs(cases=(case,), samplers=("ddim",), samples=2))
    document.write(tmp_path / "parity.json")
    rows = read_document(tmp_path / "parity.json").rows
    assert [row.workload for row in rows] == [*NETS, "picture"]
    assert not document.failed, [row.reason for row in rows]
    assert all(len(row.samples) == 2 for row in rows)
    assert document.settings["reference"] == "onnxruntime"
    assert rows[1].figures["relative_l2"] < 1e-4


def test_a_reference_that_cannot_be_opened_is_a_row(tmp_path: Path) -> None:
    task = replace(TASK, checkpoint=tmp_path)
    (row,) = measure_parity(PACKAGE, task, Inputs(cases=(CASE,)), reference="diffusers").rows
    assert (row.side, row.workload, row.status) == ("diffusers", "open", "not available")
    assert "no model_index.json" in row.reason
