"""Packages in fewer bits, and peers: bars, rows, the table, and peers' libraries where they are installed.

NNCF rounds the demo's UNet itself, so what is compared with our fp32 is nothing that we wrote. Of
stable-diffusion.cpp, which opens no model this small, only what it is asked is looked at.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from latentrt.benchmarks import words
from latentrt.benchmarks.case import Case
from latentrt.benchmarks.models import rounded as making
from latentrt.benchmarks.process import SideError
from latentrt.benchmarks.records import Document, Row, read_document
from latentrt.benchmarks.report.quantised_table import quantised_table
from latentrt.benchmarks.rounds import Pace
from latentrt.benchmarks.sides import contract, openvino_loop
from latentrt.benchmarks.sides.contract import OURS, ROUNDED_PEERS, NotAvailableError, Task
from latentrt.benchmarks.verbs import latency, quantised
from latentrt.benchmarks.verbs.memory import NO_PROC, PEAK
from latentrt.benchmarks.verbs.quantised import RIGHT, Inputs, Mode, measure_quantised, modes_of
from latentrt.cli import app
from latentrt.demo.checker import Score
from latentrt.engines.errors import MemoryLimitError, UsageError
from latentrt.engines.package import Package
from latentrt.engines.spec import Array
from latentrt.engines.tolerances import QUANTISED_PICTURE_DB, QUANTISED_RELATIVE_L2
from latentrt.export.quantised import write
from latentrt.export.quantised.formats import FORMATS
from latentrt.export.quantised.write import quantise_package
from tests.benchmarks.stand_in_side import CASE, PACKAGE, QUICK, TASK

Outputs = Mapping[str, Array]
NET = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 4, 4, 4)
PICTURE = np.full((1, 8, 8, 3), 100, np.uint8)


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return quantise_package(PACKAGE, tmp_path_factory.mktemp("rounded") / "int4", format="int4").package


# ── who draws ──────────────────────────────────────────────────────────────────────────────────────


def test_everyone_opens_what_it_reads(rounded: Package, tmp_path: Path) -> None:
    peers = ("diffusers", "openvino", "openvino-nncf", "sdcpp-q8_0")
    modes = modes_of(PACKAGE, TASK, [(rounded, "openvino")], peers, file=tmp_path / "file")
    found = {mode.side: (mode.module, mode.task.model, mode.task.backend, mode.precision) for mode in modes}
    file = tmp_path / "file"
    assert found == {
        OURS: (OURS, PACKAGE.root, "auto", "fp32"),
        "latentrt int4, openvino": (OURS, rounded.root, "openvino", "int4"),
        "diffusers": ("diffusers", file, "auto", "fp32"),
        "openvino": ("openvino", PACKAGE.root, "auto", "fp32"),
        "openvino-nncf": ("openvino-nncf", PACKAGE.root, "auto", "int8"),
        "sdcpp-q8_0": ("sdcpp-q8_0", file, "auto", "int8"),
    }
    assert all(mode.task.threads == TASK.threads for mode in modes)
    assert [mode.side for mode in modes if mode.told] == ["openvino-nncf", "sdcpp-q8_0"]
    assert modes_of(PACKAGE, TASK, [], ["diffusers"])[1].task == TASK


def test_a_package_as_it_is_on_an_approximate_backend(rounded: Package) -> None:
    coarse = [(PACKAGE, "openvino-bf16"), (rounded, "openvino-bf16")]
    _, plain, narrow, peer = modes_of(PACKAGE, TASK, coarse, ["openvino-bf16"])
    assert (plain.side, plain.precision, plain.told) == ("latentrt bf16, openvino-bf16", "bf16", False)
    assert (narrow.side, narrow.precision) == ("latentrt int4, openvino-bf16", "int4")
    assert (peer.module, peer.precision, peer.told) == ("openvino-bf16", "bf16", True)


def test_what_is_no_package_in_fewer_bits_is_named(rounded: Package) -> None:
    with pytest.raises(UsageError, match=r"the package 'demo' in .* is not in fewer bits"):
        modes_of(PACKAGE, TASK, [(PACKAGE, "openvino")])
    other = replace(PACKAGE, manifest=replace(PACKAGE.manifest, family="sdxl"))
    with pytest.raises(UsageError, match=f"is of the family {rounded.manifest.family}"):
        modes_of(other, TASK, [(rounded, "openvino")])


# ── bars ───────────────────────────────────────────────────────────────────────────────────────────


def mode(module: str, precision: str) -> Mode:
    return Mode(side="x", module=module, task=TASK, precision=precision)


def off(share: float) -> Outputs:
    """A prediction whose relative L2 to NET is so much."""
    return {"prediction": NET * np.float32(1 + share)}


@pytest.mark.parametrize("name", QUANTISED_RELATIVE_L2)
def test_ours_in_fewer_bits_has_the_formats_bars(name: str) -> None:
    ours, bar = mode(OURS, name), QUANTISED_RELATIVE_L2[name]
    figures = ours.judge(off(0.9 * bar), {"prediction": NET})
    assert figures["relative_l2"] == pytest.approx(0.9 * bar, rel=1e-3)
    with pytest.raises(SideError, match=f"prediction is not ours: relative L2 .*, above {bar:g}"):
        ours.judge(off(1.1 * bar), {"prediction": NET})
    shades = 255 / 10 ** (QUANTISED_PICTURE_DB[name] / 20)  # off by so many, a picture has the bar's dB
    assert ours.judge({"image": PICTURE + np.uint8(shades)}, {"image": PICTURE})["psnr_db"] >= 20
    with pytest.raises(SideError, match=r"image is not ours: .* dB, below"):
        ours.judge({"image": PICTURE + np.uint8(shades + 1)}, {"image": PICTURE})


def test_exact_sides_have_the_bars_of_exact_ones() -> None:
    with pytest.raises(SideError, match=r"above 0\.0001"):
        mode("openvino", "fp32").judge(off(1e-3), {"prediction": NET})


def test_a_peer_in_fewer_bits_says_that_it_is_below_the_bar() -> None:
    peer = replace(mode("openvino-nncf", "int8"), told=True)
    assert "below_bar" not in peer.judge(off(0.02), {"prediction": NET})
    assert peer.judge(off(0.1), {"prediction": NET})["below_bar"] == "relative L2 1.00e-01, above 0.03"
    with pytest.raises(SideError, match="prediction is not ours"):
        peer.judge({"prediction": -NET}, {"prediction": NET})


# ── rows ───────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class MadeUp:
    """A process in place of `SideProcess`: outputs by side, an error of one that cannot be opened or run."""

    outputs: Mapping[str, Outputs]
    errors: Mapping[str, SideError] = field(default_factory=dict[str, SideError])
    opened: list[str] = field(default_factory=list[str])
    name: str = ""
    pid: int = 1
    stamp: Mapping[str, Any] = field(default_factory=lambda: {"side": {"version": "1"}})

    def __call__(self, name: str, module: str, task: Task) -> MadeUp:
        self.opened.append(name)
        if name in self.errors:
            raise self.errors[name]
        return replace(self, name=name)

    def prepare(self, workload: str, case: Case, *, slot: str = "") -> tuple[dict[str, Any], Outputs]:
        if f"{self.name} {workload}" in self.errors:
            raise self.errors[f"{self.name} {workload}"]
        return {"seconds": 0.1, "figures": {}}, self.outputs[self.name]

    def time(
        self, runs: int, *, slot: str = "", beside: str | None = None
    ) -> tuple[tuple[float, ...], list[dict[str, Any]]]:
        return (2.0,) * runs, [{}] * runs

    def __enter__(self) -> MadeUp:
        return self

    def __exit__(self, *error: object) -> None:
        pass


MODES = (
    mode(OURS, "fp32"),
    replace(mode(OURS, "int8"), side="ours int8"),
    replace(mode("openvino-nncf", "int8"), side="openvino-nncf", told=True),
)
MODES = (replace(MODES[0], side=OURS), *MODES[1:])


def room(package: Package, modes: Sequence[Mode]) -> None:
    """There is room for all."""


def measured(
    made: MadeUp,
    monkeypatch: pytest.MonkeyPatch,
    inputs: Inputs | None = None,
    resident: int = 3,
    room: Callable[[Package, Sequence[Mode]], None] = room,
    pace: Pace = QUICK,
) -> Document:
    monkeypatch.setattr(quantised, "SideProcess", made)
    monkeypatch.setattr(quantised, "resident_bytes", lambda pid: (resident // 2, resident))
    monkeypatch.setattr(quantised, "_check_room", room)
    inputs = inputs or Inputs(case=CASE, workloads=("unet",))
    return measure_quantised(PACKAGE, MODES, inputs, pace=pace)


def row_of(document: Document, workload: str, side: str) -> Row:
    (row,) = document.select(workload, side)
    return row


def test_rows_have_likeness_time_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    made = MadeUp({OURS: {"prediction": NET}, "ours int8": off(0.02), "openvino-nncf": off(0.04)})
    document = measured(made, monkeypatch)
    assert made.opened == ["openvino-nncf", OURS, "ours int8"], "who rounds while it opens is first"
    assert not document.failed
    assert row_of(document, "unet", "ours int8").samples == (2.0, 2.0)
    assert row_of(document, "unet", "ours int8").figures["relative_l2"] == pytest.approx(0.02, rel=1e-3)
    assert "below_bar" in row_of(document, "unet", "openvino-nncf").figures
    assert row_of(document, PEAK, "ours int8").samples == (3.0,)
    assert row_of(document, PEAK, "ours int8").figures == {"resident": 1}
    table = quantised_table(document)
    assert "| ours int8 | 2.00 s | 1.00× [1.00, 1.00] | 2.0e-02 | 3.00 B |" in table
    assert "4.0e-02, below the bar" in table


def test_who_fails_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made = MadeUp(
        {OURS: {"prediction": NET}, "ours int8": off(0.2)},
        {"openvino-nncf": SideError("not available", "not installed: nncf")},
    )
    document = measured(made, monkeypatch, resident=0)
    assert row_of(document, "open", "openvino-nncf").reason == "not installed: nncf"
    assert row_of(document, "unet", "ours int8").status == "FAILED"
    assert row_of(document, PEAK, OURS).reason == NO_PROC
    assert "| ours int8 | FAILED |" not in quantised_table(document), "nothing is known of it"
    with pytest.raises(SideError, match="no model"):
        measured(MadeUp({}, {OURS: SideError("FAILED", "no model")}), monkeypatch)
    made = MadeUp(made.outputs | {"openvino-nncf": off(0)}, {f"{OURS} unet": SideError("FAILED", "no")})
    document = measured(made, monkeypatch)
    assert row_of(document, "unet", "ours int8").reason == "ours failed: there is nothing to compare with"


def test_what_does_not_fit_is_not_begun(rounded: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(
        quantised, "check_memory", lambda task, count, besides: asked.append((count, besides))
    )
    monkeypatch.setattr(quantised, "SideProcess", MadeUp({}, {OURS: SideError("FAILED", "stop")}))
    modes = modes_of(PACKAGE, TASK, [(rounded, "openvino")], ["openvino", "openvino-nncf"])
    with pytest.raises(SideError, match="stop"):
        measure_quantised(PACKAGE, modes, Inputs(case=CASE), pace=QUICK)
    whole, narrow = latency.weights_of(PACKAGE), latency.weights_of(rounded)
    assert narrow < whole
    assert asked == [(2, int(1.6 * narrow) + int(0.8 * whole))]
    monkeypatch.undo()
    monkeypatch.setattr(latency.doctor, "memory", lambda: {"available": 1000, "limit": None})
    with pytest.raises(MemoryLimitError, match="1 sides of demo at once take about"):
        measure_quantised(PACKAGE, modes, Inputs(case=CASE), pace=QUICK)


def no_room_for_two(package: Package, modes: Sequence[Mode]) -> None:
    if len(modes) > 1:
        raise MemoryLimitError("too much", expected="less", fix="Measure fewer.")


def test_sides_that_do_not_fit_beside_each_other_are_open_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    made = MadeUp({OURS: {"prediction": NET}, "ours int8": off(0.02), "openvino-nncf": off(0.9)})
    inputs = Inputs(case=CASE, workloads=("unet",))
    document = measured(made, monkeypatch, inputs, room=no_room_for_two, pace=replace(QUICK, least=3))
    first = [OURS, "ours int8", "openvino-nncf"]
    assert made.opened == [*first, "ours int8", OURS, OURS, "ours int8"], "who failed has no other turn"
    assert document.settings["open"] == "one at a time"
    row = row_of(document, "unet", "ours int8")
    assert row.rounds == ((2.0, 2.0),) * 3
    assert row.figures["relative_l2"] == pytest.approx(0.02, rel=1e-3)
    assert row_of(document, PEAK, OURS).rounds == ((3.0,),) * 3
    assert row_of(document, "unet", "openvino-nncf").status == "FAILED"
    table = quantised_table(document)
    assert "sides were open one at a time, in turns" in table
    assert "| ours int8 | 2.00 s | 1.00× [1.00, 1.00] | 2.0e-02 | 3.00 B |" in table


def test_who_does_not_open_again_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    made = MadeUp({OURS: {"prediction": NET}, "ours int8": off(0.02), "openvino-nncf": off(0)})

    class Once(MadeUp):
        def __call__(self, name: str, module: str, task: Task) -> MadeUp:
            if name == "ours int8" and name in self.opened:
                raise SideError("FAILED", "no memory")
            return super().__call__(name, module, task)

    once = Once(**vars(made))
    inputs = Inputs(case=CASE, workloads=("unet",))
    document = measured(once, monkeypatch, inputs, room=no_room_for_two, pace=replace(QUICK, least=2))
    assert row_of(document, "open", "ours int8").reason == "no memory"
    assert row_of(document, "unet", "openvino-nncf").rounds == ((2.0, 2.0),) * 2


@pytest.mark.parametrize(("right", "status"), [(100, "ok"), (99, "ok"), (98, "FAILED")])
def test_two_pictures_of_a_hundred_are_too_many_to_lose(
    right: int, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = iter([100, 0, right, 0])  # as it was, by the next prompt; then in fewer bits
    monkeypatch.setattr(quantised, "score", lambda *_: Score(100, 0, 0, 0, 0, 0, next(strict)))
    monkeypatch.setattr(quantised, "draw", lambda *_: SimpleNamespace(pictures=[PICTURE[0]]))
    made = MadeUp({OURS: {"prediction": NET}, "ours int8": off(0.02), "openvino-nncf": off(0)})
    document = measured(made, monkeypatch, Inputs(case=CASE, workloads=("unet",), prompts=1))
    row = row_of(document, RIGHT, "ours int8")
    assert row.status == status
    assert "shuffled" in row.figures
    assert not list(document.select(RIGHT, "openvino-nncf"))
    assert f"| {right}, shuffled prompts 0 |" in quantised_table(document)


def test_the_verb_measures_the_demo(rounded: Package, tmp_path: Path) -> None:
    words = ["bench", "quantised", "demo", "--backend", "onnxruntime", "--quick", "--steps", "2"]
    words += ["--packages", str(rounded.root), "--workloads", "unet", "--prompts", "2", "--threads", "1"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out.json")])
    assert done.exit_code == 0, done.output
    document = read_document(tmp_path / "out.json")
    row = row_of(document, "unet", "latentrt int4, onnxruntime")
    assert 1e-3 < row.figures["relative_l2"] < QUANTISED_RELATIVE_L2["int4"]
    assert row_of(document, RIGHT, OURS).figures["count"] == 2
    assert row_of(document, RIGHT, "latentrt int4, onnxruntime").figures["shuffled"] == 0
    assert "latentrt int4, onnxruntime" in quantised_table(document)


# ── peers ──────────────────────────────────────────────────────────────────────────────────────────


def test_nncfs_int8_draws_ours_nearly() -> None:
    pytest.importorskip("nncf")
    case = Case(width=128, height=128, guidance_scale=3.0, steps=4)
    with closing(contract.open_side("openvino-nncf", TASK)) as peer:
        assert peer.versions["rounded"] == "unet_whole"
        work = peer.prepare("unet", case)
        work.run()
        found = dict(work.outputs())
    with closing(contract.open_side(OURS, replace(TASK, backend="onnxruntime"))) as ours:
        work = ours.prepare("unet", case)
        work.run()
        figures = replace(mode("openvino-nncf", "int8"), told=True).judge(found, dict(work.outputs()))
    assert 1e-3 < figures["relative_l2"] < 0.2, "rounded, and the same net"


def test_openvinos_own_precision_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr(openvino_loop, "multiplies_bfloat16", lambda: True)
    with closing(contract.open_side("openvino-bf16", TASK)) as peer:
        assert "INFERENCE_PRECISION_HINT" not in peer.versions
    with closing(contract.open_side("openvino", TASK)) as peer:
        assert peer.versions["INFERENCE_PRECISION_HINT"] == "f32"
    monkeypatch.setattr(openvino_loop, "multiplies_bfloat16", lambda: False)
    with pytest.raises(NotAvailableError, match="this processor does not multiply bfloat16"):
        contract.open_side("openvino-bf16", TASK)


class Sampler:
    EULER, DPMPP2M = "euler", "dpmpp2m"


@pytest.fixture
def cpp(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A `cyllama` that draws grey, and what it was asked."""
    asked = SimpleNamespace(context=None, calls=[])

    class Context:
        def __init__(self, parameters: Any) -> None:
            asked.context = parameters

        def generate(self, prompt: str, **values: Any) -> list[Any]:
            asked.calls.append({"prompt": prompt, **values})
            grey = np.full((values["height"], values["width"], 3), 128, np.uint8)
            return [SimpleNamespace(to_numpy=lambda: grey)] * values["batch_count"]

    library, inner = ModuleType("cyllama"), ModuleType("cyllama.sd")
    named = {
        "SDContextParams": lambda model_path: SimpleNamespace(model_path=model_path, eager_load=False),
        "SDContext": Context,
        "SDType": SimpleNamespace(F16="f16", Q8_0="q8_0"),
        "RngType": SimpleNamespace(CPU="cpu"),
        "SampleMethod": Sampler,
        "Scheduler": SimpleNamespace(DISCRETE="discrete"),
    }
    vars(inner).update(named)
    vars(library).update({"__version__": "0.0", "sd": inner})
    monkeypatch.setitem(sys.modules, "cyllama", library)
    monkeypatch.setitem(sys.modules, "cyllama.sd", inner)
    monkeypatch.setattr("latentrt.benchmarks.sides.stable_diffusion_cpp.missing_modules", lambda name: None)
    return asked


@pytest.mark.parametrize("name", ["sdcpp-f16", "sdcpp-q8_0"])
def test_stable_diffusion_cpp_is_asked_for_our_picture(
    name: str, cpp: SimpleNamespace, tmp_path: Path
) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    case = Case(width=64, height=48, guidance_scale=7.5, pictures=2, steps=3, sampler="euler linspace")
    with closing(contract.open_side(name, Task(model=file, threads=1))) as side:
        work = side.prepare("picture", case)
        work.run()
        assert work.outputs()["image"].shape == (2, 48, 64, 3)
        with pytest.raises(NotAvailableError, match="has no sampler 'ddim' with the same steps"):
            side.prepare("picture", replace(case, sampler="ddim"))
    assert vars(cpp.context) == {
        "model_path": str(file),
        "wtype": name.partition("-")[2],
        "rng_type": "cpu",
        "sampler_rng_type": "cpu",
        "n_threads": 1,
        "free_params_immediately": False,
        "eager_load": True,
    }
    (call,) = cpp.calls
    assert call["sample_method"] == "euler"
    assert (call["seed"], call["sample_steps"], call["cfg_scale"]) == (case.seed, 3, 7.5)


def test_stable_diffusion_cpp_opens_files(cpp: SimpleNamespace) -> None:
    reason = "it opens one-file checkpoints, and no file was given"
    with pytest.raises(NotAvailableError, match=reason):
        contract.open_side("sdcpp-f16", TASK)


@pytest.mark.parametrize(("name", "module"), [("openvino-nncf", "nncf"), ("sdcpp-f16", "cyllama")])
def test_a_missing_library_is_named(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]
    with pytest.raises(NotAvailableError, match=f"not installed: {module}"):
        contract.open_side(name, TASK)


def test_other_verbs_have_no_peers_in_fewer_bits() -> None:
    for name in ROUNDED_PEERS:
        done = CliRunner().invoke(app, ["bench", "latency", "demo", "--peers", name])
        assert "unknown name" in str(done.exception)


def test_packages_of_random_weights_are_written_also_below_the_bars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    strict = {"int8": replace(FORMATS["int8"], bar=0.0, picture_bar=99.0)}
    monkeypatch.setattr(write, "FORMATS", strict)
    making.main([str(PACKAGE.root), str(tmp_path / "int8"), "--to", "int8"])
    made = Package.open(tmp_path / "int8")
    assert f"relative L2 {made.manifest.quantised['relative_l2']:.2g}, " in capsys.readouterr().out
    made.verify()
    assert modes_of(PACKAGE, TASK, [(made, "openvino")])[1].told
    with pytest.raises(UsageError, match="is a package already"):
        making.main([str(PACKAGE.root), str(tmp_path / "int8")])


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_packages_for_building_are_rounded_by_ranges_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "without_sensitive", None)
    monkeypatch.setattr(write, "compare", None)
    making.main([str(PACKAGE.root), str(tmp_path / name), "--to", name, "--by-ranges"])
    made = Package.open(tmp_path / name)
    made.verify()
    facts = made.manifest.quantised
    assert (facts["format"], facts["weights"]) == (name, making.RANDOM)
    assert "relative_l2" not in facts, "nothing was compared"
    document = Document(benchmark="build", model=latency.describe_model(made), settings={}, rows=())
    assert words.model(document) == f"demo (SD 1.x, fp32, UNet in {name})"
