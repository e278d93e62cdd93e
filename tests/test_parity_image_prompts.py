"""Pictures drawn after pictures through IP-Adapters, against diffusers' pipelines, on random weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from latentrt import CheckpointError, Control, ImagePrompt, UsageError, read_metadata
from latentrt.checkpoints.controls.cross_attentions import cross_attentions
from latentrt.checkpoints.controls.image_encoder import with_image_encoder
from latentrt.checkpoints.controls.read import read_control
from latentrt.export.architectures import Architecture
from latentrt.runtime.controls.image_prompt import shrunk_mask
from tests.parity_pair import BAR, Pair, blob, drawn, exported, ours, photo, psnr
from tests.steered_pair import steerable

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*__array.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]
SIZE = {"height": 64, "width": 96}
FAST: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 5.0, **SIZE}
SEEN = 40.0  # dB: a picture that is as far from another is another one
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 24,
    "hidden_act": "gelu",
}
PLACES = (32 // 8) ** 2 + 1


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape) / shape[-1] ** 0.5


def projection(kind: str, context: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of a projection by the names that files have, and the config of diffusers' class."""
    if kind == "classic":
        tensors = {
            "proj.weight": normal(4 * context, 24),
            "proj.bias": normal(4 * context),
            "norm.weight": torch.ones(context),
            "norm.bias": normal(context),
        }
        config = {"image_embed_dim": 24, "cross_attention_dim": context, "num_image_text_embeds": 4}
        return tensors, {"_class_name": "ImageProjection", **config}
    if kind == "full":
        tensors = {
            "proj.0.weight": normal(32, 32),
            "proj.0.bias": normal(32),
            "proj.2.weight": normal(context, 32),
            "proj.2.bias": normal(context),
            "proj.3.weight": torch.ones(context),
            "proj.3.bias": normal(context),
        }
        config = {"image_embed_dim": 32, "cross_attention_dim": context}
        return tensors, {"_class_name": "IPAdapterFullImageProjection", **config}
    hidden = 64
    tensors = {
        "latents": torch.randn(1, 6, hidden),
        "proj_in.weight": normal(hidden, 32),
        "proj_in.bias": normal(hidden),
        "proj_out.weight": normal(context, hidden),
        "proj_out.bias": normal(context),
        "norm_out.weight": torch.ones(context),
        "norm_out.bias": normal(context),
    }
    for layer in range(4):
        place = f"layers.{layer}"
        for name in ("0.norm1", "0.norm2", "1.0"):
            tensors |= {f"{place}.{name}.weight": torch.ones(hidden), f"{place}.{name}.bias": normal(hidden)}
        tensors |= {
            f"{place}.0.to_q.weight": normal(64, hidden),
            f"{place}.0.to_kv.weight": normal(128, hidden),
            f"{place}.0.to_out.weight": normal(hidden, 64),
            f"{place}.1.1.weight": normal(4 * hidden, hidden),
            f"{place}.1.3.weight": normal(hidden, 4 * hidden),
        }
    config = {
        "embed_dims": 32,
        "output_dims": context,
        "hidden_dims": hidden,
        "depth": 4,
        "dim_head": 64,
        "heads": 1,
        "num_queries": 6,
        "ffn_ratio": 4,
    }
    return tensors, {"_class_name": "IPAdapterPlusImageProjection", **config}


class Prompted(Pair):
    """A model with IP-Adapters of every kind, here and in diffusers."""

    def __init__(self, folder: Path, made: Path, backend: str = "auto") -> None:
        super().__init__(folder, backend)
        unet, self.made = self._unet(), made
        torch.manual_seed(3)
        self.encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION)).eval()
        with torch.no_grad():
            for weight in self.encoder.parameters():
                weight.add_(torch.randn_like(weight) * 0.2)
        self.encoder.save_pretrained(made / "image_encoder")
        self.processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
        self.processor.save_pretrained(made / "image_encoder")
        context = unet.config.cross_attention_dim
        widths = [unet.get_submodule(name).to_k.out_features for name in cross_attentions(unet.config)]
        architectures: dict[str, Architecture] = {}
        for kind in ("classic", "plus", "full"):
            tensors, config = projection(kind, context)
            layers = {
                f"ip_adapter.{2 * number + 1}.to_{letter}_ip.weight": normal(width, context) * 2
                for number, width in enumerate(widths)
                for letter in "kv"
            }
            named = {f"image_proj.{name}": value for name, value in tensors.items()}
            save_file({**named, **layers}, made / f"{kind}.safetensors")
            parts = {"ip-adapter": {**config, "layer_widths": widths}, "vision": VISION}
            features = "image_embeds" if kind == "classic" else "hidden_states"
            architectures[kind] = Architecture(parts=parts, image_features=features)
        self.ours = steerable(self.ours, architectures, made)
        for kind in architectures:
            self.ours.load_control(made / f"{kind}.safetensors")

    def prompted(self, *kinds: str, task: str = "") -> Any:
        """diffusers' pipeline with these IP-Adapters."""
        xl = "XL" if "xl" in str(self.checkpoint) else ""
        unsafe = {"safety_checker": None, "requires_safety_checker": False}
        pipe: Any = getattr(diffusers, f"StableDiffusion{xl}{task}Pipeline").from_pretrained(
            self.checkpoint,
            dtype=torch.float32,
            unet=self._unet(),
            image_encoder=self.encoder,
            feature_extractor=self.processor,
            **({} if xl else unsafe),
        )
        pipe.load_ip_adapter(
            [str(self.made)] * len(kinds),
            subfolder=[""] * len(kinds),
            weight_name=[f"{kind}.safetensors" for kind in kinds],
            image_encoder_folder=None,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe


@pytest.fixture(
    scope="module", params=["tiny2", pytest.param("xl-levels-tiny", marks=pytest.mark.slow)], name="pair"
)
def prompted_pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prompted]:
    found = Prompted(exported(tmp_path_factory, request.param), tmp_path_factory.mktemp("prompts"))
    yield found
    found.ours.close()


def picture(seed: int = 0) -> Image.Image:
    return photo(40, 50, seed)


def draw(pair: Prompted, *prompts: ImagePrompt, **more: Any) -> np.ndarray:
    return ours(pair.ours, [3], prompt="a red circle", controls=list(prompts), **{**FAST, **more})


@pytest.mark.parametrize("kind", ["classic", "plus", "full"])
def test_every_kind_at_scales_of_0_06_and_1(pair: Prompted, kind: str) -> None:
    pipe = pair.prompted(kind)
    plain = draw(pair)
    for scale in (0.6, 1.0):
        pipe.set_ip_adapter_scale(scale)
        wanted = drawn(pipe, [3], prompt="a red circle", ip_adapter_image=picture(), **FAST)
        found = draw(pair, ImagePrompt(model=kind, image=picture(), strength=scale))
        assert psnr(wanted, found) >= BAR
        assert psnr(plain, found) < SEEN
    assert np.array_equal(draw(pair, ImagePrompt(model=kind, image=picture(), strength=0.0)), plain)


def test_without_guidance_and_from_a_picture(pair: Prompted) -> None:
    pipe = pair.prompted("plus", task="Img2Img")
    start = photo(SIZE["height"], SIZE["width"], 9)
    for scale in (1.0, 4.0):
        values = {"guidance_scale": scale, "strength": 0.7, "image": start}
        size = {name: value for name, value in FAST.items() if name not in SIZE}
        wanted = drawn(pipe, [3], prompt="a red circle", ip_adapter_image=picture(), **{**size, **values})
        found = draw(pair, ImagePrompt(model="plus", image=picture()), **values)
        assert psnr(wanted, found) >= BAR


def test_several_pictures_and_two_adapters(pair: Prompted) -> None:
    pictures = [picture(1), picture(2)]
    pipe = pair.prompted("classic")
    wanted = drawn(pipe, [3], prompt="a red circle", ip_adapter_image=[pictures], **FAST)
    assert psnr(wanted, draw(pair, ImagePrompt(model="classic", image=pictures))) >= BAR
    pipe = pair.prompted("classic", "plus")
    pipe.set_ip_adapter_scale([0.5, 0.8])
    wanted = drawn(pipe, [3], prompt="a red circle", ip_adapter_image=[pictures[0], pictures[1]], **FAST)
    both = (
        ImagePrompt(model="classic", image=pictures[0], strength=0.5),
        ImagePrompt(model="plus", image=pictures[1], strength=0.8),
    )
    assert psnr(wanted, draw(pair, *both)) >= BAR
    assert np.array_equal(draw(pair, *both), draw(pair, *both))


def test_masks(pair: Prompted) -> None:
    """One for each picture: in diffusers each then has a softmax of its own."""
    masks = [blob(SIZE["height"], SIZE["width"])]
    masks.append(Image.fromarray(255 - np.asarray(masks[0])))
    size = {"height": SIZE["height"], "width": SIZE["width"]}
    ready = IPAdapterMaskProcessor().preprocess(masks, **size)
    pictures = [picture(1), picture(2)]
    pipe = pair.prompted("classic")
    wanted = drawn(
        pipe,
        [3],
        prompt="a red circle",
        ip_adapter_image=[pictures],
        cross_attention_kwargs={"ip_adapter_masks": [ready.reshape(1, 2, *ready.shape[2:])]},
        **FAST,
    )
    found = draw(pair, ImagePrompt(model="classic", image=pictures, mask_image=masks))
    assert psnr(wanted, found) >= BAR
    exchanged = draw(pair, ImagePrompt(model="classic", image=pictures, mask_image=masks[::-1]))
    assert psnr(wanted, exchanged) < SEEN


def test_strengths_of_blocks(pair: Prompted) -> None:
    """What a mapping leaves out is 0, as in diffusers, whose mappings are of whole blocks of two levels."""
    pipe = pair.prompted("classic")
    config = pair._unet().config  # pyright: ignore[reportPrivateUsage]
    level, ups = (
        next(number for number, kind in enumerate(kinds) if kind.startswith("CrossAttn"))
        for kinds in (config.down_block_types, config.up_block_types)
    )
    count = config.layers_per_block + 1
    strength = {
        "down": {f"block_{level}": 0.7},
        "up": {f"block_{ups}": [1.0, *[0.0] * (count - 1)]},
    }
    pipe.set_ip_adapter_scale(strength)
    wanted = drawn(pipe, [3], prompt="a red circle", ip_adapter_image=picture(), **FAST)
    found = draw(pair, ImagePrompt(model="classic", image=picture(), strength=strength))
    assert psnr(wanted, found) >= BAR
    whole = draw(pair, ImagePrompt(model="classic", image=picture()))
    assert psnr(wanted, whole) < SEEN


def test_a_part_of_the_steps(pair: Prompted) -> None:
    """In a step that it is not in, the prediction is the plain one."""
    first, plain = draw(pair, ImagePrompt(model="classic", image=picture(), end=0.4)), draw(pair)
    whole = draw(pair, ImagePrompt(model="classic", image=picture()))
    assert psnr(first, plain) < SEEN
    assert psnr(first, whole) < SEEN
    pipe = pair.prompted("classic")

    def off(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe.set_ip_adapter_scale(0.0)
        return values

    pipe.set_ip_adapter_scale(1.0)
    wanted = drawn(
        pipe, [3], prompt="a red circle", ip_adapter_image=picture(), callback_on_step_end=off, **FAST
    )
    assert psnr(wanted, first) >= BAR


@pytest.mark.parametrize(("height", "width"), [(32, 48), (16, 24), (7, 5), (64, 96)])
def test_masks_shrink_as_in_torch(height: int, width: int) -> None:
    mask = (np.asarray(blob(64, 96).convert("L")) > 127).astype(np.float32)
    wanted = torch.nn.functional.interpolate(
        torch.from_numpy(mask)[None, None], size=(height, width), mode="bicubic"
    )[0, 0]
    assert np.abs(shrunk_mask(mask, height, width) - wanted.numpy()).max() < 1e-5


def test_the_record(pair: Prompted, tmp_path: Path) -> None:
    prompt = ImagePrompt(model="classic", image=picture(), strength=0.6)
    result = pair.ours("a ring", seed=1, controls=[prompt], **FAST)
    (steered,) = result.record()["steered_by"]
    assert (steered["kind"], steered["model"], steered["strength"]) == ("ip-adapter", "classic", 0.6)
    result.save(tmp_path / "drawn.png")
    text = read_metadata(tmp_path / "drawn.png").parameters or ""
    assert f'ControlNet 0: "Module: ip-adapter, Model: classic [{steered["sha256"][:8]}], Weight: 0.6' in text


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"strength": {"sideways": 1.0}}, "names 'sideways'; expected some of down, mid and up"),
        ({"strength": {"down": {"block_9": 1.0}}}, r"names down\.block_9; expected down with block_"),
        ({"strength": {"mid": [1.0, 0.5]}}, r"mid\.block_0 has 2 numbers; expected 1"),
        ({"strength": float("nan")}, "ip_adapter_strength is nan"),
        ({"strength": {"down": [1.0, "x"]}}, "ip_adapter_strength is 'x'"),
        ({"image": []}, "ip_adapter_image has no pictures"),
        ({"mask_image": [blob(64, 96)] * 2}, "2 masks for 1 pictures of the IP-Adapter"),
        ({"model": "plu"}, "no control is called 'plu'; expected one of plus"),
    ],
)
def test_what_is_refused(pair: Prompted, fields: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        draw(pair, ImagePrompt(**{"model": "classic", "image": picture(), **fields}))


def test_controls_of_another_kind_are_refused(pair: Prompted) -> None:
    with pytest.raises(UsageError, match=r"'classic' is an IP-Adapter, and was given as another kind"):
        ours(pair.ours, [1], prompt="a", controls=[Control(model="classic", image=picture())], **FAST)


def test_image_encoders(pair: Prompted, tmp_path: Path) -> None:
    """Found beside the file, passed as a folder or a file, missing, or of another width."""
    alone = tmp_path / "alone" / "classic.safetensors"
    alone.parent.mkdir()
    alone.write_bytes((pair.made / "classic.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="needs an image encoder: there is none at"):
        pair.ours.load_control(alone, "again")
    name = pair.ours.load_control(alone, "again", image_encoder=pair.made / "image_encoder")
    pair.ours.unload_controls(name)
    one_file = pair.made / "image_encoder" / "model.safetensors"
    found = with_image_encoder(read_control(alone), one_file)
    assert found.encoder is not None
    # a file does not say how many heads its attention has: all of CLIP's published encoders have 16
    told = {**VISION, "num_attention_heads": 16}
    assert {key: found.encoder.config[key] for key in VISION} == told
    assert (found.processor["size"], found.processor["crop_size"]) == (32, 32)
    other = CLIPVisionModelWithProjection(CLIPVisionConfig(**{**VISION, "projection_dim": 20}))
    other.save_pretrained(alone.parent / "image_encoder")
    with pytest.raises(CheckpointError, match=r"has 20 numbers; expected .* have 24"):
        pair.ours.load_control(alone, "again")
