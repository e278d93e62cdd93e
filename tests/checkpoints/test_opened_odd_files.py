"""Every odd file that opens computes what diffusers' modules compute with the tensors that it must have."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from latentrt.checkpoints.opened import Options, open_checkpoint
from latentrt.engines.backends import BACKENDS
from latentrt.engines.onnxruntime.backend import ONNXRUNTIME
from latentrt.engines.package import Package
from latentrt.engines.spec import VECTORS
from latentrt.engines.tolerances import NET_RELATIVE_L2, ROUNDED_RELATIVE_L2, relative_l2
from latentrt.export.nets.clip import tokenize
from tests.checkpoints.odd_files import (
    LAYOUTS,
    ODD_FILES,
    OTHER_VAE,
    RECIPES,
    Opens,
    Tensors,
    modules,
    other_vae,
    write,
)
from tests.opened_pair import templates

pytestmark = pytest.mark.slow
OPENS = [id for id, file in ODD_FILES.items() if isinstance(file.answer, Opens)]
# Of types that not every backend reads.
ODD_TYPES = ["bf16", "fp64", "fp8 e4m3, norms in fp16", "fp8 e5m2, all of it", "a type for each part"]
TIME = 321.0


@pytest.fixture
def nets() -> Iterator[ExitStack]:
    """Closes what a test opens."""
    with ExitStack() as stack:
        yield stack


def recipe_with(unet: Tensors) -> str:
    """The recipe whose UNet has these tensors."""
    shapes = {name: tensor.shape for name, tensor in unet.items()}
    return next(
        name
        for name in RECIPES
        if shapes == {key: tensor.shape for key, tensor in modules(name)["unet"].state_dict().items()}
    )


def opened(
    id: str, folder: Path, factory: pytest.TempPathFactory, backend: str
) -> tuple[Package, Opens, str, list[str]]:
    """An odd file opened for a backend; its answer, its recipe, and what was noted."""
    answer = ODD_FILES[id].answer
    assert isinstance(answer, Opens)
    recipe = recipe_with(answer.tensors["unet"])
    options = dict(answer.options or {})
    if "vae" in options:
        options["vae"] = write(folder / "vae.safetensors", other_vae())
    lines: list[str] = []
    package = open_checkpoint(
        ODD_FILES[id].make(folder),
        Options(
            dtype="fp32",
            reads=BACKENDS[backend].reads,
            templates=templates(factory, LAYOUTS.get(recipe, recipe)),
            **options,
        ),
        tokenize=tokenize,
        store=folder / "cache",
        note=lines.append,
    )
    return package, answer, recipe, lines


def module(kind: Any, config: Mapping[str, Any], tensors: Tensors) -> Any:
    """A module of diffusers with these tensors, in fp32."""
    with torch.device("meta"):
        net = kind(**config)
    net.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=True, assign=True)
    return net.eval()


def unet_inputs(package: Package) -> dict[str, np.ndarray]:
    """One row of everything that the uncut UNet takes, by the contract's names."""
    drawn = np.random.default_rng(5)
    inputs: dict[str, np.ndarray] = {}
    for item in package.manifest.nets["unet_whole"].spec.inputs:
        named = {"B": 1, "T": 77, "H/8": 12, "W/8": 20}
        shape = [dim if isinstance(dim, int) else named[dim] for dim in item.shape]
        inputs[item.name] = drawn.standard_normal(shape).astype(np.float32)
    inputs["timestep"] = np.float32([TIME])
    if "time_ids" in inputs:
        inputs["time_ids"] = np.abs(inputs["time_ids"] * 100).round()
    return inputs


def theirs(unet: Any, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    given = {name: torch.from_numpy(value) for name, value in inputs.items()}
    added = {name: given.pop(name) for name in ("text_embeds", "time_ids") if name in given}
    with torch.no_grad():
        return unet(**given, added_cond_kwargs=added or None).sample.numpy()


def ours(package: Package, nets: ExitStack, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """The prediction as the loop computes it: of the text and of the schedule first."""

    def call(name: str, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        net = nets.enter_context(closing(ONNXRUNTIME.open_net(package, name, threads=1)))
        return net(**arrays)

    vectors = {name: inputs[name] for name in VECTORS if name in inputs}
    invariants = call("unet_context", context=inputs["encoder_hidden_states"])
    invariants |= call("unet_time", timestep=inputs["timestep"], **vectors)
    latent, behind = np.split(inputs["sample"], [4], axis=1)
    more = {"image_latents": behind} if behind.size else {}
    return call("unet", latent=latent, **more, **invariants)["prediction"]


def check(package: Package, answer: Opens, recipe: str, nets: ExitStack) -> None:
    """UNet and decoder against diffusers', with the tensors that the answer says; the other nets open."""
    for name in package.manifest.nets:
        ONNXRUNTIME.open_net(package, name, threads=1).close()
    inputs = unet_inputs(package)
    unet = module(UNet2DConditionModel, RECIPES[recipe].unet, answer.tensors["unet"])
    found, wanted = ours(package, nets, inputs), theirs(unet, inputs)
    assert wanted.std() > 0.01
    assert relative_l2(found, wanted) <= NET_RELATIVE_L2["fp32"]
    config = OTHER_VAE if answer.options else RECIPES[recipe].vae
    vae = module(AutoencoderKL, config, answer.tensors["vae"])
    latent = np.random.default_rng(6).standard_normal((1, 4, 12, 20)).astype(np.float32)
    with torch.no_grad():
        pixels = vae.decode(torch.from_numpy(latent / vae.config.scaling_factor)).sample
    shades = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()
    decoder = nets.enter_context(closing(ONNXRUNTIME.open_net(package, "vae_decoder", threads=1)))
    decoded = decoder(latent=latent)
    assert shades.std() > 10
    assert np.isfinite(decoded["mean"]).all()
    assert relative_l2(decoded["image"], shades) <= ROUNDED_RELATIVE_L2


@pytest.mark.parametrize("id", OPENS)
def test_it_computes_what_its_tensors_say(
    id: str, nets: ExitStack, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    package, answer, recipe, lines = opened(id, tmp_path, tmp_path_factory, "onnxruntime")
    check(package, answer, recipe, nets)
    assert "converted" not in "".join(lines)


@pytest.mark.parametrize("id", ODD_TYPES)
def test_types_that_a_backend_does_not_read_are_converted(
    id: str, nets: ExitStack, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    package, answer, recipe, lines = opened(id, tmp_path, tmp_path_factory, "tensorrt")
    check(package, answer, recipe, nets)
    assert "are converted to fp32 in the cache" in "".join(lines)
