"""Changes of adapters: files as sd-scripts makes them, both sides on tiny models, and made-up sides."""

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt import cli
from latentrt.adapters.binding import bind
from latentrt.adapters.files import read_adapter
from latentrt.benchmarks import skeletons
from latentrt.benchmarks.likeness import psnr
from latentrt.benchmarks.models.loras import TARGETS, write_lora
from latentrt.benchmarks.process import SideError
from latentrt.benchmarks.records import Document, Row, read_document
from latentrt.benchmarks.report.reading import Result
from latentrt.benchmarks.report.tables import full_tables, short_table
from latentrt.benchmarks.sides import adapted, plain_pipeline, single_file
from latentrt.benchmarks.sides.adapted import CHANGES, NEW, NONE, OPEN, OfDiffusers, picture_after
from latentrt.benchmarks.sides.contract import UNUSED, Task
from latentrt.benchmarks.verbs import adapters, additions
from latentrt.benchmarks.verbs.adapters import LOADED, STEP, WITHOUT, WORKLOADS, Changes, measure_adapters
from latentrt.benchmarks.verbs.memory import NO_PROC, PEAK
from latentrt.engines.errors import MemoryLimitError
from latentrt.engines.net_weights import part_shapes
from latentrt.engines.package import MANIFEST, Manifest, Package
from latentrt.engines.safetensors_format import read_header
from tests.benchmarks.stand_in_side import CASE, PACKAGE, QUICK, TASK, WITH_CHECKPOINT, MadeUp
from tests.checkpoints.conftest import shared, small_archive, write_small  # noqa: F401  # pyright: ignore[reportUnusedImport]

ONE = replace(CASE, steps=1, sampler="euler")
# diffusers' schedulers call np.array(tensor), and it announces what will move
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*__array.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]


# ── the files ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("skeleton", "modules"),
    [
        ("sd15-fp16", {"lora_unet_": 192, "lora_te_": 72}),
        # the last layer of the first text encoder is in no graph: 66 of sd-scripts' 72
        ("sdxl-fp16", {"lora_unet_": 722, "lora_te1_": 66, "lora_te2_": 192}),
    ],
)
def test_as_many_modules_as_sd_scripts_prints(
    skeleton: str, modules: Mapping[str, int], tmp_path: Path
) -> None:
    """ "create LoRA for U-Net: 192 modules." are its words for SD 1.5, and 722 for SDXL."""
    folder = skeletons.FOLDER / skeleton  # it has no weights, and `Package.open` would miss them
    manifest = Manifest.from_json(json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    package = Package(root=folder, manifest=manifest)
    write_lora(package, "all", tmp_path / "all.safetensors", rank=1)
    names = [name for name in read_header(tmp_path / "all.safetensors").tensors if name.endswith(".alpha")]
    assert {prefix: sum(name.startswith(prefix) for name in names) for prefix in modules} == modules
    assert len(names) == sum(modules.values())


@pytest.mark.parametrize("name", TARGETS)
def test_a_file_fits_its_model(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.safetensors"
    write_lora(PACKAGE, name, path, rank=3)
    header = read_header(path)
    assert {tensor.dtype for tensor in header.tensors.values()} == {"F16"}
    shapes = {part: part_shapes(PACKAGE, part) for part in ("unet", "text_encoder")}
    bound = bind(read_adapter(path), shapes)  # refuses keys and shapes that the model does not have
    assert bound.name == name
    keys = [key for key in header.tensors if key.endswith("lora_down.weight")]
    wanted = {"keys": "attn2_to_", "text": "lora_te_"}.get(name, "lora_")
    assert keys
    assert all(wanted in key for key in keys)


# ── both sides ─────────────────────────────────────────────────────────────────────────────────


def test_the_demo_beside_diffusers(tmp_path: Path) -> None:
    """The pictures of both sides are alike, with files that change a picture by more than the bar."""
    said: list[str] = []
    changes = Changes(loras=("keys", WITHOUT), rounds=1)
    document = measure_adapters(
        PACKAGE, WITH_CHECKPOINT, CASE, changes=changes, pace=QUICK, progress=said.append
    )
    document.write(tmp_path / "adapters.json")
    document = read_document(tmp_path / "adapters.json")
    assert not document.failed, [row.reason for row in document.rows]
    for side in ("latentrt", "diffusers"):
        rows = {row.workload: row for row in document.select(side=side) if row.case.get("lora") == "keys"}
        assert tuple(rows) == WORKLOADS
        assert all(len(row.rounds) == 1 and row.samples[0] > 0 for row in rows.values())
        assert rows[NEW].figures["first_s"] > 0
        (peak,) = document.select(PEAK, side)
        assert 40e6 < peak.figures["before"] < peak.samples[0] < 3e9
    ours = {
        row.workload: row.samples[0] for row in document.select(side="latentrt", case=rows_case(document))
    }
    assert ours[OPEN] < ours[NEW]
    theirs = next(document.select(picture_after(NEW), "diffusers"))
    assert theirs.figures["psnr_db"] > 48
    assert theirs.stamp["side"]["diffusers"]
    own, loaded = document.select(STEP)
    assert (own.side, loaded.side, loaded.figures["differing"]) == ("latentrt", LOADED, 0)
    assert own.case["steps"] == CASE.steps
    assert 0 < min(own.samples) < 5
    assert "round 1 of 1: diffusers" in said


def rows_case(document: Document) -> Mapping[str, Any]:
    return next(row.case for row in document.rows if "lora" in row.case)


@pytest.mark.parametrize("name", TARGETS)
def test_a_change_changes_the_picture(name: str, tmp_path: Path) -> None:
    """Further than a peer may be from ours: who does not apply a file has no time that counts."""
    write_lora(PACKAGE, name, tmp_path / f"{name}.safetensors")
    side = adapted.open_side(replace(WITH_CHECKPOINT, loras=tmp_path))
    pictures: dict[str, Any] = {}
    for workload in ("picture", name, UNUSED):
        work = side.prepare(workload, ONE)
        work.run()
        pictures[workload] = work.outputs()["image"]
        work.close()
    side.close()
    assert psnr(pictures[name], pictures["picture"]) < 42
    np.testing.assert_array_equal(pictures[UNUSED], pictures["picture"])


def test_a_file_beside_diffusers(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    small_archive: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A one-file checkpoint, which diffusers opens with configs that are made for it."""
    from latentrt.checkpoints import opened

    small = shared(tmp_path_factory, "small.safetensors", write_small)
    monkeypatch.setattr(opened, "Options", partial(opened.Options, templates=small_archive))
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "cache"))
    task = Task(model=small, backend="onnxruntime", threads=1, loras=tmp_path)
    assert OfDiffusers.available(task) is None
    from latentrt.benchmarks.sides.contract import open_package

    write_lora(open_package(task), "all", tmp_path / "all.safetensors")
    pictures: list[Any] = []
    for side in (adapted.open_side(task), OfDiffusers.open_side(task)):
        work = side.prepare("all", replace(ONE, width=32, height=32))
        work.run()
        assert set(work.figures()) == set(WORKLOADS)
        pictures.append(work.outputs()["image"])
        side.close()
    assert psnr(*pictures) > 48


def test_where_diffusers_cannot_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert OfDiffusers.available(WITH_CHECKPOINT) is None
    assert "none was given" in str(OfDiffusers.available(TASK))
    (tmp_path / "text_encoder_2").mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps({}))
    assert "two text encoders" in str(OfDiffusers.available(replace(TASK, checkpoint=tmp_path)))
    file = write_small(tmp_path / "small.safetensors")
    monkeypatch.setattr(single_file, "PIPELINES", {})
    assert "not set up for sd1" in str(OfDiffusers.available(replace(TASK, model=file)))
    monkeypatch.setattr(plain_pipeline, "missing_modules", lambda *names: f"not installed: {names[-1]}")
    assert OfDiffusers.available(WITH_CHECKPOINT) == "not installed: peft"


# ── sides that are made up ─────────────────────────────────────────────────────────────────────


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> MadeUp:
    def figures(workload: str, opened: int) -> dict[str, float]:
        return dict.fromkeys(WORKLOADS, 0.5 + opened) if workload in TARGETS else {}

    process = MadeUp(shades={"all": 50, "keys": 150}, figures=figures)
    process.take_place(monkeypatch)
    monkeypatch.setattr(adapters, "SideProcess", process)
    return process


def measure(*loras: str, rounds: int = 3, **changes: Any) -> Document:
    chosen = Changes(loras=loras, rounds=rounds, **changes)
    return measure_adapters(PACKAGE, TASK, CASE, changes=chosen, pace=QUICK)


def rows_of(document: Document, side: str, lora: str) -> dict[str, Row]:
    return {row.workload: row for row in document.select(side=side) if row.case.get("lora") == lora}


def text_of(document: Document) -> str:
    return full_tables([Result(name="adapters", digest="", document=document)], {})


def test_rounds_flip_and_every_sample_is_kept(made_up: MadeUp) -> None:
    document = measure("all", "keys")
    ours, theirs = "latentrt adapted", "diffusers adapted"
    assert made_up.opened == [ours, theirs, theirs, ours, ours, theirs]
    assert rows_of(document, "latentrt", "keys")[NEW].rounds == ((1.5,), (4.5,), (5.5,))
    assert rows_of(document, "diffusers", "all")[OPEN].rounds == ((2.5,), (3.5,), (6.5,))
    assert "first_s" in rows_of(document, "latentrt", "all")[NEW].figures
    text = text_of(document)
    after = "4.50 s | 4.50 s | 4.50 s | 4.50 s | 4.50 s | 4.50 s | 4.50 s | 4.50 s"
    assert f"| all, latentrt | {after} |" in text
    assert "| LoRA of rank 16, 64×64 | load | new set | then a picture | back to none |" in text
    assert "latentrt 2.00 MB (2.00 MB before the first)" in text
    assert "medians of 3 rounds" in text
    short = short_table([Result(name="adapters", digest="", document=document)])
    wanted = "all 9.00 s, again 4.50 s, diffusers 7.00 s, again 3.50 s; keys 9.00 s, again 4.50 s, diffusers"
    assert f"from a file to its set | {wanted}" in short


def test_a_picture_that_is_not_ours_has_no_time(made_up: MadeUp) -> None:
    made_up.images["diffusers", "keys"] = 90
    document = measure("all", "keys", rounds=2)
    (row,) = rows_of(document, "diffusers", "keys").values()
    assert (row.status, row.rounds) == ("FAILED", ())
    assert row.reason.startswith("image is not ours")
    assert rows_of(document, "diffusers", "all")[NEW].status == "ok"
    assert "- diffusers, load: FAILED: image is not ours" in text_of(document)
    assert "| keys, diffusers | FAILED | – |" in text_of(document)


def test_a_file_that_changes_nothing_fails(made_up: MadeUp) -> None:
    made_up.images["latentrt", "all"] = 0
    document = measure("all", "keys", rounds=1)
    (row,) = rows_of(document, "latentrt", "all").values()
    assert (row.status, row.reason) == ("FAILED", "the picture is the same as without the adapter 'all'")
    (row,) = rows_of(document, "diffusers", "all").values()
    assert (row.status, row.reason) == ("not available", "ours failed: there is nothing to compare with")
    assert rows_of(document, "diffusers", "keys")[NEW].status == "ok"


def test_sides_that_cannot_be_opened(made_up: MadeUp) -> None:
    made_up.errors["diffusers", "open 1"] = SideError("not available", "not installed: peft")
    document = measure("all")
    (row,) = document.select(side="diffusers")
    assert (row.workload, row.status) == ("open", "not available")
    assert made_up.opened.count("diffusers adapted") == 1, "it is not tried again"
    assert "- diffusers: not available: not installed: peft" in text_of(document)
    made_up.opened.clear()
    made_up.errors["latentrt", "open 2"] = SideError("FAILED", "it broke")
    (row,) = measure("all", peers=()).select(side="latentrt")
    assert (row.status, row.reason) == ("FAILED", "it broke")
    made_up.opened.clear()
    made_up.errors["latentrt", "open 1"] = SideError("FAILED", "it broke")
    with pytest.raises(SideError, match="it broke"):
        measure("all")


def test_a_peak_that_nobody_tells_is_not_zero(made_up: MadeUp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(additions, "resident_bytes", lambda pid: (0, 0))
    (peak,) = measure("all", peers=()).select(PEAK)
    assert (peak.status, peak.reason, peak.rounds) == ("not available", NO_PROC, ())


def test_steps_without_adapters(made_up: MadeUp) -> None:
    document = measure(WITHOUT)
    own, loaded = document.rows
    assert made_up.opened == ["latentrt", "latentrt adapted"]
    assert set(own.samples) == {1.5 / CASE.steps}, "UNet and update alone"
    assert loaded.figures == {"differing": 0, "of": 8 * 8 * 3}
    line = "750 ms; where some are loaded 1.00× [1.00, 1.00], 0 bytes of the picture differ"
    assert f"| step without adapters | {line} |" in text_of(document)
    made_up.images[LOADED, UNUSED] = 1
    *_, loaded = measure(WITHOUT).rows
    assert (loaded.status, loaded.reason) == ("FAILED", "189 of 192 bytes of the picture differ")


def test_two_sides_that_do_not_fit(made_up: MadeUp, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(task: Task, count: int, *, besides: int) -> None:
        raise MemoryLimitError(f"{count} sides at once", expected="fewer", fix="None.")

    monkeypatch.setattr(additions, "check_memory", refuse)
    rows = measure(WITHOUT).rows
    assert [row.side for row in rows] == ["latentrt", LOADED]
    for row in rows:
        assert (row.workload, row.status, row.reason) == (STEP, "not available", "2 sides at once")
    assert made_up.opened == []


def test_the_command(made_up: MadeUp, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    words = "bench adapters demo --loras keys,none --peers= --rank 4 --rounds 2 --steps 2 --budget 0 --out"
    monkeypatch.setattr(sys, "argv", ["latentrt", *words.split(), str(out)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    document = read_document(out)
    assert document.settings["command"].startswith("latentrt bench adapters demo --loras keys,none")
    assert {row.side for row in document.rows} == {"latentrt", LOADED}
    assert rows_case(document)["rank"] == 4
    assert rows_case(document)["width"] == 128


def test_a_change_is_timed_until_it_is_ready() -> None:
    """The call, and what the picture after it says that adapters took; the rest is the picture's."""
    made: list[str] = []
    changes = {name: partial(made.append, name) for name in CHANGES}
    work = adapted.Work(
        call=lambda: made.append("picture") or {"image": np.zeros(1)},
        figures=lambda: {"stages_s": {"adapters": 5.0}},
    )
    seconds: dict[str, float] = {}
    adapted._change(changes, work, seconds)
    assert made == ["load", NEW, "picture", NONE, "picture", OPEN, "picture", "unload"]
    assert 5 < seconds[NEW] < 6
    assert -5 < seconds[picture_after(NEW)] < -4
    assert seconds["load"] < 1
