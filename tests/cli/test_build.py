"""`latentrt build`, as a person or a script calls it. The demo's quickest net is built for real."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from latentrt import cli
from latentrt.cli import build as build_verb
from latentrt.engines.backends import BackendRow
from latentrt.engines.contest import hosts
from latentrt.engines.contest.hosts import measure_hosts
from latentrt.engines.installed import install_command
from latentrt.engines.onnxruntime.nets import cuda_available
from latentrt.engines.openvino import library as openvino_library
from latentrt.engines.tensorrt.flavour import flavour
from tests.engines.test_contest import FASTER, Opener, time_sleepers

QUICK = ["--nets", "unet_time", "--profile", "64x64:b1"]


@pytest.fixture
def latentrt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """Call the command with a store of its own: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "default"))

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["latentrt", "build", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call


def test_a_build_says_what_how_large_how_long_and_why(latentrt: Any, tmp_path: Path) -> None:
    code, out, err = latentrt("demo", *QUICK, "--store", "here")
    assert (code, err) == (0, "")
    assert out.startswith("unet_time  1-2000@30 steps  2.3 MB  built in ")
    assert out.endswith("s: no engine of unet_time for tensorrt-rtx has been built yet\n")
    assert len(list((tmp_path / "here" / "engines").iterdir())) == 1
    assert latentrt(*QUICK, "--store", "here")[1] == "unet_time  1-2000@30 steps  2.3 MB  in the store\n"
    code, out, _ = latentrt(*QUICK, "--store", "here", "--optimization-level", "1", "--dry-run")
    assert code == 0
    assert out == (
        "unet_time  1-2000@30 steps  to build: the nearest engine, of unet_time, differs in"
        " optimization_level (3 there, 1 here)\n"
    )
    code, out, _ = latentrt(*QUICK, "--store", "here", "--dry-run")
    assert out == "unet_time  1-2000@30 steps  in the store\n"


def test_controls_are_built_with_the_graph_that_takes_them(latentrt: Any) -> None:
    options = ["--backend", "tensorrt-rtx", "--profile", "64x64:b1", "--nets", "step", "--store", "here"]
    code, out, err = latentrt("demo", *options, "--control", "edges", "--control", "likeness")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == [
        *("step", "unet_image_prompt"),
        *("controlnet_hint", "controlnet_time", "controlnet"),
        *("image_features", "image_prompt"),
    ]
    code, out, _ = latentrt("demo", *options, "--control", "edges", "--dry-run")
    assert "unet_controlled  64x64 b1 guided, 64x64 b1 unguided  to build" in out


def test_json(latentrt: Any, tmp_path: Path) -> None:
    options = ["--weights", "streamed", "--workspace", "16", "--backend", "tensorrt-rtx", "--json"]
    code, out, err = latentrt(*QUICK, *options)
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["backend"], found["profiles"]) == ("tensorrt-rtx", ["64x64:b1"])
    (net,) = found["nets"]
    assert (net["net"], net["cached"], net["profiles"]) == ("unet_time", False, ["1-2000@30 steps"])
    assert net["size"] == (Path(net["path"]) / "engine.bin").stat().st_size == net["facts"]["size"]
    assert Path(net["path"]).is_relative_to(tmp_path / "default")
    assert net["seconds"] > 0
    key = json.loads((Path(net["path"]) / "manifest.json").read_text())["key"]
    assert (key["flags"], key["workspace_limit"]) == (["WEIGHT_STREAMING"], 16 * 2**20)


def test_a_dry_run_builds_nothing(latentrt: Any, tmp_path: Path) -> None:
    code, out, _ = latentrt("--dry-run", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["profiles"] == ["128x128:b1-4"]
    nets = [row["net"] for row in found["nets"]]
    assert nets == [
        "text_encoder",
        "vae_encoder",
        "unet_context",
        "unet_time",
        "unet",
        "step",
        "step_masked",
        "vae_decoder",
    ]
    assert all(not row["cached"] and row["why"] for row in found["nets"])
    assert not (tmp_path / "default").exists()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--profile", "63x64"], 2, "63 pixels are not multiples of 8"),
        (["--profile", "big"], 2, "WIDTHxHEIGHT"),
        (["--weights", "all"], 2, "embedded, stripped, streamed, refittable"),
        (["--weights", "refittable"], 4, "--weights refittable (REFIT_INDIVIDUAL) needs a GPU"),
        (["--optimization-level", "9"], 2, "optimization level is 9"),
        (["--nets", "unet,vae"], 2, "no net 'vae' to build"),
        (["--backend", "tensorrt"], 4, install_command("tensorrt")),
        (["--hardware-compatibility", "ampere_plus"], 4, "ignores the hardware compatibility"),
        (["nowhere"], 3, "nowhere does not exist"),
    ],
)
def test_errors(latentrt: Any, options: list[str], code: int, message: str) -> None:
    found, out, err = latentrt(*options, "--dry-run")
    assert (found, out) == (code, "")
    assert message in err


def test_without_a_library_the_command_that_installs_it(
    latentrt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from latentrt.engines.tensorrt import flavour as tensorrt_flavour

    monkeypatch.setattr(tensorrt_flavour, "find_spec", lambda name: None)
    code, _, err = latentrt("--dry-run")
    assert code == 4
    assert flavour("tensorrt-rtx", "1.7").install in err


def test_layouts_without_the_library_that_lowers_are_refused_before_anything_is_measured(
    latentrt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnx-ir comes with latentrt, and an environment may lack it all the same."""
    from latentrt.engines.onnxruntime.lowering import files
    from latentrt.engines.onnxruntime.tuning import cpu

    monkeypatch.setattr(files, "find_spec", lambda name: None)
    monkeypatch.setattr(cpu, "_Trials", None)
    code, out, err = latentrt("--backend", "onnxruntime")
    assert (code, out) == (4, "")
    assert "there is no layout but `plain`: onnx-ir is not installed;" in err
    assert err.endswith("Install it: pip install onnx-ir\n")


def test_the_bar_moves_over_nets_and_phases(latentrt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import contextmanager

    told: list[tuple[str, int, int]] = []

    @contextmanager
    def bar(*, enabled: bool) -> Any:
        yield lambda *now: told.append(now)

    monkeypatch.setattr(sys.modules["latentrt.cli.build"], "progress_bar", bar)
    assert build_verb is not None
    assert latentrt(*QUICK)[0] == 0
    assert (told[0], told[-1]) == (("unet_time: parsing", 0, 100), ("unet_time: writing", 100, 100))


def test_the_command_starts_without_the_engines() -> None:
    # tests/cli/test_cli.py has the seconds of --help; this is what would spoil them.
    heavy = (
        "latentrt.engines.tensorrt.build",
        "latentrt.engines.store.engine_store",
        "tensorrt_rtx",
        "numpy",
    )
    code = f"import sys, latentrt.cli; raise SystemExit(any(name in sys.modules for name in {heavy}))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_layouts_of_the_cpu_are_measured(latentrt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def tune(package: Any, store: Any, progress: Any, *, nets: Any) -> tuple[Any, ...]:
        asked.append((package.root.name, *nets))
        return ()

    monkeypatch.setattr("latentrt.engines.onnxruntime.tuning.cpu.tune_package", tune)
    assert latentrt("demo", "--backend", "onnxruntime", "--nets", "unet") == (0, "", "")
    assert asked == [("package", "unet")]
    code, _, err = latentrt("demo", "--backend", "onnxruntime", "--workspace", "3")
    assert code == 2
    assert "--workspace was given with --backend onnxruntime, which measures layouts" in err


@pytest.mark.skipif(cuda_available() is None, reason="it can run here")
def test_a_backend_that_cannot_run_is_refused_before_anything_is_opened(latentrt: Any) -> None:
    code, _, err = latentrt("no such model", "--backend", "onnxruntime-cuda")
    assert code == 4
    assert "the backend onnxruntime-cuda cannot run here" in err


# ── which backend is the fastest ─────────────────────────────────────────────────────────────────────


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO's nets take a tenth of ONNX Runtime's, whose layouts take no time to measure."""
    pytest.importorskip("openvino")
    time_sleepers(monkeypatch)
    monkeypatch.setattr(hosts, "measure_hosts", partial(measure_hosts, rounds=1, opened=Opener(**FASTER)))
    monkeypatch.setattr(BackendRow, "tune_package", lambda _: lambda *_: ())


@pytest.mark.usefixtures("measured")
def test_the_fastest_backend_is_told_and_remembered(latentrt: Any) -> None:
    code, out, err = latentrt("demo", "--backend", "auto")
    lines = out.splitlines()
    assert code == 0
    assert [line.split()[0] for line in lines] == ["unet", "vae_decoder", "picture", "auto"]
    assert all("onnxruntime " in line and " ms (1.00x), openvino " in line for line in lines[:3])
    assert lines[3] == "auto takes openvino for this model from now on"
    code, out, err = latentrt("demo", "--backend", "auto", "--json")
    found = json.loads(out)
    assert (code, err, found["fastest"]) == (0, "", "openvino")
    assert [(one["net"], one["cached"]) for one in found["nets"]] == [("unet", True), ("vae_decoder", True)]
    assert found["picture"].keys() == {"onnxruntime", "openvino"}
    assert found["backends"] == {"unet": "openvino", "vae_decoder": "openvino"}


@pytest.mark.usefixtures("measured")
def test_why_a_backend_is_out_is_told(latentrt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Opener(**{**FASTER, "openvino": (0.0, 2.0)})
    monkeypatch.setattr(hosts, "measure_hosts", partial(measure_hosts, rounds=1, opened=wrong))
    out = latentrt("demo", "--backend", "auto")[1]
    assert "  openvino is out at unet: its output is " in out
    assert out.endswith("auto takes onnxruntime for this model from now on\n")


@pytest.mark.parametrize(
    "option", [["--nets", "unet"], ["--control", "edges"], ["--dry-run"], ["--profile", "64x64"]]
)
def test_options_that_a_contest_does_not_use(latentrt: Any, option: list[str]) -> None:
    code, _, err = latentrt("demo", "--backend", "auto", *option)
    assert code == 2
    assert f"{option[0]} was given with --backend auto" in err


def test_a_contest_needs_every_backend(latentrt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_library, "find_spec", lambda name: None)
    code, _, err = latentrt("demo", "--backend", "auto")
    assert code == 4
    assert "openvino is not installed" in err


def test_nothing_is_built_for_openvino(latentrt: Any) -> None:
    code, _, err = latentrt("demo", "--backend", "openvino")
    assert code == 2
    assert "there is nothing to build for openvino" in err
