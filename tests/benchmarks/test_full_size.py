"""The measuring itself, on stages that do nothing: the models it is for take minutes."""

from pathlib import Path

import pytest

from latentrt.benchmarks.models import full_size
from latentrt.benchmarks.models.full_size import Stage, main, make_checkpoint, measure_export, run_stage
from latentrt.benchmarks.records import read_document
from latentrt.engines.errors import ModelError

STAGE = Stage(seconds=2.0, cpu_seconds=3.0, peak_rss=5_000, figures={"seconds": 1.5})


def test_a_stage_has_figures_and_the_last_line_it_printed() -> None:
    stage = run_stage("print", ["-c", 'print(\'noise\'); print(\'{"a": 1, "package": "/x"}\')'])
    assert stage.figures == {"a": 1}
    assert stage.seconds > 0
    assert 1e6 < stage.peak_rss < 1e9
    assert run_stage("quiet", ["-c", "pass"]).figures == {}


def test_a_stage_that_fails_is_named_with_what_it_said() -> None:
    code = "import sys; sys.stderr.write('no room in /home/someone/x'); sys.exit(3)"
    with pytest.raises(ModelError, match=r"^export fp16 failed: it ended with exit code 3: no room in …/x;"):
        run_stage("export fp16", ["-c", code])


def test_a_checkpoint_is_complete_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stage(name: str, arguments: list[str]) -> Stage:
        folder = Path(arguments[-1])
        assert folder.parent.parent == tmp_path, "beside the place it is for: a rename does not copy"
        folder.mkdir()
        (folder / "model_index.json").write_text("{}")
        if arguments[-2] == "breaks":
            raise ModelError("it broke", expected="a stage", fix="Mend it.")
        return STAGE

    monkeypatch.setattr(full_size, "run_stage", stage)
    with pytest.raises(ModelError, match="it broke"):
        make_checkpoint("breaks", tmp_path / "sd15")
    assert not list(tmp_path.iterdir())
    assert make_checkpoint("sd15", tmp_path / "sd15") == STAGE
    assert [path.name for path in tmp_path.rglob("*")] == ["sd15", "model_index.json"]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stages that only write a file; exporting to fp32 fails."""
    done: list[str] = []

    def make(recipe: str, checkpoint: Path) -> Stage:
        checkpoint.mkdir(parents=True)
        (checkpoint / "weights").write_bytes(b"1234")
        done.append(recipe)
        return STAGE

    def export(checkpoint: Path, package: Path, dtype: str, *flags: str) -> Stage:
        assert flags == ("--verify", "--overwrite")
        done.append(package.name)
        if dtype == "fp32":
            raise ModelError("it broke", expected="a stage", fix="Mend it.")
        return STAGE

    monkeypatch.setattr(full_size, "make_checkpoint", make)
    monkeypatch.setattr(full_size, "export", export)
    return done


def test_the_script_makes_exports_and_writes(
    tmp_path: Path, made: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(tmp_path), "--dtypes", "fp16", "--out", str(tmp_path / "export.json")])
    main([str(tmp_path), "--dtypes", "fp16"])
    assert made == ["sd15", "sd15-fp16", "sd15-fp16"], "the checkpoint is made once"
    document = read_document(tmp_path / "export.json")
    assert document.benchmark == "export"
    assert document.model == {"name": "sd15", "checkpoint_bytes": 4}
    assert [(row.workload, row.unit, row.samples) for row in document.rows] == [
        ("make checkpoint", "s", (2.0,)),
        ("make checkpoint peak memory", "B", (5000.0,)),
        ("export", "s", (2.0,)),
        ("export peak memory", "B", (5000.0,)),
    ]
    assert document.rows[2].figures == {"seconds": 1.5, "cpu_seconds": 3.0}
    assert "export peak memory           fp16  5000 B" in capsys.readouterr().out


def test_an_export_that_fails_is_a_row_and_the_exit_code(tmp_path: Path, made: list[str]) -> None:
    document = measure_export(tmp_path, dtypes=("fp32", "fp16"))
    assert [row.status for row in document.rows] == ["ok", "ok", "FAILED", "ok", "ok"]
    assert document.rows[2].reason == "it broke"
    with pytest.raises(SystemExit, match="1"):
        main([str(tmp_path), "--dtypes", "fp32"])
