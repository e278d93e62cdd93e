"""One-file checkpoints against folders of the same weights, and against diffusers' own reader of them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig

from latentrt.checkpoints.files.component import Component, read_headers
from latentrt.checkpoints.files.single_file import SingleFile, open_single_file
from latentrt.export.nets.torch_net import read_as_torch
from latentrt.export.pickles.convert import convert_pickle
from tests.export.ldm_files import (
    FULL,
    TINY,
    Tensors,
    build,
    one_file,
    tensors_of,
    text_class,
    write_header_only,
)


def save(tensors: Tensors, path: Path, dtype: torch.dtype, metadata: dict[str, str] | None = None) -> Path:
    plain = {
        n: (torch.arange(77)[None] if t.is_meta else t.detach().to(dtype)).contiguous()
        for n, t in tensors.items()
    }
    save_file({name: tensor.clone() for name, tensor in plain.items()}, path, metadata=metadata)
    return path


@dataclass(frozen=True)
class Case:
    family: str
    modules: dict[str, Any]
    path: Path
    dtype: torch.dtype

    @property
    def opened(self) -> SingleFile:
        return open_single_file(self.path)


@pytest.fixture(scope="module", params=list(TINY))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family = request.param
    dtype = {"sd1": torch.float16, "sd2": torch.float32, "sdxl": torch.bfloat16}.get(family, torch.float16)
    modules = {part: module.to(dtype) for part, module in build(TINY[family]).items()}
    folder = tmp_path_factory.mktemp(family)
    for part, module in modules.items():
        module.save_pretrained(folder / part)
    path = save(one_file(modules, family), folder / "model.safetensors", dtype)
    return Case(family, modules, path, dtype)


def test_the_file_gives_what_the_folder_has(case: Case) -> None:
    opened = case.opened
    assert (opened.family, set(opened.components)) == (case.family, set(case.modules))
    for part, component in opened.components.items():
        wanted = tensors_of(part, case.modules[part])
        found = read_as_torch(component.tensors)
        assert set(found) == set(wanted), part
        for name, tensor in found.items():
            assert tensor.dtype == case.dtype
            assert tensor.shape == component.tensors[name].shape
            assert torch.equal(tensor, wanted[name]), f"{part} {name}"


def test_derived_configs_build_modules_that_load_the_tensors(case: Case) -> None:
    for part, component in case.opened.components.items():
        check_config(component, getattr(TINY[case.family], part))
        with torch.device("meta"):
            module = build_from_config(part, component.config)
        tensors = read_as_torch(component.tensors)
        if part == "text_encoder":
            tensors = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
        module.load_state_dict(tensors, strict=True, assign=True)


def build_from_config(part: str, config: Any) -> Any:
    if part == "unet":
        return UNet2DConditionModel.from_config(dict(config))
    if part == "vae":
        return AutoencoderKL.from_config(dict(config))
    return text_class(part)(CLIPTextConfig(**config))


def check_config(component: Component, wanted: dict[str, Any]) -> None:
    found = {
        key: component.config.get(key)
        for key in wanted
        if key != "projection_dim" or component.name[-1] == "2"
    }
    assert json.loads(json.dumps(found)) == json.loads(json.dumps({key: wanted[key] for key in found}))


def test_diffusers_reads_the_same_tensors_from_the_file(case: Case) -> None:
    """The oracle that the file is a true one, and not only the inverse of our own tables."""
    folder = case.path.parent
    stored = single_file_utils.load_single_file_checkpoint(str(case.path))
    for part, component in case.opened.components.items():
        if part in ("unet", "vae"):
            kind = UNet2DConditionModel if part == "unet" else AutoencoderKL
            module: Any = kind.from_single_file(
                str(case.path),
                config=str(folder),
                subfolder=part,
                torch_dtype=case.dtype,
                local_files_only=True,
            )
        else:
            module = single_file_utils.create_diffusers_clip_model_from_ldm(
                text_class(part),
                dict(stored),
                subfolder=part,
                config=str(folder),
                torch_dtype=case.dtype,
                local_files_only=True,
            )
        found = read_as_torch(component.tensors)
        theirs = tensors_of(part, module)
        assert set(found) == set(theirs)
        assert all(torch.equal(found[name], theirs[name]) for name in found), part


@pytest.mark.parametrize("case", ["sd1"], indirect=True)
def test_a_converted_pickle_is_the_same_file(case: Case, tmp_path: Path) -> None:
    torch.save({"state_dict": load_file(case.path), "global_step": 1}, tmp_path / "model.ckpt")
    convert_pickle(tmp_path / "model.ckpt", tmp_path / "model.safetensors")
    assert {n: (t.dtype, t.shape) for n, t in read_headers(tmp_path / "model.safetensors").items()} == {
        n: (t.dtype, t.shape) for n, t in read_headers(case.path).items()
    }
    for part, component in open_single_file(tmp_path / "model.safetensors").components.items():
        wanted = read_as_torch(case.opened.components[part].tensors)
        assert all(torch.equal(tensor, wanted[n]) for n, tensor in read_as_torch(component.tensors).items())


@pytest.mark.parametrize("family", FULL)
def test_full_sizes(family: str, tmp_path: Path) -> None:
    """A header of the real size; nothing is allocated. Configs are the published ones."""
    with torch.device("meta"):
        modules = build(FULL[family])
        stored = one_file(modules, family)
    write_header_only(tmp_path / "model.safetensors", stored)
    opened = open_single_file(tmp_path / "model.safetensors")
    assert opened.family == family
    for part, component in opened.components.items():
        wanted = {name: tuple(tensor.shape) for name, tensor in tensors_of(part, modules[part]).items()}
        assert {name: tensor.shape for name, tensor in component.tensors.items()} == wanted, part
        check_config(component, getattr(FULL[family], part))
