"""Every weight of every family is reached by every spelling that its trainers use, and none by another's."""

import re
from collections.abc import Iterator

import pytest

from latentrt.adapters.keys import flat, read_key
from latentrt.adapters.names import Names, modules_of
from latentrt.checkpoints.files.ldm_names import original_unet_names, unet_tensors
from tests.adapters.tiny import modules, targets, weights
from tests.export.ldm_files import TINY, unet_to_ldm

FAMILIES = list(TINY)
XL = ("sdxl", "sdxl-refiner")


# Where latent-diffusion's checkpoints have a text encoder of transformers.
_CHECKPOINTS = {
    ("sd1", "text_encoder"): ("cond_stage_model.transformer.",),
    ("sdxl", "text_encoder"): ("conditioner.embedders.0.transformer.",),
}


def spelled(family: str) -> Iterator[tuple[str, str, str]]:
    """A module as each trainer spells it, before the dot; its component and name."""
    config = modules(family)["unet"].config
    original = dict(zip(unet_to_ldm(weights(family)["unet"], config), weights(family)["unet"], strict=True))
    for old, new in original.items():
        module, ldm = (name.rpartition(".")[0] for name in (new, old))
        for name in (module, ldm):
            for prefix in ("lora_unet_", "lycoris_", "lycoris_unet_", "oft_unet_"):
                yield prefix + flat(name), "unet", module
        for prefix in ("unet.", "", "base_model.model.", "unet.base_model.model.", "lora_unet_"):
            yield prefix + module, "unet", module
        yield f"diffusion_model.{ldm}", "unet", module
        yield f"unet.{ldm}", "unet", module  # OneTrainer's later form
        if re.search(r"attn[12]\.to_", module):
            yield f"unet.{module.replace('.to_', '.processor.to_').removesuffix('.0')}", "unet", module
            yield f"lora_unet_{flat(module.replace('.to_', '.processor.to_'))}", "unet", module
    prefixes = {
        "text_encoder": (("lora_te_", "lora_te1_", "lycoris_te_"), ("text_encoder.", "clip_l.")),
        "text_encoder_2": (("lora_te2_", "lycoris_te2_"), ("text_encoder_2.", "clip_g.")),
    }
    if family == "sdxl-refiner":  # its one encoder
        prefixes["text_encoder_2"] = (("lora_te_", "lora_te2_"), ("text_encoder_2.", "clip_g."))
    for part in prefixes.keys() & targets(family).keys():
        underscored, dotted = prefixes[part]
        bare = f"clip_{'g' if part.endswith('2') else 'l'}.transformer."
        comfy = (bare, f"text_encoders.{bare}", *_CHECKPOINTS.get((family, part), ()))
        for module in modules_of(targets(family)[part]):
            for name in (module, module.removeprefix("text_model.")):
                yield from ((prefix + flat(name), part, module) for prefix in underscored)
                yield from ((prefix + name, part, module) for prefix in (*dotted, *comfy))
            old = re.sub(r"self_attn\.(q|k|v|out)_proj", r"self_attn.to_\1", module)
            yield f"{dotted[0]}{old}", part, module


@pytest.mark.parametrize("family", FAMILIES)
def test_every_module_is_found_by_every_spelling(family: str) -> None:
    names = Names(targets(family))
    reached: dict[str, set[str]] = {}
    for module, component, wanted in spelled(family):
        for end in (".lora_down.weight", ".lora_A.weight", ".lora.up.weight", ".alpha", ".diff"):
            key = read_key(module + end)
            assert key is not None, module
            assert names.find(key.module) == (component, wanted), module
        reached.setdefault(component, set()).add(wanted)
    for component, shapes in targets(family).items():
        assert reached[component] == set(modules_of(shapes))
        matrices = {name.rpartition(".")[0] for name, shape in shapes.items() if len(shape) in (2, 4)}
        assert matrices <= reached[component]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_spelling_means_two_modules(family: str) -> None:
    seen: dict[str, tuple[str, str]] = {}
    for module, component, wanted in spelled(family):
        assert seen.setdefault(flat(module), (component, wanted)) == (component, wanted), module
    assert len(seen) > 5 * sum(len(modules_of(shapes)) for shapes in targets(family).values())


@pytest.mark.parametrize("family", FAMILIES)
def test_latent_diffusions_names_are_those_of_diffusers_scripts(family: str) -> None:
    config, tensors = modules(family)["unet"].config, weights(family)["unet"]
    theirs = dict(zip(unet_to_ldm(tensors, config), tensors, strict=True))
    ours = original_unet_names(modules_of(tensors))
    assert {f"{ours[m]}.{end}" for m, _, end in (n.rpartition(".") for n in tensors)} == set(theirs)
    for old, new in theirs.items():
        assert ours[new.rpartition(".")[0]] == old.rpartition(".")[0]


def test_names_that_latent_diffusion_has_not() -> None:
    names = [
        "down_blocks.0.resnets.0.conv3",
        "down_blocks.0.downsamplers.0.norm",
        "up_blocks.0.upsamplers.0.x",
    ]
    assert original_unet_names([*names, "x", "conv_in"]) == {"conv_in": "input_blocks.0.0"}
    assert original_unet_names(["class_embedding.linear_2"]) == {"class_embedding.linear_2": "label_emb.0.2"}
    assert unet_tensors({}) == {}


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("lora_unet_label_emb_0_0", "add_embedding.linear_1"),
        ("lora_unet_time_embed_0", "time_embedding.linear_1"),
        ("lora_unet_out_2", "conv_out"),
        ("lora_unet_input_blocks_0_0", "conv_in"),
        ("lora_unet_add_embedding_linear_2", "add_embedding.linear_2"),
        (
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        ),
        ("lora_unet_output_blocks_2_2_conv", "up_blocks.0.upsamplers.0.conv"),
        ("lora_unet_middle_block_1_proj_in", "mid_block.attentions.0.proj_in"),
        (
            "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out",
            "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
        ),
    ],
)
def test_t9_names_of_sdxl(name: str, module: str) -> None:
    key = read_key(f"{name}.lora_down.weight")
    assert key is not None
    assert Names(targets("sdxl")).find(key.module) == ("unet", module)


def test_t12_an_encoder_that_the_model_lacks_is_never_another() -> None:
    layer = "text_model_encoder_layers_0_self_attn_q_proj"
    module = "text_model.encoder.layers.0.self_attn.q_proj"
    refiner = Names(targets("sdxl-refiner"))
    assert refiner.find(f"lora_te_{layer}") == ("text_encoder_2", module)
    assert refiner.find(f"lora_te1_{layer}") is None
    assert refiner.absent(f"lora_te1_{layer}") == "text_encoder"
    assert refiner.absent(f"text_encoder_{layer}") == "text_encoder"
    assert refiner.find(f"lora_te2_{layer}") == ("text_encoder_2", module)
    bare = Names({"unet": targets("sdxl")["unet"]})
    for prefix in ("lora_te_", "lora_te1_", "lora_te2_", "text_encoder_", "text_encoder_2_"):
        assert bare.find(prefix + layer) is None
        assert bare.absent(prefix + layer) is not None
    assert bare.absent("lora_unet_down_blocks_7") is None
    xl = Names(targets("sdxl"))
    assert xl.find(f"lora_te_{layer}") == ("text_encoder", module)
    assert xl.find(f"lora_te2_{layer}") == ("text_encoder_2", module)


def test_names_that_would_mean_two_modules_mean_none() -> None:
    names = Names({"unet": {"a_b.c.weight": (2, 2), "a.b_c.weight": (2, 2), "d.weight": (2, 2)}})
    assert names.find("lora_unet_a_b_c") is None
    assert names.find("lora_unet_d") == ("unet", "d")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_nearest_name_is_of_the_same_spelling(family: str) -> None:
    names = Names(targets(family))
    module = next(name for name in modules_of(targets(family)["unet"]) if name.endswith("attn2.to_k"))
    assert names.nearest(f"lora_unet_{flat(module)}_x") == f"lora_unet_{flat(module)}"
    assert Names({}).nearest("lora_unet_x") is None
