"""Every option of `latentrt generate`: what it becomes, and that none is left out here."""

import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import typer
from PIL import Image
from safetensors.numpy import save_file

from latentrt import Control, ImagePrompt, UsageError, cli, redraw
from latentrt.cli.generate import generate
from latentrt.engines.errors import StorageError
from latentrt.runtime.model import ADAPTERS, CONTROLS, CheckpointOptions
from latentrt.runtime.pictures.write import read_metadata
from latentrt.runtime.pipeline import Pipeline

FAST = ["--steps", "2", "--seed", "3", "--threads", "1"]

# Option -> the words given, the parameter that the pipeline gets, and its value.
PARAMETERS: dict[str, tuple[list[str], str, Any]] = {
    "--negative-prompt": (["square"], "negative_prompt", "square"),
    "--prompt-2": (["b"], "prompt_2", "b"),
    "--negative-prompt-2": (["c"], "negative_prompt_2", "c"),
    "--prompt-syntax": (["comfyui"], "prompt_syntax", "comfyui"),
    "--clip-skip": (["1"], "clip_skip", 1),
    "--height": (["64"], "height", 64),
    "--width": (["72"], "width", 72),
    "--steps": (["7"], "num_inference_steps", 7),
    "--timesteps": (["900,500.5"], "timesteps", [900.0, 500.5]),
    "--sigmas": (["14.6,0"], "sigmas", [14.6, 0.0]),
    "--table": (["own.json"], "table", "own.json"),
    "--guidance-scale": (["4.5"], "guidance_scale", 4.5),
    "--guidance-interval": (["0.25,0.75"], "guidance_interval", [0.25, 0.75]),
    "--guidance-rescale": (["0.5"], "guidance_rescale", 0.5),
    "--sampler": (["Euler a"], "sampler", "Euler a"),
    "--eta": (["0.25"], "eta", 0.25),
    "--seed": (["3,-4"], "seed", [3, -4]),
    "--rng": (["torch-cuda"], "rng", "torch-cuda"),
    "--count": (["2"], "num_images_per_prompt", 2),
    "--latents": (["noise.npy"], "latents", "noise.npy"),
    "--image": (["start.png"], "image", "start.png"),
    "--mask": (["mask.png"], "mask_image", "mask.png"),
    "--strength": (["0.4"], "strength", 0.4),
    "--padding-mask-crop": (["16"], "padding_mask_crop", 16),
    "--mask-blur": (["2.5"], "mask_blur", 2.5),
    "--resize-mode": (["crop"], "resize_mode", "crop"),
    "--upscale": (["1.5"], "upscale", 1.5),
    "--draw-tile": (["96"], "draw_tile", 96),
    "--draw-overlap": (["24"], "draw_overlap", 24),
    "--noise-level": (["20"], "noise_level", 20),
    "--denoising-start": (["0.8"], "denoising_start", 0.8),
    "--denoising-end": (["0.9"], "denoising_end", 0.9),
    "--original-size": (["640x512"], "original_size", (512, 640)),
    "--crop": (["8,16"], "crops_coords_top_left", (16, 8)),
    "--target-size": (["320x512"], "target_size", (512, 320)),
    "--negative-original-size": (["64x32"], "negative_original_size", (32, 64)),
    "--negative-crop": (["1,2"], "negative_crops_coords_top_left", (2, 1)),
    "--negative-target-size": (["96x32"], "negative_target_size", (32, 96)),
    "--aesthetic-score": (["7"], "aesthetic_score", 7.0),
    "--negative-aesthetic-score": (["1"], "negative_aesthetic_score", 1.0),
    "--tile": (["128"], "tile", 128),
    "--lora": (
        ["a:0.5", "--lora", "b", "--lora", "c:1:d:-1.5:0.25"],
        "loras",
        [("a", 0.5), "b", ("c:1:d", {"unet": -1.5, "text_encoder": 0.25, "text_encoder_2": 0.25})],
    ),
}
# Those of the command itself; the tests below are about them.
OWN = {
    "--output", "--model", "--from", "--refiner", "--refiner-at", "--grid", "--preview", "--backend",
    "--device", "--threads", "--no-metadata", "--json", "--embd-dir",
    "--lora-dir", "--lora-lenient", "--fuse-lora", "--few-steps",
    "--dtype",
    "--vae",
    "--tiny-vae",
    "--prediction-type",
    "--control-net", "--control-image", "--control-strength", "--control-start", "--control-end",
    "--control-mode", "--control-preparation", "--control-resize", "--control-mask", "--canny",
    "--image-encoder", "--ip-adapter", "--ip-adapter-image", "--ip-adapter-strength",
    "--ip-adapter-start", "--ip-adapter-end", "--ip-adapter-mask",
    "--control-type",
}  # fmt: skip


class Heard(BaseException):
    """What the pipeline was called with."""


class Listener:
    """In place of a pipeline: remembers how it was opened, and raises what it is called with."""

    opened: ClassVar[list[tuple[Any, dict[str, Any]]]] = []

    @classmethod
    def open(cls, model: str, **options: Any) -> "Listener":
        cls.opened.append((model, options))
        return cls()

    def load_control(self, path: Any, image_encoder: Any = None) -> str:
        return f"name of {path}" + (f" seen through {image_encoder}" if image_encoder else "")

    def __enter__(self) -> "Listener":
        return self

    def __exit__(self, *_: object) -> None: ...

    def __call__(self, prompts: list[str], **parameters: Any) -> Any:
        raise Heard(prompts, parameters)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    np.save("noise.npy", np.zeros((1, 4, 16, 16), np.float32))
    whole = Path("noise.npy").read_bytes()
    Path("lies.npy").write_bytes(whole.replace(b"(1, 4, 16, 16)", b"(9999999999,) "))
    Path("cut.npy").write_bytes(whole[:40])
    Path("zip.npy").write_bytes(b"PK\x03\x04garbage")
    shades = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    Image.fromarray(shades).save("start.png")
    mask = np.zeros((128, 128), np.uint8)
    mask[32:96, 32:96] = 255
    Image.fromarray(mask).save("mask.png")
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """The command line, in this process."""
    monkeypatch.setattr(sys, "argv", ["latentrt", "generate", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code


def heard(monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[list[str], dict[str, Any]]:
    monkeypatch.setattr("latentrt.runtime.pipeline.Pipeline", Listener)
    Listener.opened.clear()
    with pytest.raises(Heard) as caught:
        run(monkeypatch, *words)
    return caught.value.args  # pyright: ignore


def test_no_option_is_left_out() -> None:
    app = typer.Typer(add_completion=False)
    app.command()(generate)
    command = typer.main.get_command(app)
    options = {param.opts[0] for param in command.params if param.param_type_name == "option"}
    assert options - {"--help"} == set(PARAMETERS) | OWN


def test_every_option_is_a_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    """All on one command line, each with a value that no other of its type has; then none."""
    always = {"output_type": "pil", "callback_on_step_end": None}
    words = [word for option, (values, _, _) in PARAMETERS.items() for word in (option, *values)]
    prompts, parameters = heard(monkeypatch, "a", "b", *words)
    assert prompts == ["a", "b"]
    assert parameters.pop("latents").shape == (1, 4, 16, 16)
    wanted = {name: value for _, name, value in PARAMETERS.values() if name != "latents"}
    assert parameters == {**wanted, **always}
    assert heard(monkeypatch, "a") == (["a"], always), "nothing else is said"


def test_controls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each option once for all nets, or once for each."""
    nets = ["a", "--control-net", "edges", "--control-net", "org/depth"]
    words = ["--control-image", "start.png", "--control-strength", "0.5", "--control-strength", "0.25"]
    shares = ["--control-start", "0.1", "--control-end", "0.7", "--control-mode", "guess"]
    made = ["--control-preparation", "canny", "--control-preparation", "none"]
    _, parameters = heard(monkeypatch, *nets, *words, *shares, "--control-resize", "pad", *made)
    both = {"image": "start.png", "start": 0.1, "end": 0.7, "mode": "guess", "resize_mode": "pad"}
    assert parameters["controls"] == [
        Control(model="name of edges", strength=0.5, preparation="canny", **both),
        Control(model="name of org/depth", strength=0.25, **both),
    ]
    _, parameters = heard(monkeypatch, *nets[:3], *words[:2], "--canny")
    assert parameters["controls"] == [Control(model="name of edges", image="start.png", preparation="canny")]
    masked = [
        "--control-mask",
        "mask.png",
        "--control-preparation",
        "inpaint",
        "--control-image",
        "start.png",
    ]
    _, parameters = heard(monkeypatch, "a", "--control-net", "edges", *masked)
    assert parameters["controls"] == [
        Control(model="name of edges", image="start.png", mask_image="mask.png", preparation="inpaint")
    ]
    pictures = ["--control-image", "a.png", "--control-image", "b.png"]
    types = ["--control-type", "depth", "--control-type", "canny"]
    _, parameters = heard(monkeypatch, "a", *["--control-net", "union"] * 2, *pictures, *types)
    assert parameters["controls"] == [
        Control(model="name of union", image="a.png", control_type="depth"),
        Control(model="name of union", image="b.png", control_type="canny"),
    ]


def test_image_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """One adapter sees all pictures; of several each has its own."""
    pictures = ["--ip-adapter-image", "start.png", "--ip-adapter-image", "mask.png"]
    words = [*pictures, "--ip-adapter-strength", "0.6", "--ip-adapter-end", "0.5"]
    one = ["a", "--ip-adapter", "plus", "--image-encoder", "seer", "--t2i-adapter", "pose"]
    _, parameters = heard(monkeypatch, *one, *words, "--control-image", "start.png")
    both = {"strength": 0.6, "end": 0.5}
    assert parameters["controls"] == [
        Control(model="name of pose", image="start.png"),
        ImagePrompt(model="name of plus seen through seer", image=["start.png", "mask.png"], **both),
    ]
    two = ["a", "--ip-adapter", "plus", "--ip-adapter", "face", "--ip-adapter-mask", "mask.png"]
    _, parameters = heard(monkeypatch, *two, *words)
    assert parameters["controls"] == [
        ImagePrompt(model="name of plus", image="start.png", mask_image="mask.png", **both),
        ImagePrompt(model="name of face", image="mask.png", mask_image="mask.png", **both),
    ]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--control-image", "start.png"], "--control-image without --control-net"),
        (["--canny"], "--canny without --control-net"),
        (
            ["--control-net", "a", "--control-image", "b", "--canny", "--control-preparation", "none"],
            "--canny with --control-preparation",
        ),
        (
            [*["--control-net", "a", "--control-image", "b"] * 2, "--canny"],
            "--canny with 2 of --control-net",
        ),
        (["--control-net", "a"], "--control-net without --control-image"),
        (
            ["--control-net", "a", *["--control-image", "start.png"] * 2],
            "--control-image is given 2 times for 1 of --control-net",
        ),
        (["--ip-adapter-strength", "1"], "--ip-adapter-strength without --ip-adapter"),
        (["--ip-adapter", "a"], "--ip-adapter without --ip-adapter-image"),
        (
            ["--ip-adapter", "a", "--ip-adapter-image", "b", *["--ip-adapter-end", "1"] * 2],
            "--ip-adapter-end is given 2 times for 1 of --ip-adapter",
        ),
    ],
)
def test_controls_that_lack_something(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], error: str
) -> None:
    monkeypatch.setattr("latentrt.runtime.pipeline.Pipeline", Listener)
    monkeypatch.setattr(sys, "argv", ["latentrt", "generate", "a", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert (end.value.code, error in capsys.readouterr().err) == (2, True)


def test_how_the_pipeline_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["-m", "base", "--refiner", "other", "--backend", "tensorrt", "--device", "cuda:1"]
    checkpoint = ["--dtype", "fp16", "--vae", "v", "--tiny-vae", "t", "--prediction-type", "epsilon"]
    checkpoint += ["--fuse-lora", "fast.safetensors:0.5", "--fuse-lora", "b", "--few-steps", "lcm"]
    more = ["--threads", "3", "--refiner-at", "0.6", "--embd-dir", "words", "--lora-dir", "styles"]
    more += ["--lora-lenient"]
    _, parameters = heard(monkeypatch, "a", *words, *more, *checkpoint)
    options = {
        "backend": "tensorrt",
        "device": "cuda:1",
        "threads": 3,
        "loras": Path("styles"),
        "embeddings": Path("words"),
        "allow_unused": True,
    }
    told = [{name: given.pop(name) for name in ("progress", "note")} for _, given in Listener.opened]
    assert all(callable(function) for each in told for function in each.values())
    first = CheckpointOptions(
        dtype="fp16",
        vae=Path("v"),
        tiny_vae=Path("t"),
        prediction_type="epsilon",
        fused=[("fast.safetensors", 0.5), "b"],
        few_steps="lcm",
    )
    assert Listener.opened == [("base", {**options, "checkpoint": first}), ("other", options)]
    assert (parameters["denoising_end"], parameters["output_type"]) == (0.6, "latent")


def test_a_folder_of_embeddings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Path("words").mkdir()
    save_file({"emb_params": np.ones((2, 96), np.float32)}, "words/face.safetensors")
    words = ["a embedding:face", "--embd-dir", "words", "--json", "-o", "face.png", *FAST]
    run(monkeypatch, *words)
    (picture,) = json.loads(capsys.readouterr().out)["pictures"]
    assert [one["name"] for one in picture["embeddings"]] == ["face"]
    run(monkeypatch, "--from", "face.png", "--embd-dir", "words", "-o", "again.png")
    assert Path("again.png").read_bytes() == Path("face.png").read_bytes()
    monkeypatch.setattr(sys, "argv", ["latentrt", "generate", "--from", "face.png"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert "the embedding 'face' is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["--embd-dir", "nowhere"],
        ["--seed", "x"],
        ["--original-size", "512"],
        ["--crop", "1x2"],
        ["--latents", "nowhere.npy"],
        ["--latents", "start.png"],
        ["--image", "nowhere.npy"],
        ["--image", "lies.npy"],
        ["--image", "cut.npy"],
        ["--image", "zip.npy"],
        ["--refiner-at", "0.5"],
        ["--grid", "-o", "x.npy"],
        ["--preview", "x.tiff"],
        ["-o", "x.tiff"],
    ],
)
def test_what_cannot_be_read_is_a_usage_error(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["latentrt", "generate", "a", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2


def test_a_preview_after_every_step_and_a_grid(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    real = Pipeline.__call__

    def watch(pipe: Pipeline, prompts: Any, **parameters: Any) -> Any:
        on_step = parameters["callback_on_step_end"]

        def counted(*arguments: Any) -> None:
            on_step(*arguments)
            with Image.open("so-far.png") as picture:
                seen.append(picture.size)

        return real(pipe, prompts, **{**parameters, "callback_on_step_end": counted})

    monkeypatch.setattr(Pipeline, "__call__", watch)
    run(monkeypatch, "a red circle", "a star", *FAST, "--grid", "-o", "g.png", "--preview", "so-far.png")
    assert len(seen) == 2
    assert len(set(seen)) == 1
    with Image.open("g.png") as grid:
        assert grid.size == (256, 128)
    assert (read_metadata("g.png").record or {})["prompt"] == "a red circle"


def test_files_of_several_prompts_and_equal_seeds(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    before = {path.name for path in folder.iterdir()}
    run(monkeypatch, "a", "b", "--steps", "1", "--seed", "5,5", "--no-metadata")
    assert {path.name for path in folder.iterdir()} - before == {"a-5-0.png", "b-5-1.png"}
    assert read_metadata("a-5-0.png").record is None


def test_a_latent_goes_from_one_model_to_the_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["a red circle on a blue background", "--steps", "8", "--seed", "3", "--sampler", "ddim"]
    run(monkeypatch, *words, "--denoising-end", "0.5", "-o", "half.npy")
    run(monkeypatch, *words, "--denoising-start", "0.5", "-i", "half.npy", "-o", "two.png")
    run(monkeypatch, *words, "--refiner", "demo", "--refiner-at", "0.5", "-o", "refined.png", "--json")
    run(monkeypatch, *words, "-o", "whole.png")
    two, refined, whole = (
        np.asarray(Image.open(name)).astype(int) for name in ("two.png", "refined.png", "whole.png")
    )
    assert np.abs(two - whole).max() <= 1, "a sampler without memory does not notice"
    assert np.abs(refined - whole).max() <= 1
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert json.loads(printed[0])["pictures"][0]["base"] == "demo"


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("ein Fuchs, größer", "ein-fuchs-größer-3.png"),
        ("一只狐狸", "一只狐狸-3.png"),
        ("एक लोमड़ी", "एक-लोमड़ी-3.png"),
        ("лиса " * 30, None),
        ("🦊", "picture-3.png"),
        ("../../etc/x", "etc-x-3.png"),
    ],
)
def test_names_keep_letters_of_any_script(
    monkeypatch: pytest.MonkeyPatch, folder: Path, prompt: str, name: str | None
) -> None:
    before = set(folder.iterdir())
    run(monkeypatch, prompt, *FAST)
    (found,) = set(folder.iterdir()) - before
    assert len(found.name.encode()) <= 80
    assert found.name == name if name else found.name.startswith("лиса-лиса-")


def test_no_picture_is_overwritten(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Nor is one of another prompt whose name is the same."""
    for prompt in ("a red circle", "a red circle", "A red, circle!"):
        run(monkeypatch, prompt, *FAST)
    names = {path.name for path in folder.glob("a-red*.png")}
    assert names == {"a-red-circle-3.png", "a-red-circle-3-no2.png", "a-red-circle-3-no3.png"}
    run(monkeypatch, "a", "a", "--seed", "3,3", *FAST[:2])
    run(monkeypatch, "a", "a", "--seed", "3,3", *FAST[:2])
    assert {path.name for path in folder.glob("a-3*.png")} == {
        "a-3-0.png", "a-3-1.png", "a-3-0-no2.png", "a-3-1-no2.png",
    }  # fmt: skip


def test_from_a_picture(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    run(monkeypatch, "a red star", "-i", "start.png", "--strength", "0.9", *FAST, "-o", "first.jpg")
    run(monkeypatch, "--from", "first.jpg", "-o", "again.jpg")
    assert (folder / "again.jpg").read_bytes() == (folder / "first.jpg").read_bytes()
    run(monkeypatch, "a blue star", "--from", "first.jpg", "--seed", "9", "-o", "other.png")
    record = read_metadata("other.png").record or {}
    assert (record["prompt"], record["seed"], record["strength"]) == ("a blue star", 9, 0.9)
    four = ["--steps", "4", "--seed", "3", "--threads", "1"]
    run(monkeypatch, "a", *four, "--refiner", "demo", "--refiner-at", "0.5", "-o", "refined.png")
    run(monkeypatch, "--from", "refined.png", "--refiner", "demo", "-o", "refined-again.png")
    np.testing.assert_array_equal(*(np.asarray(Image.open(f"refined{i}.png")) for i in ("", "-again")))


def refused(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *words: str) -> str:
    capfd.readouterr()
    monkeypatch.setattr(sys, "argv", ["latentrt", "generate", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    return capfd.readouterr().err


STEERED = {
    "edges": ["--control-net", "edges", "--control-image", "start.png", "--control-preparation", "canny"],
    "likeness": ["--ip-adapter", "likeness", "--ip-adapter-image", "start.png"],
}


@pytest.mark.parametrize(
    ("nets", "more"),
    [
        (["edges"], ["--control-strength", "0.75", "--control-end", "0.75"]),
        (["likeness"], ["--ip-adapter-image", "mask.png", "--ip-adapter-strength", "0.5"]),
        (["edges", "likeness"], ["--refiner", "demo", "--refiner-at", "0.5"]),
    ],
)
def test_from_a_picture_that_was_steered(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    folder: Path,
    nets: list[str],
    more: list[str],
) -> None:
    """Nets and pictures are given again; the error has the command, and what is other then is refused."""
    steps = ["--seed", "3", "--steps", "4", "--threads", "1"]
    steering = [word for net in nets for word in STEERED[net]]
    run(monkeypatch, "a red star", *steps, *steering, *more, "-o", "first.png")
    refiner = more[:2] if "--refiner" in more else []
    again = ["--from", "first.png", *refiner, "--threads", "1", "-o", "again.png"]
    error = refused(monkeypatch, capfd, *again)
    record = read_metadata("first.png").record or {}
    for one in record.get("base_record", record)["steered_by"]:
        pictures = ", ".join(f"{picture['name']} ({picture['sha256'][:12]})" for picture in one["images"])
        assert f"{one['model']} ({one['sha256'][:12]}) with {pictures}" in error
    told = shlex.split(error.rpartition("--from PICTURE ")[2])
    names = iter(nets)
    given = [next(names) if word == "FILE" else word for word in told]
    run(monkeypatch, *again, *given)
    assert (folder / "again.png").read_bytes() == (folder / "first.png").read_bytes()
    Image.new("RGB", (128, 128), "gray").save("start.png")
    assert "and given is" in refused(monkeypatch, capfd, *again, *given)
    assert not refused(monkeypatch, capfd, *again, *given).count("Traceback")


def test_what_counts_otherwise_than_it_did_is_said(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], folder: Path
) -> None:
    run(monkeypatch, "a star", *FAST, *STEERED["edges"], "--control-strength", "0.75", "-o", "first.png")
    run(monkeypatch, "--from", "first.png", *STEERED["edges"], "-o", "same.png")
    assert (folder / "same.png").read_bytes() == (folder / "first.png").read_bytes(), "as the picture has it"
    other = ["--control-strength", "1"]
    run(monkeypatch, "--from", "first.png", *STEERED["edges"], *other, "-o", "again.png")
    said = capfd.readouterr().err
    assert "edges steered the picture with strength 0.75, and now with strength 1.0" in said
    assert (folder / "again.png").read_bytes() != (folder / "first.png").read_bytes()


def test_nets_of_one_name(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], folder: Path
) -> None:
    """Files of two folders that are called alike are two; a folder in the way does not hide what ships."""
    other = shutil.copytree(CONTROLS["demo"] / "edges", folder / "mine" / "edges")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "controlnet_conditioning_channel_order": "bgr"}))
    (folder / "edges").mkdir()
    nets = ["--control-net", "edges", "--control-net", "mine/edges", "--control-net", "edges"]
    run(monkeypatch, "a star", *FAST, *nets, "--control-image", "start.png", "-o", "three.png")
    assert "mine/edges is called edges-2 here, as another control is called edges" in capfd.readouterr().err
    record = read_metadata("three.png").record or {}
    assert [one["model"] for one in record["steered_by"]] == ["edges", "edges-2", "edges"]
    words = ["a", *FAST, "--control-net", "./edges", "--control-image", "start.png"]
    monkeypatch.setattr(sys, "argv", ["latentrt", "generate", *words])
    with pytest.raises(SystemExit):
        cli.main()
    assert "edges has no weights" in capfd.readouterr().err


def test_a_control_of_no_step_says_so(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], folder: Path
) -> None:
    late = [*STEERED["edges"], "--control-start", "0.9"]
    run(monkeypatch, "a star", "--steps", "4", "--threads", "1", "--seed", "3", *late, "-o", "late.png")
    assert "edges steers none of the 4 steps" in capfd.readouterr().err


def test_each_picture_of_a_batch_has_its_own_control(folder: Path) -> None:
    texts, hints = ["a star", "a heart"], ["start.png", "mask.png"]
    with Pipeline.open("demo", threads=1) as pipe:
        control = Control(model=pipe.load_control("edges"), image=hints, preparation="canny")
        both = pipe(texts, seed=[3, 4], num_inference_steps=4, controls=[control])
        for number, hint in enumerate(hints):
            (steered,) = both.record(number)["steered_by"]
            assert [one["name"] for one in steered["images"]] == [hint]
            again = redraw(pipe, both.record(number), controls=[replace(control, image=hint)])
            assert again.to_bytes() == both.to_bytes(index=number)


@pytest.mark.parametrize("steered", ["edges", ["edges"], [{"model": "edges"}], 5])
def test_records_whose_controls_are_none(steered: Any) -> None:
    record = {"prompt": "a", "steered_by": steered}
    with Pipeline.open("demo") as pipe, pytest.raises(UsageError, match="the record's controls are"):
        redraw(pipe, record)


def test_from_a_picture_of_another_model(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    run(monkeypatch, "a red star", *FAST, "-o", "first.png")
    monkeypatch.setattr("latentrt.runtime.model.SHIPPED", {})
    monkeypatch.setattr(sys, "argv", ["latentrt", "generate", "--from", "first.png"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2


@pytest.mark.parametrize(
    "words",
    [[], ["--from", "x.png", "--refiner", "demo", "--refiner-at", "0.5"], ["a", "b", "--from", "x.png"]],
)
def test_what_is_drawn_must_be_said(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["latentrt", "generate", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("a large grey ring on a pink background", ""),
        ("a photo of a fox", "it does not know photo, of, fox:"),
        ("a red cross <lora:cross:1> on a grey sofa", "it does not know sofa:"),
        ("a red frame on a grey sofa", "it does not know sofa:"),
        ("a red embedding:Frame on a grey sofa", "it does not know sofa:"),
        ("a red (embedding:frame.safetensors:1.1) on a grey background", ""),
    ],
)
def test_the_demo_says_what_it_does_not_know(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], prompt: str, said: str
) -> None:
    run(monkeypatch, prompt, *FAST)
    found = capfd.readouterr().err
    assert said in found
    assert bool(said) == ("the demo model" in found)


def test_adapters_of_one_stem(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """The later file gets a name that is free; the same content twice is one adapter."""
    for place, name in (("a", "striped"), ("b", "cross"), ("c", "striped")):
        Path(place).mkdir()
        shutil.copy(ADAPTERS["demo"] / f"{name}.safetensors", Path(place) / "style.safetensors")
    shutil.copy("a/style.safetensors", "style-2.safetensors")
    loras = [word for place in "abc" for word in ("--lora", f"{place}/style.safetensors:0.5")]
    run(monkeypatch, "a red circle", *loras, "--lora-dir", ".", "-o", "both.png", *FAST)
    record = read_metadata(Path("both.png")).record or {}
    assert record["loras"] == [["style", 0.5], ["style-3", 0.5], ["style", 0.5]]
    assert "b/style.safetensors is called style-3 here" in capfd.readouterr().err


def test_a_file_of_the_folder_is_found_with_its_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the name that it has there; a file that lies here goes before."""
    Path("styles").mkdir()
    shutil.copy(ADAPTERS["demo"] / "striped.safetensors", "styles/style.safetensors")
    words = ["a red circle", "--lora-dir", "styles", *FAST]
    run(monkeypatch, *words, "--lora", "style.safetensors:0.5", "-o", "a.png")
    run(monkeypatch, *words, "--lora", "style:0.5", "-o", "b.png")
    assert (read_metadata(Path("a.png")).record or {})["loras"] == [["style", 0.5]]
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lora", "."], "is a folder without adapter_model.safetensors"),
        (["--lora", "nothing.safetensors:0.5"], "nothing.safetensors is no file"),
        (["--lora", "nothing"], "no adapter is called 'nothing'"),
        (["--lora", "~nobody.here/x"], "no adapter is called '~nobody.here/x'"),
        (["--lora", "x" * 300], "no adapter is called 'xxx"),
        (["--lora", "x" * 300 + ".safetensors"], "xxx.safetensors is no file"),
        (["--control-net", "x" * 300, "--control-image", "y.png"], "does not exist"),
        (["--control-net", "", "--control-image", "y.png"], "a control is ''"),
        (["--control-net", "edges", "--control-image", "."], "control_image '.' cannot be read: a folder"),
        (["--ip-adapter", "edges", "--ip-adapter-image", "start.png"], "give it to --control-net"),
        (["--control-net", "likeness", "--control-image", "start.png"], "give it to --ip-adapter"),
        (["--control-net", "~nobody.here/x", "--control-image", "y.png"], "does not exist"),
        (["--fuse-lora", "x.safetensors"], "--fuse-lora (fused=…) was given for"),
        (["--few-steps", "lcm"], "--few-steps (few_steps=…) was given for"),
    ],
)
def test_adapters_that_are_not_there(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["latentrt", "generate", "a", *FAST, *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code in (2, 3)
    assert said in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--timesteps", ""], "'' is no list of numbers with commas between them"),
        (["--sigmas", "14,x"], "'14,x' is no list of numbers with commas between them"),
        (["--guidance-interval", "0-1"], "'0-1' is no list of numbers with commas between them"),
        (["--table", "."], "the table '.' cannot be read: "),
        (["--sampler", "euler", "--sigmas", "3,0,0"], "Pass each once, the largest first"),
    ],
)
def test_steps_that_are_none(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["latentrt", "generate", "a", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert said in " ".join(capfd.readouterr().err.split())


def test_a_file_that_was_moved_is_given_with_the_strength_that_it_had(
    monkeypatch: pytest.MonkeyPatch, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """`--from PICTURE --lora FILE` is the command that the error says, and draws the same."""
    before, after = folder / "mine.safetensors", folder / "moved" / "mine.safetensors"
    shutil.copy(ADAPTERS["demo"] / "striped.safetensors", before)
    picture = folder / "moved.png"
    run(monkeypatch, "a red circle", "--lora", f"{before}:0.6", "-o", str(picture), *FAST)
    after.parent.mkdir()
    before.rename(after)
    empty = folder / "empty"  # the demo's own folder has a file of that hash
    empty.mkdir()
    monkeypatch.setattr(
        sys, "argv", ["latentrt", "generate", "--from", str(picture), "--lora-dir", str(empty)]
    )
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert "latentrt generate --from PICTURE --lora FILE:0.6" in capfd.readouterr().err
    for words in ([f"{after}"], [f"{after}:0.6"]):
        run(monkeypatch, "--from", str(picture), "--lora", *words, "-o", str(folder / "again.png"))
        assert (folder / "again.png").read_bytes() == picture.read_bytes()


def test_commands_at_the_same_time_take_names_of_their_own(folder: Path) -> None:
    command = [sys.executable, "-m", "latentrt", "generate", "a", "--seed", "1", "--threads", "1", "-H", "64"]
    running = [subprocess.Popen([*command, "--steps", str(steps)], cwd=folder) for steps in (1, 2, 3)]
    assert [one.wait(120) for one in running] == [0, 0, 0]
    records = [read_metadata(path).record or {} for path in folder.glob("a-1*.png")]
    assert sorted(record["num_inference_steps"] for record in records) == [1, 2, 3]


def test_a_name_that_was_taken_is_given_back(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise StorageError("no room", expected="some", fix="Free some.")

    monkeypatch.setattr("latentrt.runtime.result.save_picture", fails)
    monkeypatch.setattr(sys, "argv", ["latentrt", "generate", "a", *FAST])
    before = set(folder.iterdir())
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 7
    assert set(folder.iterdir()) == before
