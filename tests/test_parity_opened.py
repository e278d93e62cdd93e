"""Checkpoints opened as they are draw what diffusers draws with them: every architecture, in every form.

Weights are random, in half precision, and the arithmetic is fp32. A file, a folder and an exported package of
the same weights give the same picture to the byte; ours is drawn where torch cannot be imported.
"""

from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from latentrt.checkpoints import opened
from latentrt.export.architectures import ARCHITECTURES
from latentrt.export.export import export_package
from latentrt.runtime import Pipeline
from latentrt.runtime.model import CheckpointOptions
from tests.checkpoints.odd_files import stored
from tests.opened_pair import (
    CLIP_WORDS,
    SMALL,
    Small,
    diffusers_pipeline,
    lean,
    templates,
    write_file,
    write_folder,
)
from tests.parity_pair import BAR, drawn, psnr
from tests.recipes import make_tiny_vae

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*__array.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]
SEED = 11
TRACED = "sd2"  # its package's graphs are not from templates
NAMES = [pytest.param(name, marks=() if name == "smallest" else pytest.mark.slow) for name in SMALL]


def wanted(small: Small, pipe: Any) -> np.ndarray:
    """What diffusers draws; outside a mask, the picture itself."""
    parameters = dict(small.parameters)
    found = drawn(pipe, [SEED], **parameters)
    if "mask_image" not in parameters:
        return found
    inside = np.asarray(parameters["mask_image"])[None, ..., None] >= 128
    return np.where(inside, found, np.asarray(parameters["image"]))


def test_every_architecture_that_ships_is_here() -> None:
    """Those of ControlNets are in test_parity_controls.py."""
    models = {name for name, one in ARCHITECTURES.items() if "unet" in one.parts}
    assert set(SMALL) - {"smallest"} == models


@pytest.mark.parametrize("name", NAMES)
def test_every_form_draws_what_diffusers_draws(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    small = SMALL[name]
    folder = write_folder(tmp_path / "folder", name)
    file = write_file(tmp_path / "model.safetensors", name) if small.file else None
    vae = make_tiny_vae(tmp_path / "tiny") if small.tiny else None
    archive = templates(tmp_path_factory, small.archive)
    package = tmp_path / "package"
    graphs = None if name == TRACED else archive
    export_package(folder, package, dtype="fp32", verify=False, vae=vae, templates=graphs)
    models = [*([file] if file else []), folder, package]
    options = {"vae": vae} if vae else {}
    pictures = lean(tmp_path / "lean", models, {**small.parameters, "seed": SEED}, archive=archive, **options)
    for model, picture in zip(models, pictures, strict=True):
        np.testing.assert_array_equal(picture, pictures[0], err_msg=model.name)
    parts = {"vae": diffusers.AutoencoderTiny.from_pretrained(vae)} if vae else {}
    pipe = diffusers_pipeline(small.pipeline, folder, file if small.read_by_diffusers else None, **parts)
    assert psnr(wanted(small, pipe), pictures[0]) >= BAR


@pytest.mark.slow
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.usefixtures("rounded_sqrt")
def test_markers_say_how_a_file_was_trained(
    zero_snr: bool, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Empty tensors, as NoobAI's: it predicts v, and its schedule ends without signal."""
    small = SMALL["sdxl"]
    markers = {name: torch.zeros(0) for name in ("v_pred", "ztsnr")[: 1 + zero_snr]}
    trained = {"prediction_type": "v_prediction", **({"rescale_betas_zero_snr": True} if zero_snr else {})}
    file = write_file(tmp_path / "model.safetensors", "sdxl", markers)
    folder = write_folder(tmp_path / "folder", "sdxl", **trained)
    archive = templates(tmp_path_factory, small.archive)
    parameters = {**small.parameters, "seed": SEED}
    one, other = lean(tmp_path / "lean", [file, folder], parameters, archive=archive)
    np.testing.assert_array_equal(one, other)
    found = wanted(small, diffusers_pipeline(small.pipeline, folder, file))
    assert psnr(found, one) >= BAR
    plain = diffusers_pipeline(small.pipeline, write_folder(tmp_path / "plain", "sdxl"), file)
    assert psnr(found, wanted(small, plain)) < 50, "the markers change the picture"


@pytest.mark.slow
def test_a_tiny_autoencoder_shows_previews(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    small = SMALL["sd1"]
    file = write_file(tmp_path / "model.safetensors", "sd1")
    tiny = make_tiny_vae(tmp_path / "tiny")
    archive = templates(tmp_path_factory, small.archive)
    lean(tmp_path / "lean", [file], {**small.parameters, "seed": SEED}, archive=archive, tiny_vae=tiny)
    shown = np.load(tmp_path / "lean" / "0.npz")
    net = diffusers.AutoencoderTiny.from_pretrained(tiny, torch_dtype=torch.float32)
    with torch.no_grad():
        pixels = net.decode(torch.from_numpy(shown["latent"])).sample[0].permute(1, 2, 0).numpy()
    decoded = (np.clip(pixels / 2 + 0.5, 0, 1) * 255).round().astype(np.uint8)
    assert psnr(decoded, shown["tiny"]) >= BAR


@pytest.mark.slow
def test_an_adapter_of_a_projection_that_is_stored_the_other_way_round(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T11: OpenCLIP's is (in, out), OneTrainer's factors (out, rank) and (rank, in); as if it were summed."""
    name = "conditioner.embedders.1.model.text_projection"
    base = stored(SMALL["sdxl"].recipe, CLIP_WORDS)[name]
    read, made = base.shape
    assert read != made, "a turned sum could not be told"
    random = torch.Generator().manual_seed(5)
    down, up = (torch.randn(shape, generator=random) * 0.3 for shape in ((2, read), (made, 2)))
    key = "lora_te2_text_projection"
    factors = {
        f"{key}.lora_down.weight": down,
        f"{key}.lora_up.weight": up,
        f"{key}.alpha": torch.tensor(1.0),
    }
    save_file(factors, tmp_path / "projection.safetensors")
    summed = base.double() + 0.5 * 0.8 * (up.double() @ down.double()).T
    plain = write_file(tmp_path / "plain.safetensors", "sdxl", {name: base.float()})
    sums = write_file(tmp_path / "sums.safetensors", "sdxl", {name: summed.float()})
    archive = templates(tmp_path_factory, SMALL["sdxl"].archive)
    monkeypatch.setattr(opened, "Options", partial(opened.Options, templates=archive))
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "cache"))
    parameters: dict[str, Any] = {**SMALL["sdxl"].parameters, "seed": SEED, "output_type": "np"}
    pictures = list[np.ndarray]()
    for file, loras in ((plain, [("projection", 0.8)]), (sums, []), (plain, [])):
        with Pipeline.open(file, checkpoint=CheckpointOptions()) as pipe:
            pipe.load_lora_weights(tmp_path / "projection.safetensors")
            pictures.append(pipe(loras=loras, **parameters).images)
    found, wanted, without = pictures
    assert psnr(wanted, found) >= BAR
    assert psnr(wanted, without) < 50
