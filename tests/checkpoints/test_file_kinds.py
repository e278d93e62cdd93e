"""What a single file is taken for, what is refused and how, and what its metadata decides."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from latentrt.checkpoints.files.open import Checkpoint
from latentrt.checkpoints.files.single_file import open_single_file, open_vae_file
from latentrt.engines.errors import CheckpointError, UsageError
from tests.export.ldm_files import (
    TINY,
    Tensors,
    build,
    one_file,
    tensors_of,
    under,
    vae_to_ldm,
    write_header_only,
)

UNET = "model.diffusion_model."
CONV_IN = f"{UNET}input_blocks.0.0.weight"


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


@pytest.fixture(scope="module")
def files() -> dict[str, Tensors]:
    """Each family's tensors, without memory."""
    with torch.device("meta"):
        return {family: one_file(build(recipe), family) for family, recipe in TINY.items()}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
        write_header_only(tmp_path / "model.safetensors", tensors, metadata)
        return tmp_path / "model.safetensors"

    return write


def without(tensors: Tensors, part: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if part not in name}


@pytest.mark.parametrize("family", TINY)
def test_inpainting(family: str, files: dict[str, Tensors], write: Any) -> None:
    width = files[family][CONV_IN].shape[0]
    opened = open_single_file(write(files[family] | {CONV_IN: meta(width, 9, 3, 3)}))
    assert opened.family == family
    assert opened.components["unet"].config["in_channels"] == 9
    assert opened.scheduler["prediction_type"] == "epsilon"


@pytest.mark.parametrize(
    ("family", "tokenizers"),
    [
        ("sd1", {"tokenizer": "<|endoftext|>"}),
        ("sd2", {"tokenizer": "!"}),
        ("sdxl", {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}),
        ("sdxl-refiner", {"tokenizer_2": "!"}),
    ],
)
def test_tokenizers(family: str, tokenizers: dict[str, str], files: dict[str, Tensors], write: Any) -> None:
    assert open_single_file(write(files[family])).tokenizers == tokenizers


@pytest.mark.parametrize(
    ("family", "markers", "metadata", "argument", "wanted"),
    [
        ("sd1", [], {}, None, "epsilon"),
        ("sd1", [], {"modelspec.prediction_type": "v"}, None, "v_prediction"),
        ("sd2", [], {}, None, "v_prediction"),
        ("sd2", [], {"modelspec.architecture": "stable-diffusion-v2-512"}, None, "epsilon"),
        ("sd2", [], {"modelspec.architecture": "stable-diffusion-v2-768-v"}, None, "v_prediction"),
        ("sd2", [], {"modelspec.prediction_type": "epsilon"}, None, "epsilon"),
        ("sd2", [], {}, "epsilon", "epsilon"),
        ("sdxl", [], {}, None, "epsilon"),
        ("sdxl", ["v_pred"], {}, None, "v_prediction"),
        ("sdxl", ["v_pred"], {"modelspec.prediction_type": "epsilon"}, None, "v_prediction"),
        ("sdxl", [], {"modelspec.predict_key": "v"}, None, "v_prediction"),  # ComfyUI's
        ("sd1", [], {"modelspec.predict_key": "v"}, None, "v_prediction"),
        ("sd2", [], {"modelspec.predict_key": "epsilon"}, None, "epsilon"),
        ("sd1", [], {"prediction_type": "v_prediction"}, None, "v_prediction"),
        ("sdxl", [], {"ss_v_parameterization": "True"}, None, "v_prediction"),
        ("sdxl", [], {"ss_v_parameterization": "False"}, None, "epsilon"),
        ("sdxl", [], {"modelspec.prediction_type": "rectified flow"}, "epsilon", "epsilon"),
        ("sdxl", ["v_pred", "ztsnr"], {}, "epsilon", "epsilon"),
    ],
)
def test_prediction_type(
    family: str,
    markers: list[str],
    metadata: dict[str, str],
    argument: str | None,
    wanted: str,
    files: dict[str, Tensors],
    write: Any,
) -> None:
    path = write(files[family] | {name: meta(0) for name in markers}, metadata)
    opened = open_single_file(path, prediction_type=argument)
    assert opened.scheduler["prediction_type"] == wanted
    assert opened.scheduler.get("rescale_betas_zero_snr", False) is ("ztsnr" in markers)
    # 2.1 was trained at 768 pixels, what predicts noise at 512
    size = {"sd1": 64, "sdxl": 128, "sd2": 96 if wanted == "v_prediction" else 64}[family]
    assert opened.components["unet"].config["sample_size"] == size
    assert opened.components["vae"].config["sample_size"] == 8 * size
    assumed = [note for note in opened.notes if "assumed" in note]
    assert len(assumed) == (family == "sd2" and not metadata and argument is None)


def test_another_prediction_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'sample'; expected epsilon or v_prediction"):
        open_single_file(tmp_path / "x.safetensors", prediction_type="sample")


@pytest.mark.parametrize("key", ["modelspec.prediction_type", "modelspec.predict_key", "prediction_type"])
def test_what_no_sampler_is_for_is_refused(key: str, files: dict[str, Tensors], write: Any) -> None:
    with pytest.raises(CheckpointError, match=f"says 'flow' under {key}.*--prediction-type"):
        open_single_file(write(files["sdxl"], {key: "Flow"}))


# ComfyUI's supported_models.SDXL.model_type reads these.
@pytest.mark.parametrize(
    ("markers", "kind"),
    [
        (["edm_mean", "edm_std"], "Playground 2.5"),
        (["edm_std"], "Playground 2.5"),
        (["edm_vpred.sigma_max", "edm_vpred.sigma_min"], "CosXL"),
        (["edm_vpred.sigma_max"], "CosXL"),
        (["v_pred", "edm_vpred.sigma_max"], "CosXL"),
    ],
)
@pytest.mark.parametrize("argument", [None, "v_prediction"])
def test_edm_markers_are_refused_by_name(
    markers: list[str], kind: str, argument: str | None, files: dict[str, Tensors], write: Any
) -> None:
    path = write(files["sdxl"] | {name: meta() for name in markers})
    with pytest.raises(CheckpointError, match=f"is {kind}"):
        open_single_file(path, prediction_type=argument)


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("prefix", ["", "module.", "state_dict."])
def test_a_unet_under_another_prefix(family: str, prefix: str, files: dict[str, Tensors], write: Any) -> None:
    """Tools drop `model.`, or wrap the whole: the parts are those of the usual names."""
    wanted = open_single_file(write(files[family]))
    for unet in ("diffusion_model.", UNET):
        renamed = {prefix + name.replace(UNET, unet, 1): tensor for name, tensor in files[family].items()}
        found = open_single_file(write(renamed))
        assert found.family == family
        for part, component in wanted.components.items():
            assert found.components[part].config == component.config
            assert {
                name: tensor.name.replace(unet, UNET, 1).removeprefix(prefix)
                for name, tensor in found.components[part].tensors.items()
            } == {name: tensor.name for name, tensor in component.tensors.items()}
    surplus = write(renamed | {f"{prefix}{UNET}time_embed.4.weight": meta(4)})
    with pytest.raises(CheckpointError, match=f"no Stable Diffusion UNet has .{prefix}{UNET}time_embed"):
        open_single_file(surplus)


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_one_text_encoder_by_generative_models_names(
    family: str, files: dict[str, Tensors], write: Any
) -> None:
    """SD 2.1 Turbo's file calls its encoder as XL calls its first. AUTOMATIC1111 renames it (pull 14170),
    ComfyUI too ("SD2 in sgm format"). Turbo's published scheduler_config.json says epsilon.
    """
    wanted = open_single_file(write(files[family]), prediction_type="epsilon")
    sgm = {
        name.replace("cond_stage_model.", "conditioner.embedders.0."): tensor
        for name, tensor in files[family].items()
    }
    for prefix in ("", "module."):
        found = open_single_file(write({prefix + name: tensor for name, tensor in sgm.items()}))
        assert (found.family, found.tokenizers) == (family, wanted.tokenizers)
        assert found.scheduler == wanted.scheduler
        for part, component in wanted.components.items():
            assert found.components[part].config == component.config
            assert set(found.components[part].tensors) == set(component.tensors)


@pytest.mark.parametrize("dtype", ["I8", "U8", "I32", "BOOL"])
@pytest.mark.parametrize("part", [UNET, "cond_stage_model.", "first_stage_model."])
def test_quantised_weights_are_named(
    dtype: str, part: str, files: dict[str, Tensors], tmp_path: Path
) -> None:
    """Whatever part they are in; and with the scales that ComfyUI writes beside them."""
    kinds = {"I8": torch.int8, "U8": torch.uint8, "I32": torch.int32, "BOOL": torch.bool}
    stored = {name: torch.zeros(t.shape, dtype=torch.float16) for name, t in files["sd1"].items()}
    changed = (
        next(name for name in stored if name.startswith(part) and name.endswith("proj_in.weight"))
        if (part == UNET)
        else next(
            name for name in stored if name.startswith(part) and "norm" not in name and "ids" not in name
        )
    )
    stored[changed] = stored[changed].to(kinds[dtype])
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"stores the weight .* as {dtype}; expected one of F64, F32"):
        Checkpoint.open(tmp_path / "model.safetensors")
    stored[changed.replace(".weight", ".scale_weight")] = torch.ones(())
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds weights in scaled fp8"):
        Checkpoint.open(tmp_path / "model.safetensors")


def test_averaged_weights_are_named_and_not_used(files: dict[str, Tensors], write: Any) -> None:
    averages = {"model_ema.diffusion_modelinput_blocks00weight": meta(1), "model_ema.decay": meta()}
    (note,) = open_single_file(write(files["sd1"] | averages | {"alphas_cumprod": meta(1000)})).notes
    assert note.startswith("tensors that are not used: ")
    averaged = "(model_ema.decay, model_ema.diffusion_modelinput_blocks00weight)"
    assert f"averaged weights: 2 {averaged}" in note
    assert "the noise schedule: 1 (alphas_cumprod)" in note


def test_text_encoders_of_early_and_of_converted_files(files: dict[str, Tensors], write: Any) -> None:
    """Some files have no `text_model.`; diffusers' script leaves XL's projection as transformers has it."""
    early = {name.replace("transformer.text_model.", "transformer."): t for name, t in files["sd1"].items()}
    found = open_single_file(write(early)).components["text_encoder"].tensors
    assert "text_model.embeddings.token_embedding.weight" in found
    place = "conditioner.embedders.1.model.text_projection"
    converted = without(files["sdxl"], place) | {f"{place}.weight": files["sdxl"][place].T}
    header = open_single_file(write(converted)).components["text_encoder_2"].tensors["text_projection.weight"]
    assert (header.shape, header.transposed) == ((48, 128), False)


def test_vocabulary_of_the_schedulers(files: dict[str, Tensors], write: Any) -> None:
    """Each scheduler config is one that diffusers' class of that name takes without a complaint."""
    import diffusers

    for family in TINY:
        config = open_single_file(write(files[family])).scheduler
        scheduler = getattr(diffusers, config["_class_name"]).from_config(dict(config))
        assert scheduler.config.prediction_type == config["prediction_type"]
        assert float(scheduler.alphas_cumprod[0]) == pytest.approx(1 - 0.00085)


KINDS = {
    "InstructPix2Pix": {CONV_IN: meta(32, 8, 3, 3)},
    "the Stable Diffusion upscaler": {CONV_IN: meta(32, 7, 3, 3)},
    "Stable Diffusion 2 depth-to-image": {CONV_IN: meta(32, 5, 3, 3)},
    "a UNet of 3 input channels": {CONV_IN: meta(32, 3, 3, 3)},
    "a UNet of 0 input channels": {CONV_IN: meta(32)},
    "Flux": {"double_blocks.0.img_attn.norm.key_norm.scale": meta(1)},
    "Stable Diffusion 3": {f"{UNET}joint_blocks.0.context_block.adaLN_modulation.1.bias": meta(1)},
    "a LoRA": {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": meta(4, 4)},
    "a LoRA (OFT)": {"oft_unet_conv_in.oft_blocks": meta(2, 4, 4)},
    "a LoRA (BOFT)": {"lycoris_conv_in.oft_blocks": meta(2, 2, 4, 4)},
    "whole differences of weights": {
        "lora_unet_conv_in.diff": meta(4, 4),
        "lora_unet_conv_in.diff_b": meta(4),
    },
    "differences of norms": {
        "lora_unet_conv_norm_out.w_norm": meta(4),
        "lora_unet_conv_norm_out.b_norm": meta(4),
    },
    "new weights": {"diffusion_model.out.2.set_weight": meta(4)},
    "a LoRA (kohya's names)": {
        "lora_unet_conv_in.lora_down.weight": meta(4, 4),
        "lora_unet_conv_norm_out.w_norm": meta(4),
    },
    "a ControlNet": {"control_model.input_blocks.0.0.weight": meta(32, 4, 3, 3)},
    "Playground 2.5": {CONV_IN: meta(32, 4, 3, 3), "edm_mean": meta(4)},
    "AnimateDiff": {"down_blocks.0.motion_modules.0.norm.weight": meta(4)},
    "an autoencoder alone": {"first_stage_model.encoder.conv_in.weight": meta(32, 3, 3, 3)},
    "a textual inversion": {"emb_params": meta(2, 768)},
    "a textual inversion for Stable Diffusion 1.x": {"<cat-toy>": meta(1, 768)},
    "a textual inversion; expected": {"<cat-toy>": meta(3, 96)},
    "a UNet alone": {"input_blocks.0.0.weight": meta(32, 4, 3, 3)},
    "a text encoder alone": {"text_model.embeddings.token_embedding.weight": meta(4, 4)},
    "a textual inversion for Stable Diffusion 2.x": {"<cat-toy>": meta(1024)},
    "no kind that is known (fc.weight …)": {"fc.weight": meta(3, 96)},
    "no kind that is known (x …)": {"x": meta(3, 96, 2)},
    "no kind that is known (fc1, fc2 …)": {"fc1": meta(4), "fc2": meta(4)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_are_named(kind: str, write: Any) -> None:
    with pytest.raises(CheckpointError) as error:
        open_single_file(write(KINDS[kind]))
    assert f" is {kind}" in str(error.value)


@pytest.mark.parametrize(
    ("family", "part", "lacking"),
    [
        ("sdxl", "conditioner.embedders.0.", "text_encoder (conditioner.embedders.0.transformer.*)"),
        ("sdxl", "conditioner.embedders.1.", "text_encoder_2 (conditioner.embedders.1.model.*)"),
        ("sdxl", "conditioner.", "text_encoder (conditioner.embedders.0.transformer.*), text_encoder_2"),
        ("sdxl-refiner", "first_stage_model.", "vae (first_stage_model.*)"),
        ("sd1", "cond_stage_model.", "text_encoder (cond_stage_model.transformer.*)"),
    ],
)
def test_what_is_missing_is_named(
    family: str, part: str, lacking: str, files: dict[str, Tensors], write: Any
) -> None:
    with pytest.raises(CheckpointError) as error:
        open_single_file(write(without(files[family], part)))
    assert f"has no {lacking}" in error.value.found


def test_a_family_is_known_by_its_unet_alone(files: dict[str, Tensors], write: Any) -> None:
    """By what real sizes tell: a context of 1024, or four levels of two layers."""
    key = f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    with pytest.raises(CheckpointError, match=r"text_encoder \(cond_stage_model\.model"):
        open_single_file(write(without(files["sd1"], "cond_stage_model") | {key: meta(64, 1024)}))
    fourth = {f"{UNET}input_blocks.9.0.op.bias": meta(1)}
    with pytest.raises(CheckpointError, match=r"text_encoder_2 \(conditioner.embedders.0.model"):
        open_single_file(write(without(files["sdxl-refiner"], "conditioner.") | fourth))


TEXT = "cond_stage_model.transformer.text_model."


@pytest.mark.parametrize(
    ("family", "changed", "message"),
    [
        (
            "sd1",
            {f"{UNET}time_embed.4.weight": meta(4)},
            "1 tensors that no Stable Diffusion UNet has",
        ),
        ("sd1", {f"{UNET}input_blocks.1.1.transformer_blocks.1.norm1.bias": meta(4)}, "blocks.1.attn1.to_k"),
        ("sd1", {f"{UNET}input_blocks.7.1.transformer_blocks.0.norm1.bias": meta(4)}, "blocks.0.attn1.to_k"),
        ("sd1", {f"{UNET}out.2.weight": None}, "'conv_out.weight' is missing"),
        ("sd1", {f"{UNET}out.2.weight": meta(4)}, r"shape \(4,\); expected 4 axes"),
        ("sdxl", {f"{UNET}label_emb.0.0.weight": meta(4, 48)}, "added embedding takes 48 numbers"),
        ("sdxl", {f"{UNET}label_emb.0.0.weight": meta(4, 145)}, "added embedding takes 145 numbers"),
        ("sd1", {f"{TEXT}encoder.layers.0.self_attn.q_proj.weight": meta(4, 4)}, "width 64 has query"),
        (
            "sdxl",
            {"conditioner.embedders.1.model.text_projection": None},
            "'text_projection.weight' is missing",
        ),
        ("sd1", {"first_stage_model.encoder.conv_in.weight": None}, "'encoder.conv_in.weight' is missing"),
        ("sd2", {"cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight": meta()}, "missing"),
        ("sd1", {f"{UNET}input_blocks.{'9' * 5000}.0.op.weight": meta(4)}, "no Stable Diffusion UNet has"),
    ],
)
def test_what_no_config_can_say(
    family: str, changed: dict[str, Any], message: str, files: dict[str, Tensors], write: Any
) -> None:
    tensors = {name: tensor for name, tensor in (files[family] | changed).items() if tensor is not None}
    path = write(tensors)
    with pytest.raises(CheckpointError, match=message) as error:
        open_single_file(path)
    assert str(path) in error.value.found


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("x.CKPT", b"\0\1"),
        ("x.bin", b"any"),
        ("x.safetensors", b"PK\x03\x04"),
        ("x.safetensors", b"\x80\x02"),
    ],
)
@pytest.mark.parametrize("opens", [open_single_file, open_vae_file])
def test_pickles_are_to_be_converted(opens: Any, name: str, start: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(start)
    with pytest.raises(CheckpointError, match="a pickle: reading one can run code") as error:
        opens(tmp_path / name)
    target = "x.safetensors" if name != "x.safetensors" else "x-converted.safetensors"
    assert error.value.fix.endswith(f": latentrt convert {tmp_path / name} -o {tmp_path / target}")


@pytest.mark.parametrize("ending", [".ckpt", ".pt", ".pth", ".bin"])
def test_what_a_file_is_counts_and_not_its_name(
    ending: str, files: dict[str, Tensors], write: Any, tmp_path: Path
) -> None:
    """The safetensors library reads a renamed file, so it is no pickle (ComfyUI's issue 5729)."""
    plain = write(files["sd1"])
    wanted = open_single_file(plain)
    renamed = plain.rename(tmp_path / f"model{ending}")
    with safe_open(renamed, "pt") as opened:
        assert set(opened.keys()) == set(files["sd1"])
    found = open_single_file(renamed)
    assert {part: found.components[part].config for part in found.components} == {
        part: wanted.components[part].config for part in wanted.components
    }
    assert open_vae_file(renamed).tensors.keys() == wanted.components["vae"].tensors.keys()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<!DOCTYPE html>\n<html><head><title>Log in</title></head></html>", "is an HTML page"),
        (b'{"error": "Access to model X is restricted"}', "is a JSON text"),
        (b"Entry not found\n", "is a text, such as a server's refusal"),
        (b"", "is empty"),
        (b"GGUF\3\0\0\0" + bytes(40), "is a GGUF file"),
    ],
)
@pytest.mark.parametrize("opens", [open_single_file, open_vae_file])
def test_a_saved_page_under_a_pickles_name(opens: Any, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        opens(tmp_path / "x.ckpt")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a file"):
        open_single_file(tmp_path / "x.safetensors")


@pytest.mark.parametrize("layout", ["whole checkpoint", "first_stage_model", "bare", "diffusers"])
def test_an_autoencoders_file(layout: str, files: dict[str, Tensors], write: Any) -> None:
    with torch.device("meta"):
        module = build(TINY["sd1"])["vae"]
    wanted = tensors_of("vae", module)
    bare = vae_to_ldm(wanted, module.config)
    stored = {"bare": bare, "first_stage_model": under("first_stage_model.", bare), "diffusers": wanted}
    found = open_vae_file(write(stored.get(layout, files["sd1"])), scaling_factor=0.5)
    assert {name: tensor.shape for name, tensor in found.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in wanted.items()
    }
    assert (found.config["block_out_channels"], found.config["scaling_factor"]) == ([32, 64], 0.5)
    assert "use_quant_conv" not in found.config


def test_an_autoencoder_without_quantisation_convolutions(files: dict[str, Tensors], write: Any) -> None:
    config = open_vae_file(write(without(files["sd1"], "quant_conv"))).config
    assert (config["use_quant_conv"], config["use_post_quant_conv"]) == (False, False)
    assert config["scaling_factor"] == 0.18215


def test_no_autoencoder(write: Any) -> None:
    with pytest.raises(CheckpointError, match="is no autoencoder but no kind that is known"):
        open_vae_file(write({"fc1.weight": meta(4)}))
    lora = {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": meta(4, 768)}
    with pytest.raises(CheckpointError, match=r"is no autoencoder but a LoRA \(kohya's names\)"):
        open_vae_file(write(lora))
