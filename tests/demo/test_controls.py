"""The controls that ship, on the shipped model, judged by the checker at places never trained on."""

from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import Mock

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from latentrt import CheckpointError, Control, ImagePrompt, NumericError, UsageError, read_metadata
from latentrt.checkpoints.opened import Options, open_control
from latentrt.demo import placed, shapes
from latentrt.demo.checker import check, seen_mask
from latentrt.demo.placed import FOLLOWED_IOU, Placed
from latentrt.engines.backends import BACKENDS
from latentrt.runtime import Pipeline
from latentrt.runtime.controls.canny import canny
from latentrt.runtime.model import CONTROLS
from latentrt.runtime.pictures.infotext import parse_infotext
from latentrt.runtime.prompts.encode import TextConditioner
from tests.parity_pair import BAR, drawn, psnr

ROOT = Path(__file__).resolve().parents[2]
EDGES = CONTROLS["demo"] / "edges"
LIMIT = 1_500_000  # bytes of a control

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*__array.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]
a_few_of_100 = pytest.mark.parametrize("count", [10, pytest.param(100, marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with Pipeline.open("demo", threads=1) as pipe:
        assert pipe.load_control("edges") == "edges"
        yield pipe


def draw(pipe: Pipeline, wanted: list[Placed], strength: float | None = 1.0) -> np.ndarray:
    """(N, 128, 128, 3) uint8; None is without a control."""
    hints = [one.drawing() for one in wanted]
    control = Control(model="edges", image=hints, preparation="canny", strength=strength or 0.0)
    prompts = [one.prompt() for one in wanted]
    controls = [control] if strength is not None else []
    return np.asarray(pipe(prompts, seed=0, output_type="np", controls=controls).images)


def likenesses(pictures: np.ndarray, wanted: list[Placed]) -> list[float]:
    return [one.likeness(seen_mask(picture)) for picture, one in zip(pictures, wanted, strict=True)]


def followed(pictures: np.ndarray, wanted: list[Placed]) -> float:
    """The share of pictures whose shape lies where it was asked for."""
    return mean(iou > FOLLOWED_IOU for iou in likenesses(pictures, wanted))


@a_few_of_100
def test_shapes_follow_edges_and_colours_follow_prompts(pipe: Pipeline, count: int) -> None:
    wanted = placed.asked(count)
    with_edges, without = draw(pipe, wanted), draw(pipe, wanted, None)
    assert followed(with_edges, wanted) >= 0.9
    assert followed(without, wanted) <= 0.1
    assert followed(with_edges, wanted[1:] + wanted[:1]) <= 0.1
    right = [
        mean(
            (seen.colour, seen.background) == (one.scene.colour, one.scene.background)
            for seen, one in zip(map(check, pictures), wanted, strict=True)
        )
        for pictures in (with_edges, without)
    ]
    assert right[0] >= right[1] - 0.05


def test_half_as_strong_is_between(pipe: Pipeline) -> None:
    wanted = placed.asked(10)
    none, half, whole = (mean(likenesses(draw(pipe, wanted, s), wanted)) for s in (None, 0.5, 1.0))
    assert none < half < whole


def test_at_strength_0_it_is_the_same_to_the_byte(pipe: Pipeline) -> None:
    wanted = placed.asked(2)
    plain = draw(pipe, wanted, None)
    np.testing.assert_array_equal(draw(pipe, wanted, 0.0), plain)
    assert (draw(pipe, wanted) != plain).any()


def test_diffusers_draws_the_same_with_it(pipe: Pipeline) -> None:
    wanted = placed.asked(2)
    net = diffusers.ControlNetModel.from_pretrained(EDGES, torch_dtype=torch.float32)
    reference = diffusers.StableDiffusionControlNetPipeline.from_pretrained(
        ROOT / "demo" / "checkpoint",
        controlnet=net,
        torch_dtype=torch.float32,
        safety_checker=None,
        requires_safety_checker=False,
    )
    reference.set_progress_bar_config(disable=True)
    hints = [Image.fromarray(canny(one.drawing())).convert("RGB") for one in wanted]
    settings = {"num_inference_steps": 20, "guidance_scale": 3.0}
    prompts = [one.prompt() for one in wanted]
    theirs = drawn(reference, [0, 1], prompt=prompts, image=hints, **settings)
    assert psnr(theirs, draw(pipe, wanted)) >= BAR


BLANK = np.full((128, 128, 3), 255, np.uint8)
EVERY = dict[str, Any](model="edges", image=BLANK)
LIKE = dict[str, Any](model="likeness", image=BLANK)


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (Control(**EVERY | {"image": "missing.png"}), "control_image 'missing.png' cannot be read"),
        (Control(**EVERY | {"image": [BLANK] * 3}), "3 control pictures for 2 pictures"),
        (Control(**EVERY, preparation="inpaint", mask_image=BLANK[:64]), "control_mask has wrong mask sizes"),
        (ImagePrompt(**LIKE | {"image": [BLANK, "missing.png"]}), "ip_adapter_image 2 'missing.png' cannot"),
        (ImagePrompt(**LIKE, mask_image=[BLANK] * 2), "2 masks for 1 pictures"),
        (ImagePrompt(**LIKE, strength={"up": {"block_9": 1.0}}), r"names up\.block_9"),
    ],
)
def test_wrong_pictures_are_refused_before_prompts_are_encoded(
    pipe: Pipeline, wrong: Control | ImagePrompt, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And before any net of a control is called; what steers well is counted, so the counter counts."""
    calls: Counter[str] = Counter()

    def counted(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*arguments: Any, **named: Any) -> Any:
            calls[name] += 1
            return real(*arguments, **named)

        monkeypatch.setattr(owner, name, call)

    pipe.load_control("likeness")
    counted(TextConditioner, "encode")
    counted(type(pipe.loop), "call")  # of a control's nets, too
    counted(type(pipe.loop), "draw")
    texts = ["a red circle on a white background", "a star nobody has drawn before"]
    for given in ([wrong], [Control(**EVERY), wrong]):
        with pytest.raises(UsageError, match=found):
            pipe(texts, seed=0, num_inference_steps=1, controls=given)
    assert not calls
    pipe(texts, seed=0, num_inference_steps=1, controls=[Control(**EVERY), ImagePrompt(**LIKE)])
    assert calls["encode"] == calls["draw"] == 1
    assert calls["call"] > 2


def loud(folder: Path) -> Path:
    """The edges' net, with an output beyond what fp16 holds; its weights are not."""
    net: Any = diffusers.ControlNetModel.from_pretrained(EDGES, torch_dtype=torch.float32)
    with torch.no_grad():
        weight = net.controlnet_mid_block.weight
        weight.mul_(5e4 / weight.abs().max())
    net.half().save_pretrained(folder / "loud")
    return folder / "loud"


def test_t54_a_net_whose_outputs_exceed_fp16_is_refused_by_name(pipe: Pipeline, tmp_path: Path) -> None:
    """As it is opened, where measuring sees it; in float32 it is none."""
    reads = BACKENDS["onnxruntime"].reads
    for dtype in ("fp32", "fp16"):
        options = Options(dtype=dtype, reads=reads)
        refused = pytest.raises(NumericError, match=r"controlnet: its output residual_\d+ reaches .* 65504")
        with refused if dtype == "fp16" else nullcontext():
            open_control(loud(tmp_path), options, store=tmp_path / "cache")


def test_t54_a_picture_that_is_not_finite_names_its_controls(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = pipe.controls._loaded["edges"]  # pyright: ignore[reportPrivateUsage]
    call = opened.loop.call

    def beyond(net: str, **arrays: Any) -> Any:
        found = call(net, **arrays)
        return (
            {name: value * np.float32(np.inf) for name, value in found.items()}
            if net == "controlnet"
            else found
        )

    monkeypatch.setattr(opened.loop, "call", beyond)
    wrong = "steered by the controlnet 'edges': the latent is not finite"
    with pytest.raises(NumericError, match=wrong) as error:
        draw(pipe, placed.asked(1))
    assert error.value.fix.startswith("Steer with less strength. ")
    assert draw(pipe, placed.asked(1), None).std() > 10
    monkeypatch.setattr(TextConditioner, "encode", Mock(side_effect=NumericError("a", expected="b", fix="c")))
    with pytest.raises(NumericError, match=r"^a;"):
        pipe("a prompt that is not cached", num_inference_steps=1)


def test_pictures_say_their_controls_as_automatic1111s_extension_reads_them(
    pipe: Pipeline, tmp_path: Path
) -> None:
    """Its rule: pairs between commas, each at its one colon (sd-webui-controlnet's scripts/infotext.py)."""
    pipe.load_control("edges", "mine, 2: new")
    try:
        controls = [
            Control(model="mine, 2: new", image=BLANK, preparation="canny", strength=0.7, mode="control"),
            Control(**EVERY, start=0.2, end=0.9, resize_mode="crop"),
        ]
        result = pipe("a star", seed=0, num_inference_steps=2, controls=controls)
    finally:
        pipe.unload_controls("mine, 2: new")
    result.save(tmp_path / "steered.png")
    written = parse_infotext(read_metadata(tmp_path / "steered.png").parameters or "")
    digest = result.record()["steered_by"][1]["sha256"][:8]
    found = [
        dict(item.strip().split(": ") for item in str(written[f"ControlNet {number}"]).split(","))
        for number in range(2)
    ]
    assert found == [
        {
            "Module": "canny",
            "Model": f"mine 2 new [{digest}]",
            "Weight": "0.7",
            "Resize Mode": "Just Resize",
            "Threshold A": "100.0",
            "Threshold B": "200.0",
            "Guidance Start": "0.0",
            "Guidance End": "1.0",
            "Pixel Perfect": "True",
            "Control Mode": "ControlNet is more important",
        },
        {
            "Module": "none",
            "Model": f"edges [{digest}]",
            "Weight": "1.0",
            "Resize Mode": "Crop and Resize",
            "Guidance Start": "0.2",
            "Guidance End": "0.9",
            "Pixel Perfect": "True",
            "Control Mode": "Balanced",
        },
    ]


def test_edges_of_a_true_drawing_are_true(pipe: Pipeline) -> None:
    for number, one in enumerate(placed.asked(20, "cross")):
        seen = seen_mask(one.picture(shapes.generator(number)))
        assert one.likeness(seen) > 0.95
        assert one.likeness(~seen) < 0.05
        assert not seen[0].any()  # it lies inside the picture
    assert {one.scene.shape for one in placed.asked(20, "cross")} == {"cross"}


def test_what_is_judged_was_never_trained_on() -> None:
    scenes = [one.scene for one in placed.asked(100)]
    combos = {(scene.colour, scene.shape, scene.background) for scene in scenes}
    assert not combos & set(shapes.training_combos())


def test_they_are_small_and_in_half_precision() -> None:
    folders = [folder for folder in CONTROLS["demo"].iterdir() if folder.is_dir()]
    assert {folder.name for folder in folders} == {"edges", "likeness"}
    for folder in folders:
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) <= LIMIT
        tensors = chain.from_iterable(load_file(path).values() for path in folder.rglob("*.safetensors"))
        assert {str(tensor.dtype) for tensor in tensors} == {"float16"}


def test_a_file_that_is_called_so_is_meant_by_its_path(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ships comes first, as `demo` does among models."""
    (tmp_path / "edges").write_text("no net")
    monkeypatch.chdir(tmp_path)
    assert pipe.load_control("edges") == "edges"
    for path in ("./edges", Path("edges")):
        with pytest.raises(CheckpointError, match="edges"):
            pipe.load_control(path, "other")
