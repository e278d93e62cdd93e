"""The model repository in a real Triton server on a CPU: pixels, previews, cancels, errors, lost streams."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from latentrt import Pipeline, UsageError, cli
from latentrt.benchmarks.verbs.hosts import measure_hosts
from latentrt.cli import app
from latentrt.engines.errors import PackageError, StorageError
from latentrt.engines.onnxruntime.nets import OnnxRuntimeNet
from latentrt.hosts.triton import served
from latentrt.hosts.triton.nets import config_of_net, write_nets
from latentrt.hosts.triton.repository import TritonModel, config_of, write_repository
from tests.benchmarks.stand_in_side import PACKAGE, TASK
from tests.benchmarks.test_hosts import CASE as FEW_STEPS
from tests.benchmarks.test_hosts import ONE_ROUND
from tests.hosts.environment import PYTHON, ROOT, missing
from tests.hosts.triton import Triton, triton
from tests.serve.live import open_demo

REASON = missing()
needs_triton = pytest.mark.skipif(bool(REASON), reason=REASON)
PROMPT = "a red circle on a blue background"
SMALL = {"width": 64, "height": 64, "num_inference_steps": 4}
SAMPLERS = ("euler", "euler_a", "dpmpp_2m", "ddim", "heun")


# ── what is written ────────────────────────────────────────────────────────────────────────────────


def test_the_command(tmp_path: Path) -> None:
    words = ["export-triton", "demo", "-o", str(tmp_path), "--name", "small", "--rows", "4"]
    answer = CliRunner().invoke(app, words)
    assert answer.exit_code == 0, answer.output
    config = (tmp_path / "small" / "config.pbtxt").read_text()
    for words in (
        'name: "small"',
        'backend: "python"',
        "decoupled: true",
        '"rows" value: { string_value: "4" }',
    ):
        assert words in config
    compile((tmp_path / "small" / "1" / "model.py").read_text(), "model.py", "exec")


@pytest.mark.parametrize("name", ["", "a/b", "../x", "a b", "x" * 65])
def test_names_that_triton_would_not_take(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the name"):
        write_repository(TritonModel(model="demo", name=name), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["/no/such/model"], 2, "is not here"),
        ([""], 2, "is not here"),
        (["demo", "--device", "tpu"], 2, "device is 'tpu'"),
        (["demo", "--backend", "nonsense"], 2, "backend is 'nonsense'"),
        (["demo", "--instances", "0"], 2, "instances is 0"),
        (["demo", "--rows", "0"], 2, "rows is 0"),
        (["demo", "--lora-dir", "/no/such"], 2, "is no folder"),
        (["demo", "-o", "/proc/x"], 7, "cannot be written"),
    ],
)
def test_what_no_server_could_start_with(
    words: list[str], code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = [] if "-o" in words else ["-o", str(tmp_path / "repository")]
    monkeypatch.setattr(sys, "argv", ["latentrt", "export-triton", *words, *out])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert (end.value.code, said in capfd.readouterr().err) == (code, True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("values", "words"), [([b"a", b"b"], "prompt has 2 texts"), ([b"\xff"], "prompt is not UTF-8")]
)
def test_texts_that_are_none(values: list[bytes], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        served._text("prompt", np.array(values, dtype=object))  # pyright: ignore[reportPrivateUsage]
    assert served._text("prompt", np.array(["ä".encode()], dtype=object)) == "ä"  # pyright: ignore[reportPrivateUsage]


def test_a_model_is_not_overwritten(tmp_path: Path) -> None:
    write_repository(TritonModel(model="demo"), tmp_path)
    with pytest.raises(UsageError, match="is there already"):
        write_repository(TritonModel(model="demo"), tmp_path)


def test_nets_are_models_of_their_own(tmp_path: Path) -> None:
    """What Triton's ONNX Runtime backend does with a folder: it opens `1/model.onnx`, by ONNX Runtime."""
    import onnxruntime

    answer = CliRunner().invoke(
        app, ["export-triton", "demo", "-o", str(tmp_path), "--nets", "unet, vae_decoder"]
    )
    assert answer.exit_code == 0, answer.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latentrt-unet", "latentrt-vae_decoder"]
    folder = tmp_path / "latentrt-vae_decoder"
    path = str(folder / "1" / "model.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    latent = np.random.default_rng(0).standard_normal((1, 4, 8, 8), np.float32)
    image, mean = session.run(["image", "mean"], {"latent": latent})
    with OnnxRuntimeNet(PACKAGE, "vae_decoder") as net:
        wanted = net(latent=latent)
    np.testing.assert_array_equal(image, wanted["image"])
    np.testing.assert_array_equal(mean, wanted["mean"])
    config = (folder / "config.pbtxt").read_text()
    assert 'input [ { name: "latent" data_type: TYPE_FP32 dims: [ -1, 4, -1, -1 ] } ]' in config
    assert 'platform: "onnxruntime_onnx"' in config
    assert (folder / "1" / "weights.safetensors").stat().st_nlink == 1, "the onnx library refuses links"


def test_nets_that_are_none(tmp_path: Path) -> None:
    model = TritonModel(model="demo")
    with pytest.raises(PackageError, match="has no net 'refiner'"):
        write_nets(PACKAGE, ["refiner"], model, tmp_path)
    elsewhere = replace(PACKAGE, elsewhere={"unet/weights.safetensors": cast(Any, None)})
    with pytest.raises(UsageError, match="is a checkpoint"):
        write_nets(elsewhere, ["unet"], model, tmp_path)
    write_nets(PACKAGE, ["step"], model, tmp_path)
    with pytest.raises(UsageError, match="is there already"):
        write_nets(PACKAGE, ["step"], model, tmp_path)
    with pytest.raises(StorageError, match="cannot be written"):
        write_nets(PACKAGE, ["step"], model, Path("/proc/x"))


@needs_triton
def test_configs_of_nets_are_tritons(tmp_path: Path) -> None:
    program = """
import sys
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2
found = text_format.Parse(sys.stdin.read(), model_config_pb2.ModelConfig())
print(found.platform, len(found.input), len(found.output), found.input[0].data_type)
"""
    for net, file in PACKAGE.manifest.nets.items():
        config = config_of_net(f"latentrt-{net}", file, TritonModel(model="demo", device="cuda"))
        done = subprocess.run([PYTHON, "-c", program], input=config, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        spec = file.spec
        assert done.stdout.split()[:3] == ["onnxruntime_onnx", str(len(spec.inputs)), str(len(spec.outputs))]


@needs_triton
@pytest.mark.parametrize(
    "model",
    [
        TritonModel(model="demo"),
        TritonModel(
            model='a "quoted" \\ näme', device="cuda", backend="tensorrt", rows=8, count=2, loras=Path("/l")
        ),
    ],
)
def test_the_config_is_one_of_tritons(model: TritonModel) -> None:
    """Read by the protobuf of NVIDIA's client, which refuses unknown fields and values."""
    program = """
import sys, json
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2
found = text_format.Parse(sys.stdin.read(), model_config_pb2.ModelConfig())
parameters = {name: value.string_value for name, value in found.parameters.items()}
print(json.dumps([found.backend, parameters, found.instance_group[0].count, found.instance_group[0].kind]))
"""
    done = subprocess.run([PYTHON, "-c", program], input=config_of(model), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    backend, parameters, count, kind = json.loads(done.stdout)
    assert (backend, parameters["model"], count) == ("python", model.model, model.count)
    assert kind == (1 if model.device == "cuda" else 2)


# ── a server ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    if REASON:
        pytest.skip(REASON)
    folder = tmp_path_factory.mktemp("triton")
    write_repository(TritonModel(model="demo", rows=8), folder / "models")
    with triton(folder / "models", folder) as server:
        yield server


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with open_demo() as opened:
        yield opened


def alone(pipe: Pipeline, request: dict[str, Any]) -> list[str]:
    """The hashes of the pictures that a pipeline draws for a request of Triton's."""
    values = {**request.get("fields", {}), **request.get("parameters", {})}
    values.pop("preview", None)
    for name in ("image", "mask_image"):
        if name in request:
            values[name] = np.asarray(request[name], np.uint8)
    if "negative_prompt" in request:
        values["negative_prompt"] = request["negative_prompt"]
    images = pipe(request["prompt"], output_type="np", **values).images
    return [hashlib.sha256(np.ascontiguousarray(one).tobytes()).hexdigest() for one in images]


def test_fifty_at_once_have_the_pixels_of_a_pipeline(at: Triton, pipe: Pipeline) -> None:
    requests: list[dict[str, Any]] = [
        {
            "prompt": PROMPT if number % 3 else "a green star on a white background",
            "fields": {**SMALL, "sampler": SAMPLERS[number % 5], "guidance_scale": (1.0, 4.0)[number % 2]},
            "parameters": {"seed": number},
        }
        for number in range(50)
    ]
    requests[0]["negative_prompt"] = "a small yellow star"
    requests[2]["fields"]["num_images_per_prompt"] = 3
    found = at.client("draw", stdin=requests)
    for number, (request, one) in enumerate(zip(requests, found, strict=True)):
        assert one.get("pictures") == alone(pipe, request), (number, one)


def test_a_picture_and_a_mask(at: Triton, pipe: Pipeline) -> None:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (64, 64, 3)).tolist()
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 16:48] = 255
    fields = {**SMALL, "seed": 1}
    request = {"prompt": PROMPT, "fields": fields, "image": pixels, "mask_image": mask.tolist()}
    (found,) = at.client("draw", stdin=[request])
    assert found["pictures"] == alone(pipe, request), found


@pytest.mark.parametrize("shape", [(64, 64, 2), (0, 64, 3), (64, 64, 5)])
def test_arrays_that_are_no_pictures(at: Triton, shape: tuple[int, ...]) -> None:
    request = {"prompt": PROMPT, "fields": SMALL, "image": np.zeros(shape).tolist(), "shape": shape}
    (found,) = at.client("draw", stdin=[request])
    assert f"image is an array of {shape}" in found["error"]


def test_a_grey_picture(at: Triton, pipe: Pipeline) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (64, 64, 1))
    request = {"prompt": PROMPT, "fields": {**SMALL, "seed": 1}, "image": grey.tolist()}
    (found,) = at.client("draw", stdin=[request])
    assert found["pictures"] == alone(pipe, {**request, "image": grey[..., 0].tolist()})


def test_previews_come_before_the_picture(at: Triton) -> None:
    fields = {**SMALL, "num_inference_steps": 40, "seed": 1, "preview": {"every": 1}}
    grpc, http = at.client("draw", stdin=[{"prompt": PROMPT, "fields": fields}] * 2)
    for found in (grpc, http):
        assert found["kinds"][-1] == "image"
        assert found["kinds"].count("step") > 2, "events of steps are at most so many a second"
        assert "preview" in found["kinds"][: found["kinds"].index("image")]
    assert grpc["pictures"] == http["pictures"]


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"prompt": PROMPT, "fields": {**SMALL, "sampler": "fast"}}, "fast"),
        ({"prompt": PROMPT, "fields": {**SMALL, "width": 60}}, "width is 60"),
        ({"prompt": PROMPT, "fields": {**SMALL, "stepz": 4}}, "there is no parameter 'stepz'"),
        ({"prompt": PROMPT, "fields": [1]}, "fields is no object"),
        ({"prompt": PROMPT, "fields": {**SMALL, "prompt": "a star"}}, "prompt is sent twice"),
        ({"prompt": PROMPT, "fields": {**SMALL, "seed": 1}, "parameters": {"seed": 2}}, "seed is sent twice"),
        ({"prompt": PROMPT, "fields": {**SMALL, "loras": ["/etc/x.safetensors"]}}, "x.safetensors"),
        ({"prompt": PROMPT, "written": "{nope"}, "fields is no object"),
        ({"prompt": PROMPT, "written": "[" * 3000}, "fields is no object"),
    ],
)
def test_what_is_wrong_is_an_error_with_its_reason(at: Triton, request_: dict[str, Any], words: str) -> None:
    grpc, http = at.client("draw", stdin=[request_, request_])
    for found in (grpc, http):
        assert words in found["error"]
        assert "/etc" not in found["error"]


def test_an_id_is_the_requests_own(at: Triton, pipe: Pipeline) -> None:
    """As in Triton's `generate` extension, whose server hands it over as a parameter."""
    request: dict[str, Any] = {"prompt": PROMPT, "fields": {**SMALL, "seed": 1}}
    found = at.client("draw", stdin=[{**request, "parameters": {"id": "mine"}}] * 2)
    assert [one.get("pictures") for one in found] == [alone(pipe, request)] * 2, found


def _run(name: str, *words: str | Path) -> str:
    """What an example prints, as it is said to be called."""
    program = [PYTHON, ROOT / "examples" / f"{name}.py", *words]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300, cwd="/")
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_examples_of_clients(at: Triton, pipe: Pipeline, tmp_path: Path) -> None:
    fields = [f"{name}={value}" for name, value in {**SMALL, "num_inference_steps": 20, "seed": 7}.items()]
    one, other = tmp_path / "http.png", tmp_path / "grpc.png"
    told = [
        _run("triton_http", f"127.0.0.1:{at.http}", PROMPT, one, *fields),
        _run("triton_grpc", f"127.0.0.1:{at.grpc}", PROMPT, other, *fields),
    ]
    assert all(re.match(r"step \d+ of 20\n", text) for text in told), told
    wanted = pipe(PROMPT, width=64, height=64, num_inference_steps=20, seed=7)
    assert one.read_bytes() == wanted.to_bytes("png")
    np.testing.assert_array_equal(np.asarray(Image.open(other)), np.asarray(wanted.images[0]))


@pytest.mark.parametrize("name", ["triton_http", "triton_grpc"])
def test_examples_say_what_is_wrong(at: Triton, name: str) -> None:
    address = f"127.0.0.1:{at.http if name == 'triton_http' else at.grpc}"
    for field, words in (("width=60", "width is 60"), ("stepz=4", "there is no parameter 'stepz'")):
        with pytest.raises(AssertionError, match=words):
            _run(name, address, PROMPT, "none.png", field)


def test_who_leaves_is_not_drawn_for(at: Triton, pipe: Pipeline) -> None:
    """Four times ten pictures of 150 steps: a request behind them waits for a small part of their time."""
    began = time.monotonic()
    pipe(PROMPT, **{**SMALL, "num_inference_steps": 150})
    whole = 40 * (time.monotonic() - began)
    long = {"prompt": PROMPT, "fields": {**SMALL, "num_inference_steps": 150, "num_images_per_prompt": 10}}
    began = time.monotonic()
    assert at.client("leave", stdin=[long] * 4) == ["step"] * 4
    request = {"prompt": PROMPT, "fields": {**SMALL, "seed": 5}}
    (found,) = at.client("draw", stdin=[request])
    assert found["pictures"] == alone(pipe, request)
    assert time.monotonic() - began < whole / 4
    assert at.metric("nv_inference_pending_request_count") == 0


def test_what_it_costs_is_measured(at: Triton) -> None:
    servers = {"Triton": f"http://127.0.0.1:{at.http}"}
    found = measure_hosts(PACKAGE, TASK, FEW_STEPS, servers=servers, rules=ONE_ROUND)
    assert [(row.side, row.status) for row in found.rows] == [("latentrt", "ok"), ("Triton", "ok")] * 2


def test_two_hundred_dropped_streams(at: Triton, pipe: Pipeline) -> None:
    dropped = [{"prompt": PROMPT, "seed": number} for number in range(200)]
    assert at.client("drop", stdin=dropped) == 200
    request = {"prompt": PROMPT, "fields": {**SMALL, "seed": 6}}
    found = at.client("draw", stdin=[request] * 4)
    assert [one["pictures"] for one in found] == [alone(pipe, request)] * 4
    assert at.process.poll() is None
