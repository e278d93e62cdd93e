"""Ways to a first picture: a tiny checkpoint by every way that can be gone here, and ways that fail."""

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest

from latentrt import cli
from latentrt.benchmarks.case import Case
from latentrt.benchmarks.models.open import find_model
from latentrt.benchmarks.process import SideError, SideProcess
from latentrt.benchmarks.records import Document, Row, read_document
from latentrt.benchmarks.report.reading import Result
from latentrt.benchmarks.report.tables import full_tables, short_table
from latentrt.benchmarks.sides import single_file
from latentrt.benchmarks.sides.contract import NotAvailableError, Task, open_package, open_whole_package
from latentrt.benchmarks.sides.single_file import write_configs
from latentrt.benchmarks.verbs import first_picture, opening
from latentrt.benchmarks.verbs.first_picture import WAYS, Errand, Taken, Way
from latentrt.benchmarks.verbs.opening import DRAWN, OPENED, PEAK, WRITTEN, measure_opening
from latentrt.checkpoints.files.open import Checkpoint
from latentrt.engines.errors import CheckpointError, ModelError
from latentrt.engines.package import MANIFEST
from tests.checkpoints.conftest import SMALL, shared, small_archive, write_small  # noqa: F401  # pyright: ignore[reportUnusedImport]

OURS = ("latentrt", "as it is, cold cache"), ("latentrt", "as it is, warm cache")
SIZE = {"width": 32, "height": 32}
# A `cyllama.sd` that draws nothing.
CYLLAMA = """
class SDContextParams:
    n_threads, eager_load = 0, False
    def __init__(self, model_path): self.path = model_path
class SDContext:
    def __init__(self, params): assert params.eager_load and open(params.path, "rb").read(8)
    def generate(self, prompt, **parameters): assert parameters["sample_steps"] == 1 and prompt
class SampleMethod:
    EULER = 0
print("a line that libraries print")
"""


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SMALL, as one file."""
    return shared(tmp_path_factory, "small.safetensors", write_small)


@pytest.fixture
def small_templates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small_archive: Path) -> None:  # noqa: F811
    """Every Python that is started from here on has the templates of SMALL in place of those that ship."""
    place = tmp_path / "start"
    place.mkdir()
    lines = "from latentrt.checkpoints.templates import archive", "from pathlib import Path"
    change = f"archive.SHIPPED = Path({str(small_archive)!r})"
    (place / "sitecustomize.py").write_text("\n".join([*lines, change]))
    monkeypatch.setenv("PYTHONPATH", str(place))
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "cache"))


def by_way(document: Document) -> dict[tuple[str, str], dict[str, Row]]:
    """Rows by workload, by side and way."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in document.rows:
        found.setdefault((row.side, row.case["way"]), {})[row.workload] = row
    return found


@pytest.mark.usefixtures("small_templates")
def test_a_file_by_ways_without_tracing(small: Path, tmp_path: Path) -> None:
    said: list[str] = []
    ways = ("opened", "templates", "diffusers")
    document = measure_opening(small, **SIZE, ways=ways, threads=1, progress=said.append)
    document.write(tmp_path / "opening.json")
    found = by_way(read_document(tmp_path / "opening.json"))
    assert not document.failed, [row.reason for row in document.rows]
    exported, theirs = ("latentrt", "exported through templates"), ("diffusers", "from_single_file")
    assert list(found) == [*OURS, exported, theirs]
    for rows in found.values():
        assert [rows[name].unit for name in (OPENED, DRAWN, PEAK, WRITTEN)] == ["s", "s", "B", "B"]
        assert rows[OPENED].samples[0] < rows[DRAWN].samples[0]
        assert 40e6 < rows[PEAK].samples[0] < 3e9
    cold, warm = (found[way] for way in OURS)
    size = small.stat().st_size
    assert 100_000 < cold[WRITTEN].samples[0] < size, "graphs, no weights"
    assert warm[WRITTEN].samples[0] < cold[WRITTEN].samples[0] / 100
    assert warm[OPENED].samples[0] < cold[OPENED].samples[0]
    assert found[exported][WRITTEN].samples[0] > size * 0.8, "weights as well"
    assert 0 < found[exported][OPENED].figures["export_s"] < found[exported][OPENED].samples[0]
    assert found[theirs][WRITTEN].samples[0] == 0
    assert found[theirs][PEAK].samples[0] > cold[PEAK].samples[0], "torch"
    assert found[theirs][OPENED].stamp["side"]["diffusers"] == diffusers.__version__
    assert cold[OPENED].stamp["side"]["backend"].startswith("onnxruntime ")
    assert (document.model["name"], document.model["weights_bytes"]) == (small.stem, {small.name: size})
    assert said[0] == f"reading {small.name}"


@pytest.mark.slow
@pytest.mark.usefixtures("small_templates")
def test_a_file_by_tracing(small: Path) -> None:
    (rows,) = by_way(measure_opening(small, **SIZE, ways=("traced",))).values()
    assert {row.status for row in rows.values()} == {"ok"}, rows[DRAWN].reason
    assert rows[OPENED].figures["export_s"] > 1


def test_diffusers_gets_its_configs_from_a_folder(small: Path, tmp_path: Path) -> None:
    write_configs(Checkpoint.open(small), tmp_path / "configs")
    pipe: Any = getattr(diffusers, "StableDiffusionPipeline")  # noqa: B009
    found = pipe.from_single_file(
        str(small), config=str(tmp_path / "configs"), local_files_only=True, safety_checker=None
    )
    assert dict(SMALL.unet).items() >= {"cross_attention_dim": found.unet.config.cross_attention_dim}.items()
    assert found.tokenizer("a red circle").input_ids[0] == 49406


@pytest.mark.parametrize("has", [True, False])
def test_stable_diffusion_cpp_in_its_own_environment(
    has: bool, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in (("__init__", "__version__ = '0.0'"), ("sd", CYLLAMA)) if has else ():
        (tmp_path / "cyllama").mkdir(exist_ok=True)
        (tmp_path / "cyllama" / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    document = measure_opening(small, ways=("sdcpp",), sdcpp=Path(sys.executable), threads=2)
    rows = by_way(document)["stable-diffusion.cpp", "cyllama"]
    if has:
        assert rows[OPENED].stamp["side"] == {"cyllama": "0.0"}
        assert {row.status for row in rows.values()} == {"ok"}
    else:
        assert list(rows) == [DRAWN]
        assert rows[DRAWN].status == "not available"
        assert rows[DRAWN].reason.startswith("cyllama cannot be imported")


# ── ways that are made up ──────────────────────────────────────────────────────────────────────


@pytest.fixture
def gone(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which ways were gone, in their order: `good` always, `bad` until its second round, `none` never."""
    names: list[str] = []

    def good(errand: Errand, folder: Path) -> Iterator[Taken]:
        assert not any(folder.iterdir())
        names.append("good")
        (folder / "left").write_text("it goes away")
        for seconds in (4.0, 2.0):
            yield Taken(opened=seconds, drawn=seconds + len(names), peak=2_000_000, written=7, export=1.0)

    def bad(errand: Errand, folder: Path) -> Iterator[Taken]:
        names.append("bad")
        if names.count("bad") > 1:
            raise ModelError("it broke", expected="a way", fix="Mend it.")
        yield Taken(opened=1.0, drawn=1.0, peak=0, written=0)

    ways = {
        "good": Way(side="latentrt", ways=("cold", "warm"), go=good),
        "bad": Way(side="peer", ways=("there",), go=bad),
        "none": Way(side="other", ways=("nowhere",), go=bad, refusal=lambda errand: "no road"),
    }
    monkeypatch.setattr(opening, "WAYS", ways)
    return names


def test_rounds_flip_and_failures_are_told(gone: list[str], small: Path) -> None:
    document = measure_opening(small, ways=("good", "bad", "none"), rounds=3)
    assert gone == ["good", "bad", "bad", "good", "good"]
    found = by_way(document)
    assert found["latentrt", "cold"][DRAWN].rounds == ((5.0,), (8.0,), (9.0,))
    assert found["latentrt", "warm"][OPENED].rounds == ((2.0,),) * 3
    (failed,), (missing,) = found["peer", "there"].values(), found["other", "nowhere"].values()
    assert (failed.status, failed.reason, failed.rounds) == ("FAILED", "it broke", ())
    assert (missing.status, missing.reason) == ("not available", "no road")
    text = full_tables([Result(name="opening", digest="", document=document)], {})
    lines = [line for line in text.splitlines() if line.startswith("| latentrt, cold")]
    weights = sum(4 * np.prod(header.shape) for header in opening_headers(small))
    assert lines == [
        f"| latentrt, cold | 4.00 s | 1.00 s | 8.00 s | 2.00 MB ({2e6 / weights:.2f}× the weights) | 7.00 B |"
    ]
    assert "- peer, first picture: FAILED: it broke" in text
    assert "- other, first picture: not available: no road" in text
    assert "medians of 3 rounds" in text
    short = short_table([Result(name="opening", digest="", document=document)])
    assert "| cold 8.00 s, warm 6.00 s |" in short


def opening_headers(path: Path) -> Iterator[Any]:
    for part in Checkpoint.open(path).parts.values():
        yield from part.tensors.values()


def test_a_peak_that_nobody_tells_is_not_zero(gone: list[str], small: Path) -> None:
    rows = by_way(measure_opening(small, ways=("bad",)))["peer", "there"]
    assert (rows[PEAK].status, rows[PEAK].rounds) == ("not available", ())
    assert rows[WRITTEN].samples == (0.0,)


def test_ways_that_cannot_be_gone(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errand = Errand(source=Checkpoint.open(small), case=Case(width=8, height=8, guidance_scale=1.0))
    assert "--sdcpp PYTHON" in str(WAYS["sdcpp"].refusal(errand))
    assert WAYS["diffusers"].refusal(errand) is WAYS["traced"].refusal(errand) is None
    folder = replace(errand, sdcpp=Path("python"), source=replace(errand.source, root=tmp_path))
    for name in ("diffusers", "sdcpp"):
        assert "this checkpoint is a folder" in str(WAYS[name].refusal(folder))
    monkeypatch.setattr(first_picture, "missing_modules", lambda *names: f"not installed: {names[0]}")
    assert WAYS["traced"].refusal(errand) == WAYS["diffusers"].refusal(errand) == "not installed: torch"
    monkeypatch.setattr(single_file, "PIPELINES", {})
    assert "not set up for sd1" in str(WAYS["diffusers"].refusal(errand))
    with pytest.raises(CheckpointError, match="does not exist"):
        measure_opening(tmp_path / "none.safetensors")


def test_the_command(
    gone: list[str],
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(first_picture, "WAYS", opening.WAYS)
    command = ["latentrt", "bench", "opening", str(small), "--ways", "good", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path / "found.json")])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    assert gone == ["good", "good"]
    assert "first picture way=cold" in capsys.readouterr().out
    document = read_document(tmp_path / "found.json")
    assert document.settings["command"].startswith(f"latentrt bench opening {small.name} --ways good")


# ── the other verbs ────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("small_templates")
def test_a_checkpoint_beside_packages(
    small: Path,
    small_archive: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A side opens what `find_model` has opened: the same package, in the cache."""
    from functools import partial

    from latentrt.checkpoints import opened

    monkeypatch.setattr(opened, "Options", partial(opened.Options, templates=small_archive))
    said: list[str] = []
    model = find_model(str(small), backend="onnxruntime", said=said.append)
    assert (model.name, model.path, model.checkpoint) == (small.stem, small, None)
    task = Task(model=model.path, backend="onnxruntime", threads=1)
    assert open_package(task).root == model.package.root
    made = {path: path.stat().st_mtime_ns for path in model.package.root.rglob(MANIFEST)}
    case = Case.of(model.package.manifest, **SIZE)
    with SideProcess("latentrt", "latentrt", task) as ours, SideProcess("peer", "onnxruntime", task) as peer:
        (_, a), (_, b) = (side.prepare("unet", case) for side in (ours, peer))
    np.testing.assert_allclose(a["prediction"], b["prediction"], rtol=1e-3, atol=1e-3)
    assert made == {path: path.stat().st_mtime_ns for path in model.package.root.rglob(MANIFEST)}
    with pytest.raises(NotAvailableError, match="not beside the graphs"):
        open_whole_package(task)
    with pytest.raises(SideError, match="unknown backend"):
        SideProcess("latentrt", "latentrt", replace(task, backend="abacus"))
    assert len(list((Path(os.environ["LATENTRT_CACHE"]) / "checkpoints").iterdir())) == 1
