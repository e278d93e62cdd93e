import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import torch as torch_file
from safetensors.numpy import load_file, save_file

from latentrt.checkpoints.files.open import Checkpoint
from latentrt.engines.errors import CheckpointError, UsageError
from latentrt.export import Progress, export_package


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_importing_the_package_needs_no_torch() -> None:
    code = "import sys, latentrt.export, latentrt.checkpoints.files.open; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_opens_a_diffusers_folder(checkpoint: Path) -> None:
    found = Checkpoint.open(checkpoint)
    assert found.family == "sd1"
    assert found.scheduler["prediction_type"] == "epsilon"
    header = found.unet.tensors["conv_in.weight"]
    assert (header.dtype, header.shape) == ("F16", (48, 4, 3, 3))


def test_openclip_is_the_second_family(copy: Path) -> None:
    change(copy / "text_encoder" / "config.json", hidden_act="gelu")
    assert Checkpoint.open(copy).family == "sd2"


@pytest.mark.parametrize(
    ("pipeline", "family"),
    [
        ("StableDiffusionXLInstructPix2PixPipeline", "InstructPix2Pix for SDXL"),
        ("StableDiffusionInstructPix2PixPipeline", "InstructPix2Pix"),
        ("StableDiffusionUpscalePipeline", "upscaler"),
        ("StableDiffusionDepth2ImgPipeline", "depth-to-image"),
        ("StableUnCLIPPipeline", "Stable unCLIP with a prior"),
        ("StableDiffusion3Pipeline", "Stable Diffusion 3"),
        ("FluxPipeline", "Flux"),
        ("WuerstchenPipeline", "another family (WuerstchenPipeline)"),
    ],
)
def test_other_families_are_named(copy: Path, pipeline: str, family: str) -> None:
    change(copy / "model_index.json", _class_name=pipeline)
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(copy)
    assert family in error.value.found


@pytest.mark.parametrize(
    ("option", "value", "family"),
    [
        ("in_channels", 8, "InstructPix2Pix"),
        ("in_channels", 5, "depth-to-image"),
        ("in_channels", 6, "another family"),
        ("class_embed_type", "timestep", "upscaler"),
        ("attention_type", "gated", "GLIGEN"),
        ("num_class_embeds", 1000, "upscaler"),
        ("addition_embed_type", "text_image", "Kandinsky"),
        ("encoder_hid_dim_type", "image_proj", "IP-Adapter"),
    ],
)
def test_unets_of_other_families_are_named(copy: Path, option: str, value: object, family: str) -> None:
    change(copy / "unet" / "config.json", **{option: value})
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(copy)
    assert family in error.value.found
    assert f"{option} " in error.value.found


def test_only_pipelines_of_xl_read_that_an_empty_prompt_is_zeros(copy: Path) -> None:
    key = "force_zeros_for_empty_prompt"
    assert key not in inspect.signature(StableDiffusionPipeline.__init__).parameters
    change(copy / "model_index.json", **{key: True})
    assert not Checkpoint.open(copy).zero_empty_prompt


def test_a_context_width_for_each_block(copy: Path) -> None:
    change(copy / "unet" / "config.json", cross_attention_dim=[64, 80])
    with pytest.raises(CheckpointError, match="cross_attention_dim of its own"):
        Checkpoint.open(copy)


def test_a_context_of_another_width(copy: Path) -> None:
    change(copy / "unet" / "config.json", cross_attention_dim=64)
    with pytest.raises(CheckpointError, match="wants a context of width 64; expected 80"):
        Checkpoint.open(copy)


@pytest.mark.parametrize(("kind", "name"), [(torch.uint8, "U8"), (torch.int8, "I8")])
def test_quantised_weights_are_refused_before_anything_is_traced(
    copy: Path, tmp_path: Path, kind: torch.dtype, name: str
) -> None:
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = torch_file.load_file(path)
    tensors["conv_out.weight"] = tensors["conv_out.weight"].to(kind)
    torch_file.save_file(tensors, path)
    stages: list[Progress] = []
    with pytest.raises(CheckpointError, match=f"'conv_out.weight' as {name}; expected one of F64, F32"):
        export_package(copy, tmp_path / "package", progress=stages.append)
    assert not stages


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"class_embed_type": "projection"}, "image_encoder"),
        ({"addition_embed_type": "text_time", "addition_time_embed_dim": 8}, "text_encoder_2"),
    ],
)
def test_a_condition_without_what_makes_it(copy: Path, options: dict[str, Any], part: str) -> None:
    change(copy / "unet" / "config.json", projection_class_embeddings_input_dim=88, **options)
    with pytest.raises(CheckpointError, match=f"88 values from the {part}, and there is none"):
        Checkpoint.open(copy)


@pytest.mark.parametrize(
    ("changed", "defaults"),
    [
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}, (1, 0.0)),
        ({"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}, (1, 0.0)),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}, (50, 7.5)),
        ({"timestep_spacing": "trailing"}, (50, 7.5)),
        (
            {
                "_class_name": "EulerDiscreteScheduler",
                "timestep_spacing": "trailing",
                "rescale_betas_zero_snr": True,
            },
            (50, 7.5),
        ),
    ],
    ids=["sd-turbo", "sdxl-turbo", "euler", "ddim", "zero snr"],
)
def test_turbo_is_known_by_its_scheduler(
    copy: Path, changed: dict[str, Any], defaults: tuple[int, float]
) -> None:
    change(copy / "scheduler" / "scheduler_config.json", **changed)
    change(copy / "model_index.json", scheduler=["diffusers", changed.get("_class_name", "DDIMScheduler")])
    found = Checkpoint.open(copy)
    steps, scale = found.defaults["num_inference_steps"], found.defaults["guidance_scale"]
    assert (steps, scale) == defaults
    assert found.defaults["strength"] == (1.0 if steps == 1 else 0.8), "of one step no part can be run"


def test_what_the_unet_predicts_may_be_told(copy: Path) -> None:
    assert Checkpoint.open(copy).scheduler["prediction_type"] == "epsilon"
    assert (
        Checkpoint.open(copy, prediction_type="v_prediction").scheduler["prediction_type"] == "v_prediction"
    )
    with pytest.raises(UsageError, match="prediction_type is 'x0'"):
        Checkpoint.open(copy, prediction_type="x0")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        Checkpoint.open(tmp_path / "nothing")


@pytest.mark.parametrize(
    "missing",
    ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json", "vae/config.json"],
)
def test_a_missing_file_is_named(copy: Path, missing: str) -> None:
    (copy / missing).unlink()
    with pytest.raises(CheckpointError, match=f"{Path(missing).name} is missing"):
        Checkpoint.open(copy)


def test_a_missing_tokenizer(copy: Path) -> None:
    (copy / "tokenizer").rename(copy / "elsewhere")
    with pytest.raises(CheckpointError, match="tokenizer is missing"):
        Checkpoint.open(copy)


@pytest.mark.parametrize(("text", "what"), [("{", "is not JSON"), ("[1]", "holds a list")])
def test_a_damaged_config(copy: Path, text: str, what: str) -> None:
    (copy / "unet" / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=what):
        Checkpoint.open(copy)


def test_pickled_weights_are_refused_with_the_conversion(copy: Path) -> None:
    (copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (copy / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"pickles \(diffusion_pytorch_model\.bin\)") as error:
        Checkpoint.open(copy)
    assert "latentrt convert" in error.value.fix


def test_no_weights(copy: Path) -> None:
    (copy / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="vae has no weights"):
        Checkpoint.open(copy)


def test_damaged_weights(copy: Path) -> None:
    path = copy / "text_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors ends after 1000 bytes"):
        Checkpoint.open(copy)


def test_the_half_variant_is_taken_for_half_exports_or_when_alone(copy: Path) -> None:
    folder = copy / "unet"
    plain, half = (
        folder / "diffusion_pytorch_model.safetensors",
        folder / "diffusion_pytorch_model.fp16.safetensors",
    )
    half.write_bytes(plain.read_bytes())
    assert Checkpoint.open(copy).unet.tensors["conv_in.weight"].file == plain
    assert Checkpoint.open(copy, prefer_fp16=True).unet.tensors["conv_in.weight"].file == half
    plain.unlink()
    assert Checkpoint.open(copy).unet.tensors["conv_in.weight"].file == half


def test_shards(copy: Path) -> None:
    folder = copy / "unet"
    whole = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / f"shard-{number}.safetensors")
        weight_map |= dict.fromkeys(part, f"shard-{number}.safetensors")
    whole.unlink()
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    found = Checkpoint.open(copy).unet.tensors
    assert sorted(found) == names
    assert {header.file.name for header in found.values()} == {"shard-0.safetensors", "shard-1.safetensors"}
    (folder / "shard-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shard-1\.safetensors is missing"):
        Checkpoint.open(copy)


@pytest.mark.parametrize("weight_map", [{"a": "../../secret.safetensors"}, None, {"a": ""}])
def test_an_index_that_names_other_folders(copy: Path, weight_map: object) -> None:
    folder = copy / "unet"
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="no weight_map of plain file names"):
        Checkpoint.open(copy)
