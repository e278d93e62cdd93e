"""Controls that are a change of a checkpoint's UNet: completed, against ControlNets that are whole."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.controlnets.controlnet import ControlNetModel

from latentrt.checkpoints.controls.read import read_control
from latentrt.checkpoints.controls.with_base import Weight, weights_with_base
from latentrt.checkpoints.files.open import Checkpoint
from latentrt.engines.errors import CheckpointError
from tests.checkpoints.controls.control_files import to_cldm, write
from tests.checkpoints.odd_files import modules, stored
from tests.export.ldm_files import Tensors

FAMILIES = ["sd1", "sd2", "sdxl"]


def base_file(folder: Path, recipe: str) -> Checkpoint:
    """A checkpoint of half precision by the names of latent-diffusion."""
    tensors = {name: tensor for name, tensor in stored(recipe).items() if not tensor.is_meta}
    return Checkpoint.open(write(folder / "base.safetensors", tensors), prediction_type="epsilon")


def whole(recipe: str) -> Any:
    """A ControlNet that grew from the base's UNet: each weight differs a little, in float32."""
    torch.manual_seed(3)
    unet = deepcopy(modules(recipe)["unet"])  # those are shared
    made: Any = ControlNetModel.from_unet(unet)
    made.add_embedding = unet.add_embedding if recipe == "sdxl" else None
    made = made.float()
    with torch.no_grad():
        for tensor in made.state_dict().values():
            tensor += 0.1 * torch.randn_like(tensor)
    return made


def base_of(recipe: str) -> Tensors:
    return {name: tensor.float() for name, tensor in modules(recipe)["unet"].state_dict().items()}


def read(weights: dict[str, Weight]) -> dict[str, Any]:
    found = {name: weight.read() for name, weight in weights.items()}
    assert all(found[name].dtype == np.float32 for name in found)
    assert {name: array.shape for name, array in found.items()} == {n: w.shape for n, w in weights.items()}
    return found


@pytest.mark.parametrize("layout", ["control_model.", "cldm", "diffusers"])
@pytest.mark.parametrize("recipe", FAMILIES)
def test_a_difference(recipe: str, layout: str, tmp_path: Path) -> None:
    """What was subtracted is added again: to a rounding of float32, the ControlNet that was whole."""
    module = whole(recipe)
    wanted, base = module.state_dict(), base_of(recipe)
    difference = {name: tensor - base[name] if name in base else tensor for name, tensor in wanted.items()}
    if layout != "diffusers":
        difference = to_cldm(difference, module.config)
    if layout == "control_model.":
        difference = {f"control_model.{name}": tensor for name, tensor in difference.items()}
    found = read_control(write(tmp_path / "x.safetensors", difference | {"difference": torch.zeros(1)}))
    assert (found.needs_base, found.what) == ("difference", "a ControlNet (difference)")
    assert "needs the checkpoint that it was made of" in found.lines()
    weights = read(dict(weights_with_base(found, base_file(tmp_path, recipe))))
    assert weights.keys() == wanted.keys()
    for name, tensor in wanted.items():
        np.testing.assert_allclose(weights[name], tensor.numpy(), rtol=0, atol=5e-7, err_msg=name)


LOW = (
    "proj_in",
    "to_",
    "ff.net",
    "conv1",
    "conv2",
    "conv.",
    "conv_shortcut",
    "conv_in",
    "linear_",
    "emb_proj",
)


def control_lora(wanted: Tensors, rank: int = 3) -> tuple[Tensors, Tensors]:
    """Stability's layout of a change of the UNet by diffusers' names, and the weights that it makes.

    The tensors of the picture and of the residuals, norms and biases are whole, matrices are of low rank, and
    some are left to the base.
    """
    torch.manual_seed(5)
    tensors: Tensors = {}
    for name, tensor in wanted.items():
        module, _, end = name.rpartition(".")
        if name.startswith("controlnet_") or end == "bias" or tensor.ndim == 1:
            tensors[name] = tensor
        elif "down_blocks.0.resnets.1" in name or "proj_out" in name:
            continue
        elif any(part in name for part in LOW):
            out, taken, *kernel = tensor.shape
            ones = [1] * len(kernel)
            tensors[f"{module}.up"] = torch.randn(out, rank, *ones)
            tensors[f"{module}.down"] = torch.randn(rank, taken, *kernel)
        else:
            tensors[name] = tensor
    return tensors, wanted


@pytest.mark.parametrize("recipe", FAMILIES)
def test_a_control_lora(recipe: str, tmp_path: Path) -> None:
    """ComfyUI's `ControlLoraOps`: weight + mm(up.flatten(1), down.flatten(1)).reshape(weight.shape)."""
    module = whole(recipe)
    base = base_of(recipe)
    tensors, own = control_lora(module.state_dict())
    assert {name.rpartition(".")[2] for name in tensors} == {"up", "down", "weight", "bias"}
    path = write(
        tmp_path / "x.safetensors", to_cldm(tensors, module.config) | {"lora_controlnet": torch.zeros(0)}
    )
    found = read_control(path)
    assert (found.needs_base, found.what) == ("lora", "a control-LoRA")
    assert found.part.tensors.keys() == tensors.keys()
    weights = read(dict(weights_with_base(found, base_file(tmp_path, recipe))))
    assert weights.keys() == own.keys()
    for name, tensor in own.items():
        stem = name.removesuffix(".weight")
        if name not in tensors:
            tensor = base[name]
        if f"{stem}.up" in tensors:
            change = torch.mm(tensors[f"{stem}.up"].flatten(1), tensors[f"{stem}.down"].flatten(1))
            tensor = tensor + change.reshape(tensor.shape)
        np.testing.assert_allclose(weights[name], tensor.numpy(), rtol=1e-6, atol=1e-6, err_msg=name)


def test_a_control_that_is_whole(tmp_path: Path) -> None:
    module = whole("sd1").half()
    found = read_control(write(tmp_path / "x.safetensors", module.state_dict()))
    weights = read(dict(weights_with_base(found, base_file(tmp_path, "sd1"))))
    for name, tensor in module.state_dict().items():
        np.testing.assert_array_equal(weights[name], tensor.float().numpy(), err_msg=name)


def test_nothing_is_computed_before_it_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = whole("sd1").state_dict() | {"difference": torch.zeros(1)}
    found = read_control(write(tmp_path / "x.safetensors", tensors))
    base = base_file(tmp_path, "sd1")
    calls: list[str] = []
    from latentrt.checkpoints.controls import with_base

    convert = with_base.convert
    monkeypatch.setattr(
        with_base, "convert", lambda array, name: (calls.append(name), convert(array, name))[1]
    )
    weights = weights_with_base(found, base)
    assert calls == []
    weights["conv_in.weight"].read()
    assert calls == ["F32", "F32"]


@pytest.mark.parametrize("kind", ["difference", "lora_controlnet"])
@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("sd1-inpainting", r"conv_in.weight is \(32, 9, 3, 3\) there; expected \(32, 4, 3, 3\)"),
        ("sdxl", r" is \(64, 4, 3, 3\) there"),
        ("smallest", "is missing there; expected .*, of a checkpoint of Stable Diffusion 1.x"),
    ],
)
def test_another_base(kind: str, recipe: str, words: str, tmp_path: Path) -> None:
    module = whole("sd1")
    if kind == "difference":
        tensors = module.state_dict()
    else:
        tensors, _ = control_lora(module.state_dict())
        tensors = to_cldm(tensors, module.config)
    found = read_control(write(tmp_path / "x.safetensors", tensors | {kind: torch.zeros(1)}))
    base = base_file(tmp_path, recipe)
    with pytest.raises(CheckpointError, match=words) as error:
        weights_with_base(found, base)
    assert "is a change of another UNet than that of" in error.value.found


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"time_embed.0.up": None}, r"has 'time_embedding.linear_1'.up \(none\) and .down \(3, 32\)"),
        ({"time_embed.0.down": None}, r"'time_embedding.linear_1'.up \(128, 3\) and .down \(none\)"),
        ({"time_embed.0.down": (2, 32)}, "two tensors of one rank"),
        ({"time_embed.0.weight": (128, 32)}, r"two tensors of one rank, .* in place of a weight"),
        ({"time_embed.0.down": (3, 31)}, "'time_embedding.linear_1.weight' of the shape"),
        ({"zero_convs.0.0.weight": None}, "lacks the tensor 'controlnet_down_blocks.0.weight'"),
        (
            {"output_blocks.0.0.up": (4, 2), "output_blocks.0.0.down": (2, 4)},
            "has the tensor 'output_blocks.0.0.weight' that a control-LoRA has not",
        ),
    ],
)
def test_a_damaged_control_lora(changed: dict[str, Any], words: str, tmp_path: Path) -> None:
    module = whole("sd1")
    tensors, _ = control_lora(module.state_dict())
    tensors = to_cldm(tensors, module.config) | {"lora_controlnet": torch.zeros(1)}
    tensors |= {name: torch.zeros(shape) for name, shape in changed.items() if shape is not None}
    tensors = {name: tensor for name, tensor in tensors.items() if changed.get(name, ()) is not None}
    with pytest.raises(CheckpointError, match=words):
        read_control(write(tmp_path / "x.safetensors", tensors))
