"""OpenVINO: every family's nets against ONNX Runtime's, and whole pictures against diffusers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from latentrt import Control, ImagePrompt
from latentrt.checkpoints.opened import Options, open_checkpoint
from latentrt.engines.backends import BACKENDS
from latentrt.engines.onnxruntime.backend import ONNXRUNTIME
from latentrt.engines.package import Package
from latentrt.engines.tolerances import NET_RELATIVE_L2, ROUNDED_RELATIVE_L2, relative_l2
from latentrt.runtime import Pipeline
from tests.checkpoints.test_opened import tokenize
from tests.engines.net_inputs import input_shapes, random_inputs
from tests.opened_pair import SMALL, templates, write_file, write_folder
from tests.parity_pair import BAR, PROMPTS, Pair, blob, drawn, exported, ours, photo, psnr
from tests.steered_pair import SEEN, Steered
from tests.test_parity_adapters import AdaptedPair, Adapter
from tests.test_parity_image_prompts import Prompted

pytest.importorskip("openvino")

from latentrt.engines.openvino.backend import OPENVINO

# torch tensors lack keywords that NumPy 2 asks for when diffusers' schedulers call np.array(tensor)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*__array.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]

DEMO = Path(__file__).resolve().parent.parent / "demo"
FAMILIES = [
    "tiny2",
    "xl-tiny",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("tiny1", "inpaint-tiny", "lcm-tiny", "unclip-tiny", "refiner-tiny", "inpaint-xl-tiny")
    ),
]
SIZES = {"P": 2, "B": 2, "N": 1, "S": 3, "T": 77, "H": 72, "W": 96, "H/8": 9, "W/8": 12, "h": 9, "w": 12}
SMALL_PICTURE: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 5.0, "height": 64, "width": 96}


def check_nets(package: Package) -> None:
    """Raise AssertionError unless every net is ONNX Runtime's."""
    for name, file in package.manifest.nets.items():
        inputs = random_inputs(file.spec, input_shapes(file.spec, SIZES))
        with OPENVINO.open_net(package, name) as net, ONNXRUNTIME.open_net(package, name) as other:
            found, wanted = net(**inputs), other(**inputs)
        for key, values in wanted.items():
            rounded = values.dtype.kind in "iu"
            bar = ROUNDED_RELATIVE_L2 if rounded else NET_RELATIVE_L2[package.manifest.dtype]
            assert relative_l2(found[key], values) <= bar, (name, key)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_net_of_every_family(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    check_nets(Package.open(exported(tmp_path_factory, family) / "package"))


@pytest.mark.parametrize("form", ["file", "folder"])
def test_a_checkpoint_whose_weights_are_elsewhere(
    form: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """One that the user has in one file, or as diffusers' folder: nothing is copied."""
    source = tmp_path / ("model.safetensors" if form == "file" else "model")
    path = (write_file if form == "file" else write_folder)(source, "smallest")
    archive = templates(tmp_path_factory, SMALL["smallest"].archive)
    options = Options(dtype="fp32", reads=BACKENDS["openvino"].reads, templates=archive)
    package = open_checkpoint(path, options, tokenize=tokenize, store=tmp_path / "cache")
    assert package.elsewhere
    check_nets(package)


def test_text_to_image_from_the_demo() -> None:
    reference = StableDiffusionPipeline.from_pretrained(
        DEMO / "checkpoint", dtype=torch.float32, safety_checker=None, requires_safety_checker=False
    )
    reference.set_progress_bar_config(disable=True)
    vectors = np.random.default_rng(0).normal(0, 0.3, (2, reference.text_encoder.config.hidden_size))
    with Pipeline.open("demo", backend="openvino") as pipe:
        assert pipe.backend.startswith("openvino ")
        plain = drawn(reference, [1, 2], prompt=PROMPTS[:2], **SMALL_PICTURE)
        assert psnr(plain, ours(pipe, [1, 2], prompt=PROMPTS[:2], **SMALL_PICTURE)) >= BAR
        assert psnr(plain, ours(pipe, [3, 4], prompt=PROMPTS[:2], **SMALL_PICTURE)) < SEEN
        # An embedding adds rows to what the text encoder reads.
        reference.load_textual_inversion(torch.from_numpy(vectors.astype(np.float32)), token="<thing>")
        pipe.load_textual_inversion({"<thing>": vectors.astype(np.float32)})
        wanted = drawn(reference, [1], prompt=f"{PROMPTS[0]} <thing>", **SMALL_PICTURE)
        assert psnr(wanted, ours(pipe, [1], prompt=f"{PROMPTS[0]} <thing>", **SMALL_PICTURE)) >= BAR
        assert psnr(wanted, plain[:1]) < BAR


def test_a_picture_of_sdxl_and_one_to_start_from(tmp_path_factory: pytest.TempPathFactory) -> None:
    pair = Pair(exported(tmp_path_factory, "xl-tiny"), "openvino")
    text = {"prompt": PROMPTS[0], "num_inference_steps": 4, "guidance_scale": 5.0}
    size = {"height": 40, "width": 56}
    wanted = drawn(pair.reference("StableDiffusionXLPipeline"), [3], **text, **size)
    assert psnr(wanted, ours(pair.ours, [3], **text, **size)) >= BAR
    start = {"image": photo(40, 56), "strength": 0.6}
    wanted = drawn(pair.reference("StableDiffusionXLImg2ImgPipeline"), [3], **text, **start)
    assert psnr(wanted, ours(pair.ours, [3], **text, **start)) >= BAR
    masked = {**start, "mask_image": blob(40, 56)}
    assert psnr(wanted, ours(pair.ours, [3], **text, **masked)) < BAR
    pair.ours.close()


@pytest.fixture(scope="module")
def steered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Steered]:
    found = Steered(
        exported(tmp_path_factory, "tiny2"), tmp_path_factory.mktemp("openvino-controls"), "openvino"
    )
    yield found
    found.ours.close()


def test_a_control_net(steered: Steered) -> None:
    image = photo(64, 96)
    pipe = steered.steered("StableDiffusionControlNetPipeline")
    more = {"prompt": "a red circle", **SMALL_PICTURE}
    wanted = drawn(pipe, [3], image=image, controlnet_conditioning_scale=0.8, **more)
    control = Control(model=steered.names[0], image=image, strength=0.8)
    assert psnr(wanted, ours(steered.ours, [3], controls=[control], **more)) >= BAR
    assert psnr(wanted, ours(steered.ours, [3], **more)) < SEEN


def test_an_image_prompt(tmp_path_factory: pytest.TempPathFactory) -> None:
    made = tmp_path_factory.mktemp("openvino-prompts")
    pair = Prompted(exported(tmp_path_factory, "tiny2"), made, "openvino")
    pipe, more = pair.prompted("plus"), {"prompt": "a red circle", **SMALL_PICTURE}
    pipe.set_ip_adapter_scale(0.6)
    wanted = drawn(pipe, [3], ip_adapter_image=photo(40, 50), **more)
    prompt = ImagePrompt(model="plus", image=photo(40, 50), strength=0.6)
    assert psnr(wanted, ours(pair.ours, [3], controls=[prompt], **more)) >= BAR
    assert psnr(wanted, ours(pair.ours, [3], **more)) < SEEN
    pair.ours.close()


def test_adapters_everywhere(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    pair = AdaptedPair(exported(tmp_path_factory, "tiny2"), "openvino")
    places = ("attention", "convolutions", "time", "text")
    adapter = Adapter(pair, tmp_path / "all.safetensors", "lora", *places)
    assert pair.differs([("all", 0.8)], (adapter, 0.8)) >= BAR
    pair.ours.close()
