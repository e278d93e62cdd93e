import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from latentrt.engines.errors import CheckpointError
from latentrt.export.checkpoint import Checkpoint


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_importing_the_package_needs_no_torch() -> None:
    code = "import sys, latentrt.export, latentrt.export.checkpoint; print('torch' in sys.modules)"
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
        ("StableDiffusionXLPipeline", "SDXL"),
        ("StableDiffusionXLInpaintPipeline", "SDXL inpainting"),
        ("StableDiffusionInpaintPipeline", "Stable Diffusion inpainting"),
        ("StableUnCLIPImg2ImgPipeline", "unCLIP"),
        ("StableDiffusion3Pipeline", "Stable Diffusion 3"),
        ("LatentConsistencyModelPipeline", "latent consistency"),
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
        ("in_channels", 9, "inpainting"),
        ("in_channels", 5, "depth-to-image"),
        ("in_channels", 6, "another family"),
        ("time_cond_proj_dim", 256, "latent consistency"),
        ("class_embed_type", "projection", "unCLIP"),
        ("num_class_embeds", 1000, "upscaler"),
        ("addition_embed_type", "text_time", "SDXL"),
        ("encoder_hid_dim_type", "image_proj", "IP-Adapter"),
    ],
)
def test_unets_of_other_families_are_named(copy: Path, option: str, value: object, family: str) -> None:
    change(copy / "unet" / "config.json", **{option: value})
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(copy)
    assert family in error.value.found
    assert f"{option} " in error.value.found


def test_a_context_width_for_each_block(copy: Path) -> None:
    change(copy / "unet" / "config.json", cross_attention_dim=[64, 80])
    with pytest.raises(CheckpointError, match="cross_attention_dim of its own"):
        Checkpoint.open(copy)


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
    assert "save_pretrained" in error.value.fix


def test_no_weights(copy: Path) -> None:
    (copy / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="vae has no weights"):
        Checkpoint.open(copy)


def test_damaged_weights(copy: Path) -> None:
    path = copy / "text_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
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


@pytest.mark.parametrize(
    ("key", "family"),
    [
        ("cond_stage_model.transformer.text_model.embeddings.token_embedding.weight", "1.x"),
        ("cond_stage_model.model.transformer.resblocks.9.mlp.c_proj.bias", "2.x"),
        ("conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias", "SDXL"),
        ("double_blocks.0.img_attn.norm.key_norm.scale", "Flux"),
        ("something.else", "an unknown family"),
    ],
)
def test_single_files_are_named(tmp_path: Path, key: str, family: str) -> None:
    text = json.dumps({key: {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(CheckpointError, match=family) as error:
        Checkpoint.open(path)
    assert "from_single_file" in error.value.fix


def test_a_damaged_single_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\x02\x00\x00\x00\x00\x00\x00\x00{]")
    with pytest.raises(CheckpointError, match="damaged"):
        Checkpoint.open(path)


def test_a_pickled_single_file(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match="a pickle can run code"):
        Checkpoint.open(path)
