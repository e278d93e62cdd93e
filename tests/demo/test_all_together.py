"""A LoRA, an embedding, a ControlNet, an IP-Adapter and inpainting in one request, against diffusers."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from latentrt import Control, ImagePrompt, Pipeline
from latentrt.engines.package import Package
from latentrt.runtime.model import SHIPPED, shipped_of
from tests.parity_pair import BAR, drawn, ours, psnr

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*__array.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]
DEMO = Path(__file__).parents[2] / "demo"
CONTROLS = DEMO / "controls"
PROMPT = "a large red frame on a white background"
SMALL: dict[str, Any] = {"num_inference_steps": 6, "guidance_scale": 3.0}
SEEN = 40.0  # dB


def picture(colour: tuple[int, int, int], ground: tuple[int, int, int]) -> Image.Image:
    pixels = np.full((128, 128, 3), ground, np.uint8)
    pixels[32:96, 40:104] = colour
    return Image.fromarray(pixels)


def mask() -> Image.Image:
    white = np.zeros((128, 128), np.uint8)
    white[16:112, 24:120] = 255
    return Image.fromarray(white)


def edges() -> Image.Image:
    lines = np.zeros((128, 128, 3), np.uint8)
    lines[32:96, [40, 103]] = lines[[32, 95], 40:104] = 255
    return Image.fromarray(lines)


def by_diffusers() -> Any:
    net: Any = diffusers.ControlNetModel.from_pretrained(CONTROLS / "edges", torch_dtype=torch.float32)
    encoder: Any = CLIPVisionModelWithProjection.from_pretrained(CONTROLS / "likeness" / "image_encoder")
    side = encoder.config.image_size
    pipe: Any = diffusers.StableDiffusionControlNetInpaintPipeline.from_pretrained(
        DEMO / "checkpoint",
        controlnet=net,
        image_encoder=encoder.to(torch.float32),
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side),
        dtype=torch.float32,
        safety_checker=None,
        requires_safety_checker=False,
    )
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.load_textual_inversion(str(DEMO / "embeddings" / "frame.safetensors"), token="frame")
    pipe.load_lora_weights(str(DEMO / "adapters" / "striped.safetensors"), adapter_name="striped")
    pipe.set_adapters(["striped"], [0.8])
    pipe.load_ip_adapter(
        str(CONTROLS / "likeness"),
        subfolder="",
        weight_name="ip_adapter.safetensors",
        image_encoder_folder=None,
    )
    pipe.set_ip_adapter_scale(0.5)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_one_request_with_all_of_them() -> None:
    start, likeness = picture((40, 80, 220), (250, 250, 250)), picture((240, 220, 40), (30, 160, 60))
    values = {**SMALL, "image": start, "mask_image": mask(), "strength": 0.9, "prompt": PROMPT}
    wanted = drawn(
        by_diffusers(),
        [4],
        **values,
        control_image=edges(),
        controlnet_conditioning_scale=0.9,
        ip_adapter_image=likeness,
        height=128,
        width=128,
    )
    inside = np.asarray(mask())[None, ..., None] >= 128  # outside of which diffusers puts nothing back
    with Pipeline.open("demo") as engine:
        control = Control(model=engine.load_control("edges"), image=edges(), strength=0.9)
        prompt = ImagePrompt(model=engine.load_control("likeness"), image=likeness, strength=0.5)
        whole = {"controls": [control, prompt], "loras": [("striped", 0.8)]}
        found = ours(engine, [4], **values, sampler="ddim", **whole)
        assert psnr(wanted * inside, found * inside) >= BAR
        lacking = [
            {**whole, "controls": [prompt]},
            {**whole, "controls": [control]},
            {**whole, "loras": []},
            {**whole, "prompt": PROMPT.replace("frame", "square")},
        ]
        for change in lacking:  # each of them is seen
            other = ours(engine, [4], **{**values, "sampler": "ddim", **change})
            assert psnr(other * inside, found * inside) < SEEN, change


def test_a_package_of_the_demo_finds_them_by_name(tmp_path: Path) -> None:
    """As one that was quantised has the demo's name."""
    parameters: dict[str, Any] = {
        "prompt": "a red embedding:frame on a blue background",
        "num_inference_steps": 2,
        "seed": 1,
        "output_type": "np",
        "loras": [("striped", 0.8)],
    }
    pictures: list[Any] = []
    for model in ("demo", shutil.copytree(SHIPPED["demo"], tmp_path / "mine")):
        with Pipeline.open(model, threads=1) as pipe:
            pipe.load_control("edges")
            controls = [Control(model="edges", image=edges())]
            pictures.append(pipe(**parameters, controls=controls).images)
    assert np.array_equal(*pictures)


def test_another_model_of_the_demos_name_has_none_of_them(tmp_path: Path) -> None:
    package = Package.open(shutil.copytree(SHIPPED["demo"], tmp_path / "mine"))
    manifest = package.manifest
    files = {path: file for path, file in manifest.files.items() if "text_encoder/" not in path}
    assert shipped_of("demo", package) == shipped_of(tmp_path / "mine", package) == "demo"
    for other in (replace(manifest, name="mine"), replace(manifest, files=files)):
        assert shipped_of(tmp_path / "mine", replace(package, manifest=other)) == ""
