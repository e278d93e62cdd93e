"""What a ControlNet costs a step: the net that is made, both sides on the demo model, and made-up sides."""

import inspect
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt import cli
from latentrt.benchmarks.likeness import psnr
from latentrt.benchmarks.models.controlnets import NAMES, write_controlnet
from latentrt.benchmarks.process import SideError
from latentrt.benchmarks.records import Document, Row, read_document
from latentrt.benchmarks.report.reading import Result
from latentrt.benchmarks.report.tables import full_tables, short_table
from latentrt.benchmarks.sides import controlled
from latentrt.benchmarks.sides.contract import PICTURE, STEPS, UNUSED, NotAvailableError
from latentrt.benchmarks.sides.controlled import CONTROL, GRAPHS, PAIRS, OfDiffusers, edges
from latentrt.benchmarks.sides.single_file import PIPELINES, without_checker
from latentrt.benchmarks.verbs import additions
from latentrt.benchmarks.verbs.controls import (
    IDLE,
    IN_USE,
    OUR_CALL,
    OUR_STEP,
    WITH_ONE,
    Comparison,
    measure_controls,
)
from latentrt.benchmarks.verbs.memory import NO_PROC, PEAK
from latentrt.engines import spec
from latentrt.engines.errors import MemoryLimitError, UsageError
from latentrt.engines.safetensors_format import read_header
from latentrt.export.architectures import ARCHITECTURES
from tests.benchmarks.stand_in_side import CASE, PACKAGE, QUICK, TASK, WITH_CHECKPOINT, MadeUp
from tests.engines.host_device import HostDevice
from tests.runtime.device_bench import device_pipeline

# diffusers' schedulers call np.array(tensor), and it announces what will move
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*__array.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("controlnet")
    write_controlnet(PACKAGE, folder)
    return folder


# ── the ControlNet ─────────────────────────────────────────────────────────────────────────────────


def test_diffusers_reads_every_tensor(made: Path, tmp_path: Path) -> None:
    import torch
    from diffusers.models.controlnets.controlnet import ControlNetModel

    net: Any
    net, told = ControlNetModel.from_pretrained(str(made), output_loading_info=True)
    assert not any(told[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    weights: dict[str, torch.Tensor] = net.state_dict()
    assert all(weight.any() for weight in weights.values()), "zero convolutions would steer nothing"
    assert write_controlnet(PACKAGE, tmp_path) == 4 * sum(map(torch.numel, weights.values()))
    assert {
        tensor.dtype for tensor in read_header(made / "diffusion_pytorch_model.safetensors").tensors.values()
    } == {"F16"}


@pytest.mark.parametrize("name", NAMES)
def test_the_one_that_fits_is_chosen(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what a UNet takes: names and channels of residuals, and how wide its context is."""
    config = ARCHITECTURES[name].parts["controlnet"]
    outputs = spec.residuals(config["block_out_channels"], config["layers_per_block"])
    taken = [
        spec.TensorSpec(name=f"residual_{number}", dtype="float32", shape=("B", channels, "H/8", "W/8"))
        for number, (channels, _) in enumerate(outputs)
    ]
    net = PACKAGE.manifest.nets["unet_controlled"]
    net = replace(net, spec=replace(net.spec, inputs=tuple(taken)))
    nets = {**PACKAGE.manifest.nets, "unet_controlled": net}
    width = config["cross_attention_dim"]
    manifest = replace(PACKAGE.manifest, nets=nets, context_width=width)
    written: list[Any] = []
    monkeypatch.setattr(
        "latentrt.benchmarks.models.controlnets.write_file",
        lambda path, tensors, content: written.append(tensors),
    )
    write_controlnet(replace(PACKAGE, manifest=manifest), tmp_path)
    channels = [written[0][f"controlnet_down_blocks.{n}.weight"][1][0] for n in range(len(outputs) - 1)]
    assert channels == [channels for channels, _ in outputs[:-1]]
    if config.get("addition_embed_type") is None:
        return
    assert "add_embedding.linear_1.weight" in written[0], "SDXL's size and pooled text"


@pytest.mark.parametrize("change", ["another context", "no graph for controls"])
def test_a_model_without_one_is_refused(change: str, tmp_path: Path) -> None:
    manifest = replace(PACKAGE.manifest, context_width=97)
    if change == "no graph for controls":
        nets = {name: net for name, net in PACKAGE.manifest.nets.items() if name != "unet_controlled"}
        manifest = replace(PACKAGE.manifest, nets=nets)
    with pytest.raises(UsageError, match="no ControlNet for the UNet of demo"):
        write_controlnet(replace(PACKAGE, manifest=manifest), tmp_path)


def test_edges_are_drawn_on_black() -> None:
    hint = np.asarray(edges(replace(CASE, width=128, height=64)))
    assert hint.shape == (64, 128, 3)
    assert set(np.unique(hint)) == {0, 255}
    assert 0.02 < np.mean(hint == 255) < 0.2


# ── both sides ─────────────────────────────────────────────────────────────────────────────────────


def test_the_demo_beside_diffusers(tmp_path: Path) -> None:
    """Whole processes; the pictures of both sides are alike, and without a ControlNet they are ours."""
    comparison = Comparison(rounds=1)
    document = measure_controls(PACKAGE, WITH_CHECKPOINT, CASE, comparison=comparison, pace=QUICK)
    document.write(tmp_path / "controls.json")
    document = read_document(tmp_path / "controls.json")
    assert not document.failed, [row.reason for row in document.rows]
    rows = {(row.workload, row.side): row for row in document.rows}
    places = [(OUR_STEP, side) for side in ("latentrt", IDLE, IN_USE)]
    places += [(workload, side) for workload in (WITH_ONE, PEAK) for side in ("latentrt", "diffusers")]
    places += [(OUR_CALL, side) for side in ("latentrt", IDLE)]
    assert list(rows) == places
    for (workload, _), row in rows.items():
        assert all(0 < sample < (3e9 if workload == PEAK else 5) for sample in row.samples)
        assert row.samples
    assert rows[OUR_STEP, IDLE].figures == {"differing": 0, "of": 64 * 64 * 3}
    assert len(rows[OUR_CALL, IDLE].rounds) == PAIRS, "one of each in turns"
    assert rows[WITH_ONE, "diffusers"].figures["psnr_db"] > 48
    assert rows[WITH_ONE, "diffusers"].stamp["side"]["diffusers"]
    peak = rows[PEAK, "latentrt"]
    assert 40e6 < peak.figures["before"] <= peak.samples[0]


def test_the_picture_follows_its_hint(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Further than a peer may be from ours: who ignores the net or its hint has no time that counts."""
    side = controlled.open_side(replace(WITH_CHECKPOINT, control=made))
    pictures: dict[str, Any] = {}

    def draw(workload: str, name: str) -> None:
        work = side.prepare(workload, CASE)
        work.run()
        pictures[name] = work.outputs()["image"]

    draw(PICTURE, "before")
    draw(CONTROL, "steered")
    draw(UNUSED, "unused")
    monkeypatch.setattr(controlled, "edges", lambda case: edges(case).rotate(90))
    draw(CONTROL, "another hint")
    side.close()
    np.testing.assert_array_equal(pictures["unused"], pictures["before"])
    assert psnr(pictures["steered"], pictures["before"]) < 42
    assert psnr(pictures["steered"], pictures["another hint"]) < 42


@pytest.mark.parametrize(("family", "wanted"), [("sd1", "StableDiffusion"), ("sdxl", "StableDiffusionXL")])
def test_diffusers_own_pipeline_draws(family: str, wanted: str, made: Path) -> None:
    """The class for ControlNets of the plain one's family, with its nets and the scheduler that is given."""
    diffusers: Any = import_module("diffusers")
    kind = getattr(diffusers, PIPELINES[family])
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        cross_attention_dim=8,
    )
    needed = [name for name, item in inspect.signature(kind).parameters.items() if item.default is item.empty]
    parts = {
        **dict.fromkeys(needed),
        "unet": unet,
        "scheduler": diffusers.EulerDiscreteScheduler(steps_offset=1),
    }
    plain = kind(**parts | without_checker(family))
    scheduler = diffusers.EulerDiscreteScheduler()
    pipe = controlled._steered(plain, replace(TASK, control=made), scheduler)
    assert type(pipe).__name__ == f"{wanted}ControlNetPipeline"
    assert pipe.unet is unet
    assert pipe.scheduler is scheduler
    assert pipe.controlnet.dtype == unet.dtype
    layouts = {
        weight.is_contiguous(memory_format=import_module("torch").channels_last)
        for weight in pipe.controlnet.parameters()
        if weight.dim() == 4
    }
    assert layouts == {True}, "as fast as the other nets"


@pytest.mark.parametrize(("device", "waits"), [("cpu", 0), ("cuda", 4)])
def test_what_diffusers_steps_take(device: str, waits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the end of the first step to that of the last, as the first takes as long as the others."""
    waited: list[int] = []
    monkeypatch.setattr("torch.cuda.synchronize", lambda: waited.append(1))
    clock = iter([1.0, 2.0, 3.0, 4.0, 10.0, 11.0, 12.5, 13.0])
    monkeypatch.setattr(controlled, "perf_counter", lambda: next(clock))
    ends = controlled._Ends(steps=4, device=device)
    for _ in range(2):
        for index in range(4):
            ends(None, index, None, {})
        assert ends.seconds == pytest.approx(4.0)
    assert len(waited) == waits, "at both ends of each picture"


def test_where_diffusers_cannot_run() -> None:
    assert OfDiffusers.available(WITH_CHECKPOINT) is None
    assert "none was given" in str(OfDiffusers.available(TASK))


# ── sides that are made up ─────────────────────────────────────────────────────────────────────────

OURS, THEIRS = "latentrt controlled", "diffusers controlled"


CALLS = {"plain_s": [1.0, 2.0, 1.0], "controlled_s": [1.002, 2.004, 1.002]}


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> MadeUp:
    process = MadeUp(
        shades={CONTROL: 90},
        figures=lambda workload, _: dict(CALLS) if workload == GRAPHS else {},
        stages={
            IN_USE: {"unet": 1.0, "update": 0.5, "controls": 0.6, "invariants": 9.0},
            "diffusers": {STEPS: 3.0},
        },
    )
    process.take_place(monkeypatch)
    return process


def measure(rounds: int = 2, **options: Any) -> Document:
    comparison = Comparison(rounds=rounds, **options)
    return measure_controls(PACKAGE, TASK, CASE, comparison=comparison, pace=QUICK)


def row_of(document: Document, workload: str, side: str) -> Row:
    (row,) = document.select(workload, side)
    return row


def text_of(document: Document) -> str:
    return full_tables([Result(name="controls", digest="", document=document)], {})


def test_rounds_flip_and_every_sample_is_kept(made_up: MadeUp) -> None:
    document = measure()
    without, beside = ["latentrt", OURS, OURS, "latentrt"], [OURS, THEIRS, THEIRS, OURS]
    assert made_up.opened == [*without, *beside, OURS]
    assert len({task.control for task in made_up.tasks}) == 1
    assert made_up.tasks[0].control is not None
    assert not made_up.tasks[0].control.exists(), "the ControlNet is removed again"
    assert row_of(document, OUR_STEP, IN_USE).rounds == ((1.05, 1.05),) * 2
    assert row_of(document, OUR_STEP, "latentrt").rounds == ((0.75, 0.75),) * 2
    assert row_of(document, WITH_ONE, "diffusers").rounds == ((1.5, 1.5),) * 2
    text = text_of(document)
    equal = "where a ControlNet is loaded and not used 1.002× [1.002, 1.002], 0 bytes of the picture differ"
    assert f"| our call of the UNet, 64×64, 2 steps, guidance 3 | 1.00 s; {equal} |" in text
    what = "step with one ControlNet, 64×64, 2 steps, guidance 3"
    takes = "750 ms, 1.40× [1.40, 1.40] of one without; diffusers takes 2.00× [2.00, 2.00]"
    assert f"| {what} | {takes} |" in text
    assert "| peak with one ControlNet | latentrt 2.00 MB (2.00 MB before it was loaded), diffusers 2" in text
    assert takes in short_table([Result(name="controls", digest="", document=document)])


def test_a_step_that_is_not_the_same_picture_fails(made_up: MadeUp) -> None:
    made_up.images[IDLE, UNUSED] = 1
    document = measure()
    row = row_of(document, OUR_STEP, IDLE)
    assert (row.status, row.reason, row.rounds) == ("FAILED", "189 of 192 bytes of the picture differ", ())
    assert document.failed
    assert row_of(document, OUR_STEP, IN_USE).status == "ok"
    assert f"- {IDLE}, our step: FAILED: 189 of 192 bytes" in text_of(document)


def test_calls_that_cannot_be_timed_say_why(made_up: MadeUp) -> None:
    made_up.errors["latentrt", GRAPHS] = SideError("not available", "no CPU")
    document = measure()
    for side in ("latentrt", IDLE):
        row = row_of(document, OUR_CALL, side)
        assert (row.status, row.reason, row.rounds) == ("not available", "no CPU", ())
    assert "our call of the UNet: not available: no CPU" in text_of(document)


def test_calls_are_not_timed_on_a_device() -> None:
    with (
        device_pipeline(PACKAGE, HostDevice()) as (pipe, _),
        pytest.raises(NotAvailableError, match="not timed on a device"),
    ):
        controlled.calls_of_both(pipe, CASE)


def test_a_net_that_does_not_steer_fails(made_up: MadeUp) -> None:
    made_up.shades = {}
    document = measure()
    for workload, side in ((OUR_STEP, IN_USE), (WITH_ONE, "latentrt")):
        row = row_of(document, workload, side)
        assert (row.status, row.reason) == ("FAILED", "the picture is the same as without the ControlNet")
    row = row_of(document, WITH_ONE, "diffusers")
    assert (row.status, row.reason) == ("not available", "ours failed: there is nothing to compare with")
    assert not list(document.select(PEAK))


def test_a_peer_whose_picture_is_not_ours_has_no_time(made_up: MadeUp) -> None:
    made_up.images["diffusers", CONTROL] = 95
    document = measure()
    row = row_of(document, WITH_ONE, "diffusers")
    assert (row.status, row.rounds) == ("FAILED", ())
    assert row.reason.startswith("image is not ours")
    assert made_up.opened.count(THEIRS) == 1, "it is not tried again"
    assert [row.side for row in document.select(PEAK)] == ["latentrt"]
    assert row_of(document, WITH_ONE, "latentrt").rounds
    assert "750 ms, 1.40× [1.40, 1.40] of one without; diffusers takes FAILED |" in text_of(document)


def test_a_side_that_fails_in_a_later_round_has_no_time(made_up: MadeUp) -> None:
    made_up.errors["diffusers", "open 2"] = SideError("FAILED", "it broke")
    row = row_of(measure(), WITH_ONE, "diffusers")
    assert (row.status, row.reason, row.rounds) == ("FAILED", "it broke", ())


def test_sides_that_cannot_be_opened(made_up: MadeUp) -> None:
    made_up.errors["diffusers", "open 1"] = SideError("not available", "not installed: diffusers")
    made_up.errors[IDLE, "open 1"] = SideError("FAILED", "it broke")
    document = measure()
    row = row_of(document, WITH_ONE, "diffusers")
    assert (row.status, row.reason) == ("not available", "not installed: diffusers")
    assert "- diffusers, step with one ControlNet: not available: not installed" in text_of(document)
    row = row_of(document, OUR_STEP, IDLE)
    assert (row.status, row.reason) == ("FAILED", "it broke")
    assert row_of(document, OUR_STEP, IN_USE).status == "ok", "it opens the process then"
    made_up.opened.clear()
    made_up.errors["latentrt", "open 1"] = SideError("FAILED", "it broke")
    with pytest.raises(SideError, match="it broke"):
        measure()


def test_sides_that_do_not_fit(made_up: MadeUp, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def refuse(task: Any, count: int, *, besides: int) -> None:
        asked.append((count, besides))
        raise MemoryLimitError(f"{count} sides at once", expected="fewer", fix="None.")

    monkeypatch.setattr(additions, "check_memory", refuse)
    document = measure()
    assert {row.status for row in document.rows} == {"not available"}
    assert len(asked) == 3, "what does not fit is not tried again"
    (two, one), (both, each), graphs = asked
    assert graphs == (2, 0)
    assert (two, both) == (2, 2)
    assert each == 2 * one > 0, "of the first two sides one has a ControlNet"


def test_a_peak_that_nobody_tells_is_not_zero(made_up: MadeUp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(additions, "resident_bytes", lambda pid: (0, 0))
    (peak,) = measure(peers=()).select(PEAK)
    assert (peak.status, peak.reason, peak.rounds) == ("not available", NO_PROC, ())


def test_the_command(made_up: MadeUp, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    words = "bench controls demo --quick --peers= --steps 3 --width 64 --height 64 --out"
    monkeypatch.setattr(sys, "argv", ["latentrt", *words.split(), str(out)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    document = read_document(out)
    assert document.settings["command"].startswith("latentrt bench controls demo --quick")
    assert (document.settings["rounds"], document.settings["peers"]) == (1, [])
    assert {row.side for row in document.rows} == {"latentrt", IDLE, IN_USE}
    assert document.rows[0].case["steps"] == 3
    assert document.rows[0].case["width"] == 64
