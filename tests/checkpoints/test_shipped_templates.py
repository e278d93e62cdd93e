"""The archive that ships: every architecture of the list is in it, and a fresh trace is what it holds."""

import hashlib
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import diffusers
import onnx_ir as ir
import pytest
import torch
from diffusers.models.adapter import T2IAdapter
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.controlnets.controlnet_union import ControlNetUnionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from latentrt.checkpoints.controls.control_file import KINDS, VISION, ControlFile
from latentrt.checkpoints.files.component import Component, TensorHeader
from latentrt.checkpoints.files.open import Checkpoint
from latentrt.checkpoints.files.source import Source
from latentrt.checkpoints.graphs.weights import weight_shapes
from latentrt.checkpoints.precision.calibration import components
from latentrt.checkpoints.templates.archive import DTYPES, SHIPPED, read_graph, read_index
from latentrt.checkpoints.templates.find import net_template
from latentrt.checkpoints.templates.keys import net_key
from latentrt.engines.errors import CheckpointError
from latentrt.engines.spec import NetSpec
from latentrt.export.architectures import ARCHITECTURES, Architecture
from latentrt.export.templates import blank_checkpoint, class_defaults
from latentrt.export.traced import trace
from tests.export.ldm_files import FULL, build, one_file, write_header_only

INDEX = read_index(SHIPPED)
TRACED_HERE = all(
    version(name) == found for name, found in (pair.split() for pair in INDEX["producer"].split(", "))
)


def module_of(name: str, config: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """A part as its library makes it, and the whole config that the library would write."""
    kinds: dict[str, Any] = {
        "text_encoder": (CLIPTextModel, CLIPTextConfig),
        "text_encoder_2": (CLIPTextModelWithProjection, CLIPTextConfig),
        "image_encoder": (CLIPVisionModelWithProjection, CLIPVisionConfig),
        "vision": (CLIPVisionModelWithProjection, CLIPVisionConfig),
    }
    with torch.device("meta"):
        if name in kinds:
            kind, kind_config = kinds[name]
            made = kind_config(**config)
            return kind(made), made.to_dict()
        if name == "ip-adapter":
            return ip_adapter(config), dict(config)
        union = config.get("_class_name") == "ControlNetUnionModel"
        control = ControlNetUnionModel if union else ControlNetModel
        nets: dict[Any, Any] = {
            "unet": UNet2DConditionModel,
            "controlnet": control,
            "t2i-adapter": T2IAdapter,
        }
        tiny = config.get("_class_name") == "AutoencoderTiny"
        kind = nets.get(name, AutoencoderTiny if tiny else AutoencoderKL)
        net: Any = kind.from_config(dict(config))
    return net, {"_class_name": kind.__name__, **dict(net.config)}


def ip_adapter(config: Mapping[str, Any]) -> nn.Module:
    """An image projection of diffusers' with the linear layers of its attention processors."""
    own = dict(config)
    widths, kind = own.pop("layer_widths"), getattr(diffusers.models.embeddings, own.pop("_class_name"))
    context = own.get("cross_attention_dim") or own["output_dims"]
    layers = [
        nn.ModuleDict({f"to_{letter}_ip": nn.Linear(context, width, bias=False) for letter in "kv"})
        for width in widths
    ]
    return nn.ModuleDict({"image_projection": kind(**own), "layers": nn.ModuleList(layers)})


def part_of(name: str, config: Mapping[str, Any]) -> Component:
    """A part of a folder, with the tensors that its library has."""
    if name == "image_normalizer":
        shapes = dict.fromkeys(("mean", "std"), (1, config["embedding_dim"]))
    else:
        net, config = module_of(name, config)
        shapes = {key: tuple(tensor.shape) for key, tensor in net.state_dict().items()}
    headers = {
        key: TensorHeader(file=Path("weights"), name=key, dtype="F16", shape=shape)
        for key, shape in shapes.items()
    }
    return Component(name=name, folder=Path(name), config=config, tensors=headers)


def folder_of(architecture: Architecture) -> Source:
    parts = {name: part_of(name, config) for name, config in architecture.parts.items()}
    if kind := next((kind for kind in KINDS if kind in parts), ""):
        return ControlFile(
            root=Path("model"),
            kind=kind,
            family="",
            what="",
            part=parts[kind],
            encoder=parts.get(VISION),
            image_features=architecture.image_features,
        )
    configs: dict[str, Mapping[str, Any]] = {"scheduler": {}}
    configs["feature_extractor"] = architecture.feature_extractor or {}
    return Checkpoint(root=Path("model"), parts=parts, tokenizers={}, configs=configs, defaults={})


def test_it_is_small() -> None:
    assert SHIPPED.stat().st_size <= 4e6


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_has_its_templates(name: str) -> None:
    """By the configs that the libraries write, with every default spelled out, and their tensors."""
    source = folder_of(ARCHITECTURES[name])
    for component in components(source):
        found = net_template(source, component, "fp32")
        if component == "unet":
            wanted = {key: header.shape for key, header in source.parts["unet"].tensors.items()}
            assert weight_shapes(found.model) == wanted


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_graph_keeps_its_contract(dtype: str) -> None:
    for row in INDEX["templates"]:
        graph = row["graphs"][dtype]
        model, contract = read_graph(SHIPPED, graph), NetSpec.from_json(graph["spec"])
        values = (*model.graph.inputs, *model.graph.outputs)
        for value, item in zip(values, (*contract.inputs, *contract.outputs), strict=True):
            assert value.shape is not None
            assert value.dtype is not None
            shape = [dim if isinstance(dim, int) else dim.value for dim in value.shape]
            assert (value.name, value.dtype.numpy(), shape) == (item.name, item.dtype, list(item.shape))


@pytest.mark.parametrize("family", FULL)
def test_files_of_the_published_sizes_have_their_templates(family: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        stored = one_file(build(FULL[family]), family)
    write_header_only(tmp_path / "model.safetensors", stored)
    source = Checkpoint.open(tmp_path / "model.safetensors")
    for component in components(source):
        assert net_template(source, component, "fp32").architecture in ("sd1", "sd2", "sdxl", "sdxl-refiner")


@pytest.mark.parametrize(
    ("unet", "words"),
    [
        ({"attention_head_dim": 10}, "attention_head_dim is 10, in the nearest (sd1) 8"),
        (
            {"block_out_channels": [320, 640, 1280, 960]},
            "block_out_channels is [320, 640, 1280, 960], in the",
        ),
        ({"transformer_layers_per_block": 2}, "the tensor 'down_blocks.0.attentions.0.transformer_blocks.1."),
    ],
)
def test_another_architecture_is_refused(unet: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        net_template(folder_of(ARCHITECTURES["sd1"].with_unet(**unet)), "unet", "fp16")
    assert words in caught.value.found


READER = """
import sys
for name in ("torch", "diffusers", "transformers", "onnxscript"):
    sys.modules[name] = None  # an import of it raises ImportError
from pathlib import Path
from latentrt.checkpoints.files.open import Checkpoint
from latentrt.checkpoints.templates.find import net_template
source = Checkpoint.open(Path(sys.argv[1]))
for component in ("text_encoder", "vae_encoder", "unet", "vae_decoder"):
    template = net_template(source, component, "fp16")
    print(component, template.architecture, len(list(template.model.graph)) > 100)
"""


def test_reading_takes_no_torch(tmp_path: Path) -> None:
    with torch.device("meta"):
        stored = one_file(build(FULL["sd1"]), "sd1")
    path = tmp_path / "model.safetensors"
    write_header_only(path, stored)
    command = [sys.executable, "-W", "error", "-c", READER, str(path)]
    run = subprocess.run(command, check=True, timeout=120, stdout=subprocess.PIPE, text=True)
    nets = ("text_encoder", "vae_encoder", "unet", "vae_decoder")
    assert run.stdout.splitlines() == [f"{name} sd1 True" for name in nets]


def test_defaults_are_those_of_the_libraries() -> None:
    """A release that changes one changes what silent configs mean."""
    if not TRACED_HERE:
        pytest.skip(f"the archive was made with {INDEX['producer']}")
    wanted = {
        kind: {name: _listed(value) for name, value in fields.items()}
        for kind, fields in class_defaults().items()
    }
    assert INDEX["defaults"] == wanted


def _listed(value: Any) -> Any:
    return list(cast(tuple[Any, ...], value)) if isinstance(value, tuple) else value


@pytest.mark.slow
@pytest.mark.parametrize(
    "row", INDEX["templates"], ids=lambda row: f"{row['architecture']}-{row['key']['net']}"
)
def test_a_fresh_trace_is_what_ships(row: Mapping[str, Any]) -> None:
    """Node for node: to the byte. Half an hour for all of them; one with `-k sdxl-unet`."""
    if not TRACED_HERE:
        pytest.skip(f"the archive was made with {INDEX['producer']}")
    architecture = ARCHITECTURES[row["architecture"]]
    source = blank_checkpoint(architecture)
    keys = {component: net_key(source, component, INDEX["defaults"]) for component in components(source)}
    component = next(name for name, key in keys.items() if key == row["key"])
    for dtype in DTYPES:
        proto: Any = ir.to_proto(trace(source, component, dtype)[0])
        content = proto.SerializeToString(deterministic=True)
        assert hashlib.sha256(content).hexdigest() == row["graphs"][dtype]["sha256"], dtype
