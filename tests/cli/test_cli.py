"""The command line, as a person or a script calls it."""

import json
import logging
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from latentrt import cli
from latentrt.engines.installed import install_command
from latentrt.export import export as exporter
from latentrt.runtime.model import SHIPPED
from tests.checkpoints.odd_files import ODD_FILES

PROMPT = "a red circle on a blue background"
QUICK = ["--steps", "2", "--seed", "7", "--threads", "1"]


@pytest.fixture
def latentrt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """Call the command in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["latentrt", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call


def test_generate_writes_a_picture_and_says_where_and_how_long(latentrt: Any, tmp_path: Path) -> None:
    code, out, err = latentrt("generate", PROMPT, *QUICK)
    assert code == 0
    assert out == "a-red-circle-on-a-blue-background-7.png  (128x128, seed 7)\n"
    for stage in ("open", "text encoder", "unet", "vae decoder", "save", "total"):
        assert f"{stage} " in err
    with Image.open(tmp_path / "a-red-circle-on-a-blue-background-7.png") as picture:
        assert picture.size == (128, 128)


def test_generate_json_is_the_record(latentrt: Any) -> None:
    code, out, err = latentrt(
        "generate",
        PROMPT,
        *QUICK,
        "-o",
        "x.png",
        "--sampler",
        "Euler a",
        "-n",
        "star",
        "--cfg-scale",
        "3",
        "--json",
    )
    assert (code, err) == (0, "")
    picture = json.loads(out)["pictures"][0]
    assert picture["path"] == "x.png"
    assert (picture["seed"], picture["guidance_scale"], picture["negative_prompt"]) == (7, 3.0, "star")
    assert picture["sampler"]["name"] == "euler_a"


def test_generate_count_numbers_the_files(latentrt: Any, tmp_path: Path) -> None:
    assert latentrt("generate", PROMPT, *QUICK, "-b", "2", "-W", "64", "-H", "64", "-o", "x.png")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x-7.png", "x-8.png"]


def test_every_option_reaches_the_request(latentrt: Any) -> None:
    options = ["--rng", "torch-cuda", "--eta", "0.5", "--guidance-rescale", "0.7", "--backend", "onnxruntime"]
    code, out, _ = latentrt("generate", PROMPT, *QUICK, *options, "--sampler", "ddim", "-m", "demo", "--json")
    assert code == 0
    picture = json.loads(out)["pictures"][0]
    assert (picture["rng"], picture["guidance_rescale"]) == ("torch-cuda", 0.7)
    assert picture["sampler"]["eta"] == 0.5


def test_metadata_reads_what_generate_wrote(latentrt: Any) -> None:
    latentrt("generate", PROMPT, *QUICK, "-o", "x.png")
    code, out, _ = latentrt("metadata", "x.png")
    assert code == 0
    assert out.startswith(PROMPT)
    assert "Seed: 7" in out
    found = json.loads(latentrt("metadata", "x.png", "--json")[1])
    assert found["record"]["seed"] == 7
    assert found["parameters"]["Steps"] == "2"


def test_no_metadata(latentrt: Any) -> None:
    latentrt("generate", PROMPT, *QUICK, "-o", "x.png", "--no-metadata")
    assert json.loads(latentrt("metadata", "x.png", "--json")[1]) == {"parameters": None, "record": None}
    assert latentrt("metadata", "x.png")[1] == "no parameters\n"


def test_inspect_package(latentrt: Any) -> None:
    code, out, _ = latentrt("inspect", "--verify")
    assert code == 0
    for net in ("text_encoder", "unet_context", "unet_time", "unet", "vae_decoder", "unet_whole"):
        assert f"\n{net}  " in out
    assert json.loads(latentrt("inspect", "demo", "--json")[1])["latent_channels"] == 4


@pytest.mark.parametrize("model", ["demo", str(SHIPPED["demo"].parent / "checkpoint")])
def test_inspect_prints_published_steps(latentrt: Any, model: str) -> None:
    _, out, _ = latentrt("inspect", model, "--sampler", "dpmpp_2m_ays", "--steps", "10", "--json")
    assert json.loads(out)["t"] == [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]


def test_inspect_says_what_a_file_is(latentrt: Any, tmp_path: Path) -> None:
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    lora = {f"{name}.lora_down.weight": np.ones((4, 768), np.float16), f"{name}.alpha": np.ones(())}
    save_file(lora, tmp_path / "style.safetensors")
    code, out, _ = latentrt("inspect", str(tmp_path / "style.safetensors"))
    assert code == 0
    assert "a LoRA (kohya's names) for Stable Diffusion 1.x" in out
    assert "2 tensors (1 in F16, 1 in F64)" in out
    assert "rank 4" in out
    assert "1 module, alpha 1" in out
    assert f"--lora {tmp_path / 'style.safetensors'}" in out
    found = json.loads(latentrt("inspect", str(tmp_path / "style.safetensors"), "--json")[1])
    assert (found["kind"], found["family"], found["opens"]) == ("lora", "sd1", False)
    save_file({**lora, f"{name}.alpha": np.full((), 1e9)}, tmp_path / "large.safetensors")
    _, out, _ = latentrt("inspect", str(tmp_path / "large.safetensors"))
    assert f"cannot be used: {tmp_path / 'large.safetensors'}: {name} has an alpha of 1e+09" in out
    assert "expected at most 1e+06 times the rank" in out
    (tmp_path / "large.safetensors").unlink()
    save_file({"emb_params": np.ones((4, 768), np.float16)}, tmp_path / "face.safetensors")
    _, out, _ = latentrt("inspect", str(tmp_path / "face.safetensors"))
    assert "a textual inversion for Stable Diffusion 1.x" in out
    assert f"latentrt generate embedding:NAME -m CHECKPOINT --embd-dir {tmp_path}" in out
    assert "emb_params: 4 vectors of 768" in out
    save_file({"<long>": np.ones((76, 96), np.float16)}, tmp_path / "face.safetensors")
    _, out, _ = latentrt("inspect", str(tmp_path / "face.safetensors"))
    assert "a textual inversion" in out
    assert "has 76 vectors" in out
    (tmp_path / "face.safetensors").unlink()
    assert "a folder of files (style.safetensors)" in latentrt("inspect", str(tmp_path))[1]


@pytest.mark.parametrize("nothing", ["nowhere.safetensors", "org/name"])
def test_nothing_is_fetched_to_be_looked_at(latentrt: Any, nothing: str) -> None:
    code, _, err = latentrt("inspect", nothing)
    assert code == 3
    assert f"{nothing} does not exist here" in err


def test_inspect_says_what_a_checkpoint_has(latentrt: Any, tmp_path: Path) -> None:
    ODD_FILES["inpainting 2.x"].make(tmp_path)
    code, out, _ = latentrt("inspect", str(tmp_path / "model.safetensors"))
    assert code == 0
    for line in (
        "a checkpoint of Stable Diffusion 2.x, in one file",
        "its UNet predicts epsilon, by assumption",
        "9 input channels (inpainting)",
        "fits: embedding for 64 numbers in text_encoder",
        "tensors that are not used: ",
        "cannot be opened: ",
        "fits no graph that is shipped: ",
        "latentrt export ",
    ):
        assert line in out
    found = json.loads(latentrt("inspect", str(tmp_path / "model.safetensors"), "--json")[1])
    assert (found["opens"], found["family"]) == (False, "sd2")
    (tmp_path / "half").mkdir()
    ODD_FILES["no autoencoder"].make(tmp_path / "half")
    out = latentrt("inspect", str(tmp_path / "half" / "model.safetensors"))[1]
    assert "missing: vae" in out
    assert "cannot be opened: " in out


def test_inspect_sampler_prints_its_table(latentrt: Any) -> None:
    code, out, _ = latentrt("inspect", "--sampler", "dpmpp_2m", "--steps", "20")
    assert code == 0
    assert len(out.splitlines()) >= 21
    table = json.loads(latentrt("inspect", "--sampler", "dpmpp_2m", "--steps", "8", "--json")[1])
    assert len(table["t"]) == 8


def test_inspect_samplers(latentrt: Any) -> None:
    names = json.loads(latentrt("inspect", "--samplers", "--json")[1])
    assert {"ddim", "euler_a", "dpmpp_2m", "unipc", "lcm"} <= set(names)
    assert all(name in latentrt("inspect", "--samplers")[1] for name in names)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["generate", "x", "--sampler", "eulr"], 2, "eulr"),
        (["generate", "x", "--width", "33"], 2, "width is 33; expected a multiple of 8"),
        (["generate", "x", "--backend", "none"], 4, "unknown backend 'none'"),
        (["generate", "x", "--model", "nowhere"], 3, "nowhere does not exist"),
        (["generate", "x", "--steps", "1", "-o", "no/such/folder/x.png"], 7, "no/such/folder"),
        (["generate", "x", "--steps", "1", "-o", "x.tiff"], 2, "tiff"),
        (["generate", "x", "--no-such-option"], 2, "No such option"),
        (["generate"], 2, "no prompt"),
        (["export"], 2, "Missing argument"),
        (["inspect", "nowhere"], 3, "nowhere does not exist"),
        (["metadata", "nowhere.png"], 2, "nowhere.png"),
        (["export", "nowhere", "-o", "p"], 3, "nowhere"),
        (["export", "nowhere", "-o", "p", "--dtype", "fp8"], 2, "fp8"),
    ],
)
def test_errors_have_a_message_and_an_exit_code(
    latentrt: Any, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    found, out, err = latentrt(*arguments)
    assert (found, out) == (code, "")
    assert message in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_errors_as_json(latentrt: Any) -> None:
    code, out, _ = latentrt("generate", "x", "--sampler", "eulr", "--json")
    error = json.loads(out)["error"]
    assert code == error["exit_code"] == 2
    assert error["type"] == "SamplerError"
    assert all(error[part] for part in ("found", "expected", "fix"))


@pytest.mark.parametrize(
    ("words", "found", "command"),
    [
        (["generate", "x", "--stepz", "2"], "No such option", "latentrt generate --help"),
        (["generate"], "no prompt", "latentrt generate --help"),
        (["generate", "x", "--threads", "many"], "Invalid value", "latentrt generate --help"),
        (["export", "x", "-o", "p", "--dtype", "fp8"], "Invalid value", "latentrt export --help"),
        (["export", "x"], "Missing option", "latentrt export --help"),
        (["build", "--workspace", "x"], "Invalid value", "latentrt build --help"),
        (["inspect", "a", "b"], "unexpected extra argument", "latentrt inspect --help"),
        (["metadata"], "Missing argument", "latentrt metadata --help"),
        (["convert"], "Missing argument", "latentrt convert --help"),
        (["cache", "prune", "--older-than", "-1"], "Invalid value", "latentrt cache prune --help"),
        (["cache", "nothing"], "No such command", "latentrt cache --help"),
        (["bench", "latency", "--threads", "0"], "Invalid value", "latentrt bench latency --help"),
        (["bench", "compare"], "Missing argument", "latentrt bench compare --help"),
        (["nothing"], "No such command", "latentrt --help"),
    ],
)
def test_wrong_words_as_json(latentrt: Any, words: list[str], found: str, command: str) -> None:
    code, out, err = latentrt(*words, "--json")
    error = json.loads(out)["error"]
    assert (code, error["exit_code"], error["type"], err) == (2, 2, "UsageError", "")
    assert found.lower() in error["found"].lower()
    assert error["expected"]
    assert error["fix"].endswith(f": {command}")
    assert latentrt(*words)[0] == 2
    assert latentrt(*command.split()[1:])[0] == 0, "the advice runs as it is printed"


def test_json_behind_two_dashes_is_a_prompt(latentrt: Any) -> None:
    code, out, err = latentrt("generate", "--sampler", "eulr", "--", "--json")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: ")


def test_what_was_raised_is_printed_behind_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A server tells its callers that the log has the reason."""
    with cli._remarks(logging.WARNING):  # pyright: ignore[reportPrivateUsage]
        try:
            raise ZeroDivisionError("of a picture")
        except ZeroDivisionError:
            logging.getLogger("latentrt.serve").exception("job %s", "7")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "latentrt: job 7"
    assert lines[-1] == "ZeroDivisionError: of a picture"


def test_what_the_library_logs_is_printed(latentrt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["generate", "red " * 80 + "star", *QUICK, "--prompt-syntax", "plain", "-o", "x.png"]
    for asked in ([], ["--json"]):
        code, _, err = latentrt(*words, *asked)
        assert code == 0
        assert len(re.findall("^latentrt: the prompt .* is too long; dropped: .*star", err, re.M)) == 1
    assert all(type(one) is logging.NullHandler for one in logging.getLogger("latentrt").handlers)


def test_tracing_without_torch_names_the_extra(latentrt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "find_spec", lambda name: None if name == "torch" else name)
    checkpoint = SHIPPED["demo"].parent / "checkpoint"
    code, _, err = latentrt("export", str(checkpoint), "-o", "package", "--trace", "--dtype", "fp32")
    assert code == 4
    assert "tracing needs torch;" in err
    assert err.endswith(f"{install_command('export')}\n")


@pytest.mark.parametrize("verb", [[], ["generate"], ["export"], ["inspect"], ["metadata"]])
def test_help_imports_nothing_heavy(verb: list[str]) -> None:
    code = (
        "import sys; sys.argv = ['latentrt', *sys.argv[1:], '--help']\n"
        "from latentrt import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'torch', 'PIL', 'onnxruntime', 'tokenizers', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code, *verb], check=True, stdout=subprocess.DEVNULL, timeout=60)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("after", [0.1, 0.5, 1.5], ids=["importing", "opening", "drawing"])
def test_a_signal_ends_with_exit_code_6_and_leaves_no_picture(
    name: str, after: float, tmp_path: Path
) -> None:
    code = "from latentrt import cli, runtime; print('ready', flush=True); cli.main()"
    running = subprocess.Popen(
        [sys.executable, "-c", code, "generate", PROMPT, "--steps", "900", "--threads", "1"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stdout is not None
    assert running.stdout.readline() == "ready\n"
    time.sleep(after)  # the latest are into the steps, of which there are minutes
    running.send_signal(getattr(signal, name))
    _, said = running.communicate(timeout=60)
    assert running.returncode == 6
    assert (
        said.splitlines(keepends=True)[-1]
        == f"error: stopped by {name}; expected to be left to finish. Run it again to start over.\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", ["latentrt", "latentrt.cli"])
def test_the_version(module: str) -> None:
    command = [sys.executable, "-m", module, "--version"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"latentrt {version('latentrt')}\n"
