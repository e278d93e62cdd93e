"""What a net reads of a checkpoint: tensors, under packages' names, and facts that its config does not have.

Packages have one spelling of each name; checkpoints have several, by the release of the library that wrote
them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from ...engines import spec
from ...engines.errors import CheckpointError
from .component import Component, TensorHeader
from .source import Source

# transformers before 5, and packages
TEXT_PREFIX = "text_model."
# diffusers before 0.15 named the VAE's attention so; `AutoencoderKL` still converts it on load.
_OLD_ATTENTION = {"query.": "to_q.", "key.": "to_k.", "value.": "to_v.", "proj_attn.": "to_out.0."}
# The prefixes of an autoencoder's halves.
HALVES = {"encoder": ("encoder.", "quant_conv."), "decoder": ("decoder.", "post_quant_conv.")}
# The prefixes of what a ControlNet makes of its picture, a net of its own; all but the first are a Union's.
HINT = ("controlnet_cond_embedding.", "task_embedding", "transformer_layes.", "spatial_ch_projs.")
# Tensors that old checkpoints hold and no net reads: buffers, and the projections of the full CLIP.
UNREAD = ("position_ids", "text_projection.weight", "logit_scale")


def net_tensors(source: Source, component: str) -> dict[str, TensorHeader]:
    """The tensors of a component (a row of `export.nets.build.NETS`), without those that it does not read.

    Of names that nobody knows there is no telling: they are kept, as they are.
    """
    part = source.parts[spec.NETS[component].part]
    spelling, reads = _reading(source, component, part)
    found: dict[str, TensorHeader] = {}
    for stored in sorted(part.tensors, key=lambda name: spelling(name) != name):
        name = spelling(stored)
        # Of two spellings of one name, the other one is nobody's.
        found[stored if name in found else name] = part.tensors[stored]
    return {
        name: header
        for name, header in found.items()
        if reads(name) and (is_projected(component, name) or not name.endswith(UNREAD))
    }


def _reading(
    source: Source, component: str, part: Component
) -> tuple[Callable[[str], str], Callable[[str], bool]]:
    """How a component's names are spelled in packages, and which of these it reads."""
    if component in spec.TEXT_ENCODERS:
        unread = tuple(map(package_text_name, unread_layers(source, part)))
        return package_text_name, lambda name: not name.startswith(unread)
    if part.name in ("vae", "tiny_vae"):
        other = HALVES["decoder" if component == "vae_encoder" else "encoder"]
        return modern_attention, lambda name: not name.startswith(other)
    if part.name == "controlnet":
        return str, lambda name: name.startswith(HINT) == (component == "controlnet_hint")
    if component == "image_features":
        unread = unread_vision(source, part)
        return str, lambda name: not name.startswith(unread)
    return str, lambda name: True


def is_projected(component: str, name: str) -> bool:
    """Whether `name` is the projection behind a text encoder's pooled embedding, which one encoder has."""
    return component == "text_encoder_2" and name == "text_projection.weight"


def package_text_name(name: str) -> str:
    """The name of a text encoder's tensor in packages."""
    if name == "text_projection.weight" or name.startswith(TEXT_PREFIX):
        return name
    return TEXT_PREFIX + name


def unread_layers(source: Source, part: Component) -> tuple[str, ...]:
    """The prefixes, without TEXT_PREFIX, of what SDXL's first encoder does not run.

    Its context is taken before the last layer. The second encoder runs that for its pooled embedding.
    """
    if part.name == "text_encoder_2" or not source.skips_last_layer:
        return ()
    last = int(part.config.get("num_hidden_layers", 12)) - 1  # as CLIPTextConfig has it
    return f"encoder.layers.{last}.", "final_layer_norm."


def unread_vision(source: Source, part: Component) -> tuple[str, ...]:
    """The prefixes of what an IP-Adapter that reads hidden states does not run of its image encoder.

    They are those before the last layer.
    """
    if not reads_hidden_states(source):
        return ()
    last = int(part.config.get("num_hidden_layers", 12)) - 1  # as CLIPVisionConfig has it
    return f"vision_model.encoder.layers.{last}.", "vision_model.post_layernorm.", "visual_projection."


def reads_hidden_states(source: Source) -> bool:
    """Whether an IP-Adapter reads its image encoder's hidden states, not the embedding."""
    return getattr(source, "image_features", "") == "hidden_states"


def modern_attention(name: str) -> str:
    """An autoencoder's tensor name as diffusers writes it since 0.15."""
    for old, new in _OLD_ATTENTION.items():
        if ".attentions." in name:
            name = name.replace("." + old, "." + new)
    return name


def net_facts(source: Source, component: str) -> dict[str, Any]:
    """What a component's graph depends on besides the config of its part, as JSON has it.

    Raises:
        CheckpointError: the feature extractor is of another kind.
    """
    if component in ("unet", "controlnet"):
        return {"vectors": dict(source.vectors)}
    if component in spec.TEXT_ENCODERS:
        return {"skips_last_layer": source.skips_last_layer}
    if component == "image_features":
        return {"hidden_states": reads_hidden_states(source)}
    if component == "image_encoder":
        mean, std = normalisation(source.configs["feature_extractor"])
        return {"image_mean": mean, "image_std": std}
    return {}


def normalisation(processor: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Mean and deviation of colours in 0 ... 1. Raises CheckpointError if the processor does otherwise."""
    mean, std = processor.get("image_mean"), processor.get("image_std")
    scale = processor.get("rescale_factor", 1 / 255)
    if not (isinstance(mean, list) and isinstance(std, list)) or abs(float(scale) * 255 - 1) > 1e-6:
        raise CheckpointError(
            f"the feature extractor has image_mean {mean}, image_std {std}, rescale_factor {scale}",
            expected="a mean and a deviation for each colour, of values in 0 ... 1",
            fix="Take preprocessor_config.json from the CLIP model that the checkpoint was trained with.",
        )
    return list(map(float, cast(list[Any], mean))), list(map(float, cast(list[Any], std)))
