"""The measuring itself, on stages that do nothing: the models it is for take hours."""

import pytest

from latentrt.benchmarks.full_size import run_stage


def test_a_stage_has_figures_and_the_last_line_it_printed(capsys: pytest.CaptureFixture[str]) -> None:
    row = run_stage("print", ["-c", "print('noise'); print('{\"a\": 1}')"])
    assert row["output"] == {"a": 1}
    assert row["stage"] == "print"
    assert row["seconds"] > 0
    assert row["peak_rss_gb"] > 0
    assert capsys.readouterr().out.startswith("print ")


def test_a_stage_without_json_has_no_output() -> None:
    assert "output" not in run_stage("quiet", ["-c", "pass"])


def test_a_stage_that_fails_ends_the_run_and_is_named() -> None:
    with pytest.raises(SystemExit, match=r"^export fp16 failed with exit code 3$"):
        run_stage("export fp16", ["-c", "raise SystemExit(3)"])
