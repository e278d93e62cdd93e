"""Packages of the families beyond 1.x and 2.x, against diffusers' and transformers' own modules."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnx_ir as ir
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from latentrt.checkpoints.files.open import Checkpoint
from latentrt.checkpoints.precision.calibration import components
from latentrt.engines.errors import CheckpointError
from latentrt.engines.package import Defaults, Package
from latentrt.export import export_package
from latentrt.export.graphs.to_onnx import example
from latentrt.export.nets.build import NETS
from latentrt.export.verify import Comparison
from tests.export.conftest import Exported, relative_l2
from tests.export.ldm_files import one_file
from tests.export.tensorrt_builds import build_every_net
from tests.parity_pair import exported
from tests.recipes import FAMILIES, IMAGE_NOISE, make_checkpoint, make_tiny_vae

NO = np.zeros(1, np.int32)


XL = ["xl", pytest.param("inpaint_xl", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """SDXL: two text encoders and two vectors; in fp32. The tests of parity draw with the same package."""
    folder = exported(tmp_path_factory, "xl-tiny")
    return Exported(folder / "checkpoint", Package.open(folder / "package"), [], [])


@pytest.fixture(scope="module")
def inpaint_xl(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The same with nine channels, so with image latents; in fp16."""
    folder = tmp_path_factory.mktemp("xl")
    source = make_checkpoint(FAMILIES["inpaint-xl-tiny"], folder / "xl", dtype=torch.float32)
    return _export(source, folder, "fp16")


@pytest.fixture(scope="module")
def unclip(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Stable unCLIP with a guidance embedding besides, and tiny autoencoders; in fp32."""
    folder = tmp_path_factory.mktemp("unclip")
    base = FAMILIES["unclip-tiny"]
    recipe = replace(base, unet={**base.unet, "time_cond_proj_dim": 24})
    source = make_checkpoint(recipe, folder / "unclip", dtype=torch.float32)
    tiny = make_tiny_vae(folder / "taesd", dtype=torch.float32)
    return _export(source, folder, "fp32", vae=tiny, tiny_vae=tiny)


def _export(source: Path, folder: Path, dtype: Any, **more: Any) -> Exported:
    comparisons: list[Comparison] = []
    package = export_package(
        source, folder / "package", dtype=dtype, verify=True, report=comparisons.append, **more
    )
    return Exported(source, package, [], comparisons)


def module(kind: Any, exported: Exported, part: str) -> Any:
    return kind.from_pretrained(exported.source / part, torch_dtype=torch.float32).eval()


def vectors(exported: Exported, rows: int, random: np.random.Generator) -> dict[str, np.ndarray]:
    widths = {
        item.name: item.shape[1] for item in exported.package.manifest.nets["unet_time"].spec.inputs[1:]
    }
    found = {name: random.standard_normal((rows, width)).astype(np.float32) for name, width in widths.items()}
    if "time_ids" in found:
        found["time_ids"] = np.round(np.abs(found["time_ids"]) * 400)
    return found


def hoisted(exported: Exported, times: list[float], rows: int, sample: Any, context: Any, given: Any) -> Any:
    """The prediction of the last step: all steps' invariants in one call, the rows of a step together."""
    table = exported.run(
        "unet_time",
        timestep=np.repeat(np.array(times, np.float32), rows),
        **{name: np.concatenate([array] * len(times)) for name, array in given.items()},
    )
    last = {name: value[-rows:] for name, value in table.items()}
    behind = {"image_latents": sample[:, 4:]} if sample.shape[1] > 4 else {}
    invariants = exported.run("unet_context", context=context)
    return exported.run("unet", latent=sample[:, :4], **behind, **invariants, **last)["prediction"]


@pytest.mark.parametrize("which", [*XL, "unclip"])
def test_the_hoisted_unet_equals_diffusers(which: str, request: pytest.FixtureRequest) -> None:
    family: Exported = request.getfixturevalue(which)
    dtype = np.float16 if family.package.manifest.dtype == "fp16" else np.float32
    random = np.random.default_rng(7)
    channels = family.package.manifest.nets["unet_whole"].spec.inputs[0].shape[1]
    sample = random.standard_normal((3, channels, 6, 10)).astype(dtype)
    context = random.standard_normal((3, 77, family.package.manifest.context_width)).astype(dtype)
    given = vectors(family, 3, random)
    found = hoisted(family, [999.0, 20.0, 501.0], 3, sample, context, given)
    named = {name: torch.from_numpy(array) for name, array in given.items()}
    added = {name: named.pop(name) for name in ("text_embeds", "time_ids") if name in named}
    with torch.no_grad():
        wanted = module(UNet2DConditionModel, family, "unet")(
            torch.from_numpy(sample).float(),
            torch.tensor(501.0),
            torch.from_numpy(context).float(),
            added_cond_kwargs=added,
            **named,
        ).sample
    assert relative_l2(found, wanted) < (5e-3 if dtype == np.float16 else 1e-5)


@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize("which", XL)
def test_both_encoders_of_sdxl(which: str, skip: int, request: pytest.FixtureRequest) -> None:
    """As StableDiffusionXLPipeline.encode_prompt: hidden_states[-2 - skip], not normalised."""
    family: Exported = request.getfixturevalue(which)
    bar = 5e-3 if family.package.manifest.dtype == "fp16" else 1e-5
    ids = np.random.default_rng(0).integers(0, 600, (2, 77)).astype(np.int32)
    ids[0, 5:], ids[1, 40:] = 699, 699  # the token that ends a prompt
    arrays = {"input_ids": ids, "clip_skip": np.array([skip], np.int32)}
    kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    for name, kind in kinds.items():
        with torch.no_grad():
            wanted = module(kind, family, name)(torch.from_numpy(ids), output_hidden_states=True)
        found = family.run(name, **arrays)
        assert relative_l2(found["context"], wanted.hidden_states[-2 - skip]) < bar
        if name == "text_encoder_2":
            assert relative_l2(found["pooled"], wanted.text_embeds) < bar
            graph = ir.load(family.package.path(family.package.manifest.nets[name].graph)).graph
            (largest,) = (node.inputs[0] for node in graph if node.op_type == "ArgMax")
            assert largest is not None
            assert largest.dtype == ir.DataType.FLOAT, "CUDA has no ArgMax of integers"


def test_the_picture_encoder_of_unclip(unclip: Exported) -> None:
    processor = CLIPImageProcessorPil.from_pretrained(unclip.source / "feature_extractor")
    image = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3), np.uint8)
    pixels = processor(images=list(image), return_tensors="pt").pixel_values
    with torch.no_grad():
        wanted = module(CLIPVisionModelWithProjection, unclip, "image_encoder")(pixels).image_embeds
    assert relative_l2(unclip.run("image_encoder", image=image)["image_embeds"], wanted) < 1e-5


@pytest.mark.parametrize("level", [0, 700])
def test_noise_on_an_embedding(unclip: Exported, level: int) -> None:
    """Against the parts that StableUnCLIPImg2ImgPipeline.noise_image_embeddings is made of."""
    from diffusers.models.embeddings import get_timestep_embedding

    random = np.random.default_rng(1)
    embeds, noise = random.standard_normal((2, 3, 40), np.float32)
    normalizer = module(StableUnCLIPImageNormalizer, unclip, "image_normalizer")
    scheduler = DDPMScheduler.from_config(IMAGE_NOISE)
    levels = torch.full((3,), level)
    with torch.no_grad():
        scaled = normalizer.scale(torch.from_numpy(embeds))
        noisy = normalizer.unscale(scheduler.add_noise(scaled, torch.from_numpy(noise), levels))
    wanted = torch.cat([noisy, get_timestep_embedding(levels, 40, True, 0)], dim=1)
    alpha = float(scheduler.alphas_cumprod[level])
    scalars = {"noise_level": level, "alpha": alpha**0.5, "sigma": (1 - alpha) ** 0.5}
    found = unclip.run(
        "image_noiser",
        image_embeds=embeds,
        noise=noise,
        **{name: np.array([value], np.float32) for name, value in scalars.items()},
    )["class_labels"]
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("net", ["vae_decoder", "preview_decoder"])
def test_a_tiny_autoencoder_decodes(unclip: Exported, net: str) -> None:
    latent = np.random.default_rng(2).standard_normal((2, 4, 5, 7)).astype(np.float32)
    with torch.no_grad():
        pixels = AutoencoderTiny.from_pretrained(unclip.source.parent / "taesd").decode(
            torch.from_numpy(latent)
        )
    found = unclip.run(net, latent=latent)
    wanted = (pixels.sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1) * 255
    assert found["image"].shape == (2, 10, 14, 3)
    assert np.abs(found["image"].astype(float) - wanted.numpy()).max() <= 0.501
    np.testing.assert_allclose(found["mean"], pixels.sample.mean(dim=(1, 2, 3)), atol=1e-5)


def test_a_tiny_autoencoder_encodes_without_a_deviation(unclip: Exported) -> None:
    image = np.random.default_rng(3).integers(0, 256, (1, 12, 16, 3), np.uint8)
    mask = np.zeros((1, 12, 16, 1), np.uint8)
    found = unclip.run("vae_encoder", image=image, mask=mask)
    assert list(found) == ["mean"]
    pixels = torch.from_numpy(image).permute(0, 3, 1, 2).float() / 255 * 2 - 1
    with torch.no_grad():
        wanted = AutoencoderTiny.from_pretrained(unclip.source.parent / "taesd").encode(pixels).latents
    assert relative_l2(found["mean"], wanted) < 1e-5


@pytest.mark.parametrize("which", [XL[1], "unclip"])
def test_every_net_of_a_family_was_verified(which: str, request: pytest.FixtureRequest) -> None:
    family: Exported = request.getfixturevalue(which)
    verified = {item.net for item in family.comparisons}
    cut = {"unet_context", "unet_time", "unet_controlled", "unet_image_prompt"}
    assert verified == set(family.package.manifest.nets) - {"step", "step_masked"} - cut
    assert all(item.passed for item in family.comparisons)


@pytest.mark.parametrize("which", XL)
def test_what_the_manifests_of_sdxl_say(which: str, request: pytest.FixtureRequest) -> None:
    package = request.getfixturevalue(which).package
    one = package.manifest
    assert (one.family, one.context_width, one.zero_empty_prompt) == ("sdxl", 64 + 128, True)
    corners = ["original_height", "original_width", "crop_top", "crop_left", "target_height", "target_width"]
    assert list(one.time_ids) == corners
    assert one.image_latents == (("mask", "masked_image") if which == "inpaint_xl" else ())
    assert one.defaults == Defaults(guidance_scale=5.0, height=16, width=16, strength=0.3)
    assert (one.image_noise, one.image_processor) == (None, None)
    assert {path.name for path in package.root.glob("tokenizer*")} == {"tokenizer", "tokenizer_2"}
    assert len(one.latent_rgb) == 5


def test_what_the_manifest_of_unclip_says(unclip: Exported) -> None:
    two = unclip.package.manifest
    assert (two.family, two.context_width, two.zero_empty_prompt) == ("unclip", 32, False)
    assert two.defaults == Defaults(num_inference_steps=20, guidance_scale=10.0, height=16, width=16)
    assert two.image_noise == IMAGE_NOISE
    assert two.image_processor is not None
    assert two.image_processor["crop_size"] == {"height": 28, "width": 28}
    assert len(two.latent_rgb) == 5


@pytest.mark.parametrize("which", XL)
def test_vectors_join_the_time_embedding_alone(which: str, request: pytest.FixtureRequest) -> None:
    nets = request.getfixturevalue(which).package.manifest.nets
    assert [item.shape for item in nets["unet_time"].spec.inputs] == [("S",), ("S", 96), ("S", 6)]
    time = [item for item in nets["unet"].spec.inputs if item.name.startswith("time.")]
    assert time
    assert all(item.shape[0] == "B" for item in time)
    images = ["image_latents"] if which == "inpaint_xl" else []
    first = [item.name for item in nets["unet"].spec.inputs[: 1 + len(images)]]
    assert first == ["latent", *images]
    # Two layers of the one transformer, keys and values of each.
    assert len(nets["unet_context"].spec.outputs) == 4
    if which == "inpaint_xl":  # Sinusoids need float32, whatever the rest computes in.
        assert any(name.startswith("add_time_proj/") for name in nets["unet_time"].fp32_islands)


@pytest.mark.parametrize("which", [*XL, "unclip"])
def test_tensorrt_builds_every_net_of_a_family(which: str, request: pytest.FixtureRequest) -> None:
    build_every_net(request.getfixturevalue(which).package)


def test_one_file_gives_the_same_nets_as_the_folder(tmp_path: Path) -> None:
    """Names, tensors, contracts, and what the modules compute: all that a package is made of."""
    folder = make_checkpoint(FAMILIES["xl-tiny"], tmp_path / "xl")
    kinds = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }
    modules = {
        part: kind.from_pretrained(folder / part, torch_dtype=torch.float16) for part, kind in kinds.items()
    }
    stored = {name: t.contiguous() for name, t in one_file(modules, "sdxl").items() if not t.is_meta}
    save_file(stored, tmp_path / "xl.safetensors")
    sources = [Checkpoint.open(folder), Checkpoint.open(tmp_path / "xl.safetensors")]
    assert sources[0].family == sources[1].family == "sdxl"
    for name in ("vectors", "time_ids", "image_latents", "zero_empty_prompt", "latent_scale", "defaults"):
        assert getattr(sources[0], name) == getattr(sources[1], name), name
    assert sources[1].tokenizers.keys() == sources[0].tokenizers.keys()
    for component in components(sources[0]):
        one, other = (NETS[component].build(source, torch.float32) for source in sources)
        assert one.tensors == other.tensors
        assert one.spec == other.spec
        left, right = one.module.state_dict(), other.module.state_dict()
        assert all(torch.equal(left[name], right[name]) for name in left)
        sizes = {"B": 1, "N": 1, "P": 1, "T": 77, "H/8": 4, "W/8": 6, "H": 8, "W": 12}
        arrays = example(one.spec, sizes)
        if "input_ids" in arrays:
            arrays["input_ids"][:, 30:] = 699  # the highest token, which ends a prompt
        with torch.no_grad():
            outputs = [net.module(**arrays) for net in (one, other)]
        pairs = [item if isinstance(item, tuple) else (item,) for item in outputs]
        for found, wanted in zip(*pairs, strict=True):
            # OpenCLIP stores its projection transposed: the same numbers, added in another order
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("recipe", "pipeline"),
    [
        ("xl-tiny", "StableDiffusionXLPipeline"),
        ("refiner-tiny", "StableDiffusionXLImg2ImgPipeline"),
        ("lcm-tiny", "LatentConsistencyModelPipeline"),
        ("unclip-tiny", "StableUnCLIPImg2ImgPipeline"),
    ],
)
def test_diffusers_reads_the_recipes(tmp_path: Path, recipe: str, pipeline: str) -> None:
    folder = make_checkpoint(FAMILIES[recipe], tmp_path / recipe)
    pipe = getattr(diffusers, pipeline).from_pretrained(folder, local_files_only=True)
    missing = {"safety_checker", "feature_extractor", "image_encoder"} | (
        {"text_encoder", "tokenizer"} if recipe == "refiner-tiny" else set()
    )
    absent = {name for name, part in pipe.components.items() if part is None}
    assert absent <= missing
    found = Checkpoint.open(folder)
    assert all(name in pipe.components for name in found.parts)


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_vectors_of_another_width(tmp_path: Path) -> None:
    folder = make_checkpoint(FAMILIES["xl-tiny"], tmp_path / "xl")
    change(folder / "unet" / "config.json", projection_class_embeddings_input_dim=100)
    with pytest.raises(
        CheckpointError, match="100 values from the text_encoder_2, and there is one of width 96"
    ):
        Checkpoint.open(folder)


@pytest.mark.parametrize("changed", [{"image_mean": None}, {"rescale_factor": 1.0}])
def test_a_processor_that_does_otherwise(tmp_path: Path, changed: dict[str, Any]) -> None:
    folder = make_checkpoint(FAMILIES["unclip-tiny"], tmp_path / "unclip")
    change(folder / "feature_extractor" / "preprocessor_config.json", **changed)
    with pytest.raises(CheckpointError, match="the feature extractor has"):
        NETS["image_encoder"].build(Checkpoint.open(folder), torch.float32)
