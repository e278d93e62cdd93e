"""ControlNets in every layout, against diffusers' classes and its own converter."""

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.controlnets.controlnet_union import ControlNetUnionModel

from latentrt.checkpoints.controls.control_file import CONTROL_TYPES, ControlFile
from latentrt.checkpoints.controls.controlnet import DEFAULTS
from latentrt.checkpoints.controls.controlnet_shapes import controlnet_shapes
from latentrt.checkpoints.controls.read import read_control
from latentrt.checkpoints.files.component import read_tensors
from latentrt.engines.errors import CheckpointError
from tests.checkpoints.controls.control_files import (
    CONTROLNETS,
    FAMILIES,
    UNIONS,
    controlnet,
    to_cldm,
    write,
)
from tests.export.ldm_files import FULL, Tensors

CLASSES: dict[str, Any] = {"ControlNetModel": ControlNetModel, "ControlNetUnionModel": ControlNetUnionModel}
MARK = torch.zeros(1)
# What no name or shape says, or says in another way.
UNSAID = {"transformer_layers_per_block", "num_trans_head"}


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def check(found: ControlFile, module: Any, unsaid: set[str] = UNSAID) -> None:
    """The file has this module's tensors and its config, and the class builds the same of that config."""
    wanted: Tensors = module.state_dict()
    read = read_tensors(found.part.tensors)
    assert read.keys() == wanted.keys()
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(read[name].astype(np.float32), tensor.float().numpy(), err_msg=name)
    config = dict(found.part.config)
    assert config["_class_name"] == type(module).__name__
    made = {key: plain(value) for key, value in dict(module.config).items() if not key.startswith("_")}
    assert {key: made[key] for key in made.keys() - unsaid} == {
        key: plain(config[key]) for key in made.keys() - unsaid
    }
    with torch.device("meta"):
        again = type(module)(**{key: config[key] for key in made})
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in wanted.items()}


LAYOUTS: Mapping[str, Callable[[Tensors, Any], Tensors]] = {
    "diffusers": lambda tensors, config: tensors,
    "cldm": to_cldm,
    "cldm, control_model.": lambda tensors, config: {
        f"control_model.{name}": tensor for name, tensor in to_cldm(tensors, config).items()
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONTROLNETS)
def test_a_file(name: str, layout: str, tmp_path: Path) -> None:
    module = controlnet(name)
    path = write(tmp_path / "my_control.safetensors", LAYOUTS[layout](module.state_dict(), module.config))
    found = read_control(path)
    heads = {"attention_head_dim"} if name == "sdxl-small" else set[str]()
    check(found, module, UNSAID | heads)
    assert (found.root, found.name, found.kind, found.what) == (
        path,
        "my_control",
        "controlnet",
        "a ControlNet",
    )
    assert found.family == FAMILIES[name]
    assert (found.needs_base, found.channel_order, found.global_pool, found.notes) == ("", "rgb", False, ())


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_names_are_those_of_diffusers_converter(name: str, tmp_path: Path) -> None:
    """Each tensor is called as `ControlNetModel.from_single_file` calls it, which does not know XL's."""
    module = controlnet(name)
    stored = to_cldm(module.state_dict(), module.config)
    path = write(tmp_path / "x.safetensors", stored)
    converted = convert_controlnet_checkpoint(dict(stored), module.config)
    found = read_control(path).part.tensors
    assert {new: header.name for new, header in found.items()} == {
        new: next(old for old, one in stored.items() if one is tensor) for new, tensor in converted.items()
    }


@pytest.mark.parametrize("name", UNIONS)
def test_a_union(name: str, tmp_path: Path) -> None:
    module = controlnet(name)
    found = read_control(write(tmp_path / "union.safetensors", module.state_dict()))
    check(found, module)
    types = UNIONS[name]["num_control_type"]
    assert (found.what, found.family) == ("a ControlNet (Union)", "sdxl")
    assert found.control_types == CONTROL_TYPES[:types]
    assert found.control_types[3] == "canny"
    assert found.control_types[-1] == {6: "segment", 8: "repaint"}[types]


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("size", ["10GB", "500KB"])
@pytest.mark.parametrize("name", ["sd1", "sdxl-mid", "promax"])
def test_a_folder(name: str, size: str, variant: str | None, tmp_path: Path) -> None:
    """One file, or shards with an index; of the variant that there is."""
    module = controlnet(name).half()
    module.save_pretrained(tmp_path / "folder", variant=variant, max_shard_size=size)
    found = read_control(tmp_path / "folder")
    check(found, module, set())
    assert found.name == "folder"
    files = {header.file for header in found.part.tensors.values()}
    assert (len(files) > 1) == (size == "500KB")


def test_which_variant(tmp_path: Path) -> None:
    module = controlnet("sd2")
    module.save_pretrained(tmp_path)
    module.half().save_pretrained(tmp_path, variant="fp16")
    types = {
        prefer: {header.dtype for header in read_control(tmp_path, prefer_fp16=prefer).part.tensors.values()}
        for prefer in (False, True)
    }
    assert types == {False: {"F32"}, True: {"F16"}}


def test_what_only_a_folder_says(tmp_path: Path) -> None:
    module = controlnet("sd2")
    module.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"controlnet_conditioning_channel_order": "bgr", "global_pool_conditions": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = read_control(tmp_path)
    assert (found.channel_order, found.global_pool, found.notes) == ("bgr", True, ())
    assert "its residuals are averaged over the picture" in found.lines()


def test_an_early_config_has_the_defaults_of_its_class(tmp_path: Path) -> None:
    """The configs of 1.0 have neither the mid block's type nor the picture's channels."""
    module = controlnet("sd1")
    module.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in (
        "mid_block_type",
        "conditioning_channels",
        "transformer_layers_per_block",
        "_diffusers_version",
    ):
        del config[key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    check(read_control(tmp_path), module, set())


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_defaults_are_those_of_diffusers(name: str) -> None:
    parameters = inspect.signature(CLASSES[name].__init__).parameters
    assert {key: plain(one.default) for key, one in parameters.items() if key != "self"} == DEFAULTS[name]


@pytest.mark.parametrize("class_name", [None, "ControlNetModel", "ControlNetModel_Union"])
def test_the_first_union_had_the_class_of_another(class_name: str | None, tmp_path: Path) -> None:
    """xinsir's repository: class and number of types are not those that diffusers has now."""
    module = controlnet("promax")
    module.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["num_control_type"]
    config["_class_name"] = class_name or config["_class_name"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = read_control(tmp_path)
    assert len(found.control_types) == 8
    check(found, module, set())


@pytest.mark.parametrize(
    ("name", "pools"),
    [
        ("control_v11e_sd15_shuffle", True),
        ("control_v11e_sd15_shuffle_fp16", True),
        ("Shuffle", True),
        ("reshuffled", False),
        ("control_v11p_sd15_canny", False),
    ],
)
def test_shuffle_pools(name: str, pools: bool, tmp_path: Path) -> None:
    found = read_control(write(tmp_path / f"{name}.safetensors", controlnet("sd2").state_dict()))
    assert (found.global_pool, found.part.config["global_pool_conditions"]) == (pools, pools)
    assert [note.startswith("it is called shuffle") for note in found.notes] == [True] * pools


def test_a_control_with_a_checkpoint_beside_it(tmp_path: Path) -> None:
    """The files of 1.0 (5.7 GB) have the whole of 1.5 too."""
    module = controlnet("sd1")
    stored = {f"control_model.{n}": t for n, t in to_cldm(module.state_dict(), module.config).items()}
    more = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, 4, 3, 3),
        "model_ema.decay": torch.zeros(()),
    }
    found = read_control(write(tmp_path / "x.safetensors", stored | more))
    check(found, module)
    (note,) = found.notes
    assert note.startswith("tensors that are not used: ")
    assert "model.diffusion_model.input_blocks" in note


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_the_shapes_of_published_sizes(family: str) -> None:
    wanted = {
        key: value for key, value in FULL[family].unet.items() if key not in ("up_block_types", "sample_size")
    }
    with torch.device("meta"):
        module: Any = ControlNetModel(**wanted)
    shapes = controlnet_shapes({**module.config, "_class_name": "ControlNetModel"})
    assert shapes == {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    residuals = [
        name for name in shapes if name.startswith("controlnet_down_blocks.") and name.endswith("bias")
    ]
    assert len(residuals) == (9 if family == "sdxl" else 12)


@pytest.mark.parametrize("hint", [(16, 32, 96, 256), (48, 96, 192, 384)])
def test_the_shapes_of_a_union_of_published_size(hint: tuple[int, ...]) -> None:
    """ProMax' published config has the first hint encoder; diffusers' class has the second by default."""
    wanted = {
        key: value for key, value in FULL["sdxl"].unet.items() if key not in ("up_block_types", "sample_size")
    }
    with torch.device("meta"):
        module: Any = ControlNetUnionModel(
            **wanted, num_control_type=8, conditioning_embedding_out_channels=hint
        )
    shapes = controlnet_shapes({**module.config, "_class_name": "ControlNetUnionModel"})
    assert shapes == {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def test_how_wide_ids_are_is_not_said_by_narrow_ones(tmp_path: Path) -> None:
    """All of XL have 256 numbers each; what is narrower was never published, and is its checkpoint's."""
    narrow = {"addition_time_embed_dim": 16, "projection_class_embeddings_input_dim": 48 + 6 * 16}
    module: Any = ControlNetModel(**{**CONTROLNETS["sdxl"], **narrow})
    found = read_control(write(tmp_path / "x.safetensors", module.state_dict()))
    assert found.part.config["addition_time_embed_dim"] is None
    assert found.notes == ("it does not say how wide its size ids are: as its checkpoint's",)
    module.save_pretrained(tmp_path / "folder")
    assert read_control(tmp_path / "folder").part.config["addition_time_embed_dim"] == 16
    union: Any = ControlNetUnionModel(**{**UNIONS["union"], **narrow})
    check(read_control(write(tmp_path / "y.safetensors", union.state_dict())), union)


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_a_width_of_nobody_is_told_by_its_projections(name: str, tmp_path: Path) -> None:
    module: Any = ControlNetModel(**{**CONTROLNETS[name], "cross_attention_dim": 48})
    assert read_control(write(tmp_path / "x.safetensors", module.state_dict())).family == name


def test_buffers_are_left_out(tmp_path: Path) -> None:
    buffer = torch.zeros((), dtype=torch.int64)
    tensors = controlnet("sd2").state_dict() | {"norm.num_batches_tracked": buffer}
    check(read_control(write(tmp_path / "x.safetensors", tensors)), controlnet("sd2"))


def test_in_a_hubs_cache_it_is_called_as_its_repository(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--diffusers--controlnet-x" / "snapshots" / ("0123456789" * 4)
    controlnet("sd2").save_pretrained(snapshot)
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text(snapshot.name)
    assert read_control(snapshot).name == "controlnet-x"
    assert read_control(snapshot.parent.parent).root == snapshot
    assert read_control(snapshot / "diffusion_pytorch_model.safetensors").name == "controlnet-x"


HINT = "controlnet_cond_embedding."
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0."


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"mid_block.resnets.1.norm1.bias": None}, "lacks the tensor 'mid_block.resnets.1.norm1.bias'"),
        (
            {f"{BLOCK}attn1.to_q.weight": None, f"{BLOCK}attn1.to_k.weight": None},
            "lacks the tensor .*to_q.weight' and 1 more",
        ),
        ({"conv_in.weight": None}, "lacks the tensor 'conv_in.weight'"),
        ({f"{HINT}conv_in.weight": None}, "lacks the tensor 'controlnet_cond_embedding.conv_in.weight'"),
        (
            {"conv_in.weight": (64, 4)},
            r"has the tensor 'conv_in.weight' of the shape \(64, 4\); expected 4 axes",
        ),
        ({"conv_in.bias": (32,)}, r"'conv_in.bias' of the shape \(32,\); expected \(64,\)"),
        ({"conv_in.weight": (0, 4, 3, 3)}, "none empty"),
        (
            {"down_blocks.1.extra.weight": (3,)},
            "has the tensor 'down_blocks.1.extra.weight' that a ControlNet has not",
        ),
    ],
)
def test_what_is_damaged(changed: dict[str, Any], words: str, tmp_path: Path) -> None:
    tensors = controlnet("sd2").state_dict()
    tensors |= {name: torch.zeros(shape) for name, shape in changed.items() if shape is not None}
    tensors = {name: tensor for name, tensor in tensors.items() if changed.get(name, ()) is not None}
    path = write(tmp_path / "x.safetensors", tensors)
    with pytest.raises(CheckpointError, match=words) as error:
        read_control(path)
    assert str(path) in error.value.found
    assert "Download it again" in error.value.fix


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"block_out_channels": []}, "block_out_channels is .*not empty"),
        ({"block_out_channels": [64, 64]}, "has the tensor '.*' of the shape"),
        ({"block_out_channels": [64]}, "of other lengths than block_out_channels"),
        ({"transformer_layers_per_block": [1]}, "of other lengths than block_out_channels"),
        ({"controlnet_conditioning_channel_order": "gbr"}, "expected rgb or bgr"),
        ({"down_block_types": ["SimpleCrossAttnDownBlock2D", "DownBlock2D"]}, "down_block_types"),
        ({"class_embed_type": "timestep"}, "class_embed_type is 'timestep'; expected None"),
        ({"addition_embed_type": "text"}, "addition_embed_type is 'text'; expected None or 'text_time'"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
        ({"addition_embed_type": "text_time"}, "has no addition_time_embed_dim; expected a whole number"),
    ],
)
def test_a_config_that_is_no_controlnets(changed: dict[str, Any], words: str, tmp_path: Path) -> None:
    controlnet("sd2").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changed))
    with pytest.raises(CheckpointError, match=words):
        read_control(tmp_path)
