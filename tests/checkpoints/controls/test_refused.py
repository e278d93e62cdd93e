"""What is no control, or none that can be used: refused with what it is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.controlnets.controlnet_xs import ControlNetXSAdapter
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from typer.testing import CliRunner

from latentrt.checkpoints.controls.read import read_control
from latentrt.cli import app
from latentrt.engines.errors import CheckpointError
from latentrt.export.pickles.convert import convert_pickle
from tests.checkpoints.controls.control_files import controlnet, t2i_adapter, to_cldm, to_tencent, write
from tests.checkpoints.controls.test_ip_adapters import UNETS, ip_layers, joined, projection, unet_of
from tests.checkpoints.odd_files import stored
from tests.export.ldm_files import Tensors


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


def faces(**more: torch.Tensor) -> Tensors:
    image_proj = {"proj.0.weight": zeros(64, 32), "proj.2.weight": zeros(64, 64), "norm.weight": zeros(16)}
    return {f"image_proj.{n}": t for n, t in image_proj.items()} | {
        "ip_adapter.1.to_k_ip.weight": zeros(4, 768),
        **more,
    }


def xs() -> Tensors:
    unet: Any = UNet2DConditionModel(**{**UNETS["sd1"], "norm_num_groups": 8})
    module: Any = ControlNetXSAdapter.from_unet(unet, size_ratio=0.5)
    return module.state_dict()


REFUSED: dict[str, Callable[[], Tensors]] = {
    "an IP-Adapter FaceID": faces,
    "an IP-Adapter FaceID ": lambda: faces(**{"ip_adapter.0.to_q_lora.down.weight": zeros(4, 4)}),
    "an IP-Adapter FaceID  ": lambda: {
        "image_proj.perceiver_resampler.proj_in.weight": zeros(4, 4),
        "image_proj.proj.0.weight": zeros(4, 4),
        "ip_adapter.1.to_k_ip.weight": zeros(4, 768),
    },
    "a ControlNet-LLLite": lambda: {"lllite_unet_input_blocks_4_1.conditioning1.0.weight": zeros(4)},
    "a ControlNet-XS": xs,
    "a ControlNet-XS ": lambda: {"control_model.control_model.enc_zero_convs_out.0.0.weight": zeros(4)},
    "a style adapter (T2I-Adapter's)": lambda: {
        "style_embedding": zeros(1, 8, 4),
        "transformer_layes.0.attn.in_proj_weight": zeros(4),
        "proj": zeros(4),
    },
    "a fuser of T2I-Adapters (CoAdapter)": lambda: {
        "task_embedding": zeros(16, 4),
        "positional_embedding": zeros(4, 4),
        "spatial_feat_mapping.0.1.weight": zeros(4, 4),
        "spatial_ch_projs.0.weight": zeros(4, 4),
        "seq_proj": zeros(4, 4),
    },
    "a ControlNet of another architecture (a diffusion transformer)": lambda: {
        "controlnet_x_embedder.weight": zeros(4, 4)
    },
    "AnimateDiff": lambda: {
        "controlnet_cond_embedding.conv_in.weight": zeros(4),
        "down_blocks.0.motion_modules.0.norm.weight": zeros(4),
    },
    "a LoRA (kohya's names)": lambda: {
        "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": zeros(4, 4)
    },
    "a whole checkpoint": lambda: {name: t for name, t in stored("sd1").items() if not t.is_meta},
    "an autoencoder alone": lambda: {"first_stage_model.encoder.conv_in.weight": zeros(32, 3, 3, 3)},
    "a textual inversion": lambda: {"emb_params": zeros(2, 768)},
    "a UNet alone": lambda: {"conv_in.weight": zeros(4), "down_blocks.0.resnets.0.norm1.bias": zeros(4)},
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_file(what: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", REFUSED[what]())
    with pytest.raises(CheckpointError) as error:
        read_control(path)
    assert error.value.found == f"{path} is {what.strip()}"
    assert error.value.expected.startswith("a ControlNet, a T2I-Adapter or an IP-Adapter of ")
    assert error.value.fix


def test_folders(tmp_path: Path) -> None:
    unet: Any = UNet2DConditionModel(**{**UNETS["sd1"], "norm_num_groups": 8})
    made: Any = ControlNetXSAdapter.from_unet(unet, size_ratio=0.5)
    made.save_pretrained(tmp_path / "xs")
    unet.save_pretrained(tmp_path / "unet")
    for name in ("a", "b"):  # one alone is opened
        write(tmp_path / "files" / f"{name}.safetensors", controlnet("sd2").state_dict())
    write(tmp_path / "file" / "a.safetensors", controlnet("sd2").state_dict())
    assert read_control(tmp_path / "file").name == "a"
    (tmp_path / "empty").mkdir()
    for name, words in {
        "xs": "is a ControlNet-XS' folder",
        "unet": "is a UNet's folder",
        "files": "is a folder of files",
        "empty": "has no weights",
    }.items():
        with pytest.raises(CheckpointError, match=words):
            read_control(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x.safetensors", "does not exist; expected a ControlNet.* Check the path"),
        ("reference_only", "is no file: reference-only hooks the UNet's own attention.* Use an IP-Adapter"),
    ],
)
def test_no_file(name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=words):
        read_control(tmp_path / name)


def test_quantised_weights(tmp_path: Path) -> None:
    tensors = controlnet("sd2").state_dict()
    scaled = tensors | {"conv_in.scale_weight": torch.ones(1)}
    with pytest.raises(CheckpointError, match="weights in scaled fp8"):
        read_control(write(tmp_path / "a.safetensors", scaled))
    integers = tensors | {"conv_in.weight": tensors["conv_in.weight"].to(torch.int8)}
    with pytest.raises(CheckpointError, match=r"stores the weight 'conv_in\.weight' as I8"):
        read_control(write(tmp_path / "b.safetensors", integers))


def _pickled(name: str) -> Any:
    """What torch saved, and the same as safetensors have it."""
    if name == "control_v11p_sd15_canny.pth":
        module: Any = controlnet("sd1")
        tensors = {f"control_model.{n}": t for n, t in to_cldm(module.state_dict(), module.config).items()}
        return tensors, tensors
    if name == "control-in-a-state-dict.ckpt":
        module = controlnet("sd2")
        tensors = to_cldm(module.state_dict(), module.config)
        return {"state_dict": tensors, "global_step": 3}, tensors
    if name == "t2iadapter_canny_sd15v2.pth":
        module = t2i_adapter("full")
        tensors = to_tencent(module.state_dict(), module.config)
        return {"adapter": tensors}, tensors
    unet: Any = unet_of("sd1")
    image_proj, layers = projection("plus", 768), ip_layers(unet)
    return {"image_proj": image_proj, "ip_adapter": layers}, joined(image_proj, layers)


@pytest.mark.parametrize(
    "name",
    [
        "control_v11p_sd15_canny.pth",
        "control-in-a-state-dict.ckpt",
        "t2iadapter_canny_sd15v2.pth",
        "ip-adapter-plus_sd15.bin",
    ],
)
def test_pickles_are_converted(name: str, tmp_path: Path) -> None:
    """The message names the command, and what it writes is the same as the safetensors file."""
    pickled, tensors = _pickled(name)
    path = tmp_path / name
    torch.save(pickled, path)
    with pytest.raises(CheckpointError, match="is a pickle: reading one can run code") as error:
        read_control(path)
    target = path.with_suffix(".safetensors")
    assert error.value.fix.endswith(f"latentrt convert {path} -o {target}")
    done = convert_pickle(path, target)
    assert done.tensors == len(tensors)
    found, wanted = read_control(target), read_control(write(tmp_path / "b.safetensors", tensors))
    assert found.part.config == wanted.part.config
    assert {n: (h.name, h.shape) for n, h in found.part.tensors.items()} == {
        n: (h.name, h.shape) for n, h in wanted.part.tensors.items()
    }


def test_pickles_in_a_folder_are_converted(tmp_path: Path) -> None:
    ControlNetModel(block_out_channels=(32,), down_block_types=("DownBlock2D",)).save_pretrained(
        tmp_path, safe_serialization=False
    )
    with pytest.raises(CheckpointError, match="has its weights as pickles") as error:
        read_control(tmp_path)
    assert "latentrt convert" in error.value.fix


def test_inspect_says_what_it_is(tmp_path: Path) -> None:
    path = write(tmp_path / "union.safetensors", controlnet("promax").state_dict())
    answer = CliRunner().invoke(app, ["inspect", str(path)])
    assert answer.exit_code == 0, answer.output
    for words in (
        "a ControlNet (Union) for SDXL",
        "widths 64, 64, 128",
        "reads a context of 2048 numbers a token",
        "reads a picture of 3 channels, rgb",
        "control types: 0 openpose, 1 depth, 2 scribble, 3 canny, 4 normal, 5 segment, 6 tile, 7 repaint",
    ):
        assert words in answer.output
    folder = tmp_path / "folder"
    t2i_adapter("light").save_pretrained(folder)
    answer = CliRunner().invoke(app, ["inspect", str(folder)])
    assert "a T2I-Adapter (light) for Stable Diffusion 1.x" in answer.output
    assert f"--t2i-adapter {folder} --control-image PICTURE" in answer.output
    assert "cannot be used" not in answer.output


@pytest.mark.parametrize(
    ("option", "tensors"),
    [
        ("--control-net", lambda: controlnet("promax").state_dict()),
        ("--t2i-adapter", lambda: t2i_adapter("light").state_dict()),
        ("--ip-adapter", lambda: joined(projection("plain", 768), ip_layers(unet_of("sd1")))),
    ],
)
def test_inspect_says_how_a_file_steers(option: str, tensors: Callable[[], Tensors], tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", tensors())
    answer = CliRunner().invoke(app, ["inspect", str(path)])
    assert f" {option} {path} " in answer.output
    assert "cannot be used" not in answer.output


def test_inspect_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    tensors = controlnet("sd2").state_dict()
    del tensors["conv_in.bias"]
    answer = CliRunner().invoke(app, ["inspect", str(write(tmp_path / "x.safetensors", tensors))])
    assert answer.exit_code == 0
    assert "cannot be used: " in answer.output
    assert "lacks the tensor 'conv_in.bias'" in answer.output
