"""IP-Adapters, against what diffusers' UNet makes of the same tensors."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from latentrt.checkpoints.controls.cross_attentions import cross_attentions
from latentrt.checkpoints.controls.read import read_control
from latentrt.checkpoints.files.component import read_tensors
from latentrt.engines.errors import CheckpointError
from tests.checkpoints.controls.control_files import write
from tests.checkpoints.odd_files import DISTILLED
from tests.export.ldm_files import TINY, Tensors, added, unet

# Published arrangements of levels, layers and depths, at tiny widths.
UNETS: dict[str, dict[str, Any]] = {
    "sd1": unet((32, 64, 96, 96), "xxx-", cross_attention_dim=768, attention_head_dim=8),
    "sd2": unet((32, 64, 96, 96), "xxx-", cross_attention_dim=1024, attention_head_dim=8),
    "sdxl": unet(
        (32, 64, 96),
        "-xx",
        cross_attention_dim=2048,
        attention_head_dim=8,
        transformer_layers_per_block=[1, 2, 10],
        use_linear_projection=True,
        **added(16, 48 + 6 * 16),
    ),
}
IMAGE = 24  # numbers of a picture's features


@cache
def unet_of(family: str) -> Any:
    torch.manual_seed(1)
    return UNet2DConditionModel(**UNETS[family])


def cross(module: Any) -> list[str]:
    """The cross-attentions' processors in diffusers' order."""
    return [name for name in module.attn_processors if "attn2" in name]


def ip_layers(module: Any) -> Tensors:
    """Keys and values, each filled with the number of its processor, by the names of IP-Adapters' files."""
    tensors: Tensors = {}
    names = list(module.attn_processors)
    for name in cross(module):
        number = names.index(name)
        weight = module.get_submodule(name.removesuffix(".processor")).to_k.weight
        tensors[f"{number}.to_k_ip.weight"] = torch.full_like(weight, number)
        tensors[f"{number}.to_v_ip.weight"] = torch.full_like(weight, -number)
    return tensors


def projection(kind: str, context: int) -> Tensors:
    """Random tensors of an image projection by their files' names (IP-Adapter's `resampler.py`, …)."""
    torch.manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {}
    if kind == "plain":
        shapes = {"proj.weight": (4 * context, IMAGE), "proj.bias": (4 * context,)}
        shapes |= {"norm.weight": (context,), "norm.bias": (context,)}
    elif kind == "full":
        shapes = {"proj.0.weight": (IMAGE, IMAGE), "proj.0.bias": (IMAGE,), "proj.2.weight": (context, IMAGE)}
        shapes |= dict.fromkeys(("proj.2.bias", "proj.3.weight", "proj.3.bias"), (context,))
    else:
        hidden, inner = 32, 128
        shapes = {"latents": (1, 16, hidden), "proj_in.weight": (hidden, IMAGE), "proj_in.bias": (hidden,)}
        shapes |= {"proj_out.weight": (context, hidden)}
        shapes |= dict.fromkeys(("proj_out.bias", "norm_out.weight", "norm_out.bias"), (context,))
        for i in range(4):
            norms = [f"layers.{i}.{place}" for place in ("0.norm1", "0.norm2", "1.0")]
            shapes |= {f"{norm}.{end}": (hidden,) for norm in norms for end in ("weight", "bias")}
            shapes |= {
                f"layers.{i}.0.to_q.weight": (inner, hidden),
                f"layers.{i}.0.to_kv.weight": (2 * inner, hidden),
                f"layers.{i}.0.to_out.weight": (hidden, inner),
                f"layers.{i}.1.1.weight": (4 * hidden, hidden),
                f"layers.{i}.1.3.weight": (hidden, 4 * hidden),
            }
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def joined(
    image_proj: Tensors, layers: Tensors, prefixes: tuple[str, str] = ("image_proj.", "ip_adapter.")
) -> Tensors:
    return {
        prefix + name: tensor
        for prefix, tensors in zip(prefixes, (image_proj, layers), strict=True)
        for name, tensor in tensors.items()
    }


KINDS = {
    "plain": ("an IP-Adapter", 4, "image_embeds", "ImageProjection"),
    "full": ("an IP-Adapter (Full)", 257, "hidden_states", "IPAdapterFullImageProjection"),
    "plus": ("an IP-Adapter (Plus)", 16, "hidden_states", "IPAdapterPlusImageProjection"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", UNETS)
def test_what_diffusers_makes_of_it(family: str, kind: str, tmp_path: Path) -> None:
    """Projection, tensors and their places in the UNet; each layer's keys hold its number (T36)."""
    module: Any = unet_of(family)
    context = UNETS[family]["cross_attention_dim"]
    image_proj, layers = projection(kind, context), ip_layers(module)
    found = read_control(write(tmp_path / "ip-adapter_x.safetensors", joined(image_proj, layers)))
    module._load_ip_adapter_weights([{"image_proj": image_proj, "ip_adapter": layers}])
    read = read_tensors(found.part.tensors)

    wanted: Any = module.encoder_hid_proj.image_projection_layers[0]
    ours = {
        n.removeprefix("image_projection."): a for n, a in read.items() if n.startswith("image_projection.")
    }
    assert ours.keys() == wanted.state_dict().keys()
    for name, tensor in wanted.state_dict().items():
        np.testing.assert_array_equal(ours[name], tensor.numpy(), err_msg=name)
    what, tokens, features, class_name = KINDS[kind]
    assert (found.what, found.kind, found.family) == (what, "ip-adapter", family)
    assert (found.tokens, found.image_features) == (tokens, features)
    config = dict(found.part.config)
    assert config.pop("layer_widths")
    assert config.pop("_class_name") == class_name == type(wanted).__name__
    again = type(wanted)(**config)
    assert {n: t.shape for n, t in again.state_dict().items()} == {
        n: t.shape for n, t in wanted.state_dict().items()
    }
    assert again(torch.randn(2, IMAGE) if kind == "plain" else torch.randn(2, tokens, IMAGE)).shape == (
        2,
        tokens,
        context,
    )

    assert [f"{name}.processor" for name in found.layers] == cross(module)
    for index, name in enumerate(found.layers):
        processor = module.attn_processors[f"{name}.processor"]
        for letter in "kv":
            weight = getattr(processor, f"to_{letter}_ip")[0].weight
            np.testing.assert_array_equal(
                read[f"layers.{index}.to_{letter}_ip.weight"], weight.detach().numpy()
            )
    assert len(read) == len(ours) + 2 * len(found.layers)
    assert found.notes == ()
    assert f"{tokens} tokens a picture, of {features} of {IMAGE} numbers" in found.lines()


@pytest.mark.parametrize(
    "prefixes", [("image_proj.", "adapter_modules."), ("image_proj_model.", "adapter_modules.")]
)
def test_other_prefixes(prefixes: tuple[str, str], tmp_path: Path) -> None:
    module: Any = unet_of("sd1")
    parts = projection("plus", 768), ip_layers(module)
    usual = read_control(write(tmp_path / "a.safetensors", joined(*parts))).part
    found = read_control(write(tmp_path / "b.safetensors", joined(*parts, prefixes))).part
    assert found.config == usual.config
    assert found.tensors.keys() == usual.tensors.keys()


def _distilled(name: str) -> dict[str, Any]:
    return {**TINY["sdxl"].unet, **DISTILLED[name]}


@pytest.mark.parametrize(
    "config",
    [
        *UNETS.values(),
        TINY["sd1"].unet,
        TINY["sd2"].unet,
        TINY["sdxl"].unet,
        _distilled("ssd-1b"),
        _distilled("vega"),
    ],
)
def test_the_order_is_that_of_diffusers_processors(config: dict[str, Any]) -> None:
    with torch.device("meta"):
        module: Any = UNet2DConditionModel(**config)
    assert [f"{name}.processor" for name in cross_attentions(config)] == cross(module)
    assert cross_attentions(module.config) == cross_attentions(config)


def test_layers_of_another_unet_are_read_without_their_places(tmp_path: Path) -> None:
    module: Any = UNet2DConditionModel(**TINY["sd1"].unet)
    tensors = joined(projection("plain", 64), ip_layers(module))
    found = read_control(write(tmp_path / "x.safetensors", tensors))
    assert (found.layers, found.family) == ((), "sd1")
    count = len(cross(module))
    assert f"{count} layers, as many as no published UNet has" in found.lines()
    assert len([name for name in found.part.tensors if name.startswith("layers.")]) == 2 * count


def _good() -> Tensors:
    module: Any = unet_of("sd1")
    return joined(projection("plain", 768), ip_layers(module))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"image_proj.proj.weight": None}, "has no image projection that is known"),
        ({"image_proj.norm.bias": None}, "lacks the tensor 'image_projection.norm.bias'"),
        (
            {"image_proj.more.bias": (3,)},
            "has the tensor 'image_projection.more.bias' that an IP-Adapter has not",
        ),
        ({"ip_adapter.3.to_k_ip.weight": None}, "lacks the tensor 'layers.1.to_k_ip.weight'"),
        ({"ip_adapter.31.to_v_ip.weight": None}, "lacks the tensor 'layers.15.to_v_ip.weight'"),
        (
            {"ip_adapter.1.to_k_ip.weight": None, "ip_adapter.1.to_v_ip.weight": None},
            "lacks the tensor 'layers.0",
        ),
        ({"ip_adapter.2.to_k_ip.weight": (32, 768)}, "has the tensor 'ip_adapter.2.to_k_ip.weight' that"),
        ({"ip_adapter.1.to_k_ip.weight": (32, 64)}, r"'layers.0.to_k_ip.weight' of the shape \(32, 64\)"),
        ({"ip_adapter.1.to_v_ip.weight": (64, 768)}, r"'layers.0.to_v_ip.weight' of the shape \(64, 768\)"),
        (
            {"ip_adapter.3.to_k_ip.weight": (64, 768), "ip_adapter.3.to_v_ip.weight": (64, 768)},
            "has 64 rows in layer 1, and others of its level .* have 32",
        ),
    ],
)
def test_what_is_damaged(changed: dict[str, Any], words: str, tmp_path: Path) -> None:
    tensors = _good() | {name: torch.zeros(shape) for name, shape in changed.items() if shape is not None}
    tensors = {name: tensor for name, tensor in tensors.items() if changed.get(name, ()) is not None}
    with pytest.raises(CheckpointError, match=words):
        read_control(write(tmp_path / "x.safetensors", tensors))


def test_no_layers(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in _good().items() if name.startswith("image_proj.")}
    with pytest.raises(CheckpointError, match=r"lacks the tensor 'layers\.0\.to_k_ip\.weight' and 1 more"):
        read_control(write(tmp_path / "x.safetensors", tensors))


def test_the_middle_before_the_up_blocks_is_another_order(tmp_path: Path) -> None:
    """Most of SDXL's layers have one width, and could be exchanged unnoticed; the narrower ones cannot."""
    module: Any = unet_of("sdxl")
    layers = ip_layers(module)
    pairs = [[layers[f"{2 * index + 1}.to_{x}_ip.weight"] for x in "kv"] for index in range(70)]
    wrong = pairs[:24] + pairs[60:] + pairs[24:60]
    moved = {
        f"{2 * i + 1}.to_{x}_ip.weight": t
        for i, pair in enumerate(wrong)
        for x, t in zip("kv", pair, strict=True)
    }
    with pytest.raises(CheckpointError, match="the order of diffusers' attention processors"):
        read_control(write(tmp_path / "x.safetensors", joined(projection("plain", 2048), moved)))


def test_a_resampler_of_faces_is_refused(tmp_path: Path) -> None:
    module: Any = unet_of("sd1")
    image_proj = projection("plus", 768) | {"proj_in.weight": torch.zeros(32, 512)}
    with pytest.raises(CheckpointError, match=r"reads embeddings of faces, 512 numbers each \(InstantID\)"):
        read_control(write(tmp_path / "x.safetensors", joined(image_proj, ip_layers(module))))
