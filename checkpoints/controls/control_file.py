"""What is known of a control's file before anything of it is computed with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...engines.hub import called
from ...engines.package import TIME_IDS, FusedAdapter
from ...engines.spec import CONTROL_TYPE
from ..files.component import DIFFUSERS, Component, TensorHeader
from ..files.file_kinds import FAMILIES
from ..files.tokenizers import WriteTokenizer
from ..made_weights import Weight

CONTROLNET, T2I_ADAPTER, IP_ADAPTER = KINDS = ("controlnet", "t2i-adapter", "ip-adapter")
XL_ADAPTER = "full_adapter_xl"  # the `adapter_type` of a T2I-Adapter for XL
VISION = "vision"  # the part that an IP-Adapter reads pictures through
# What a Union ControlNet's control types are, by number. The first has six of them, ProMax all.
# (xinsir6/ControlNetPlus, `controlnet_union_test_*.py` and `promax/`.)
CONTROL_TYPES = ("openpose", "depth", "scribble", "canny", "normal", "segment", "tile", "repaint")
# What a file is called that says nothing: its folder has the name.
_NAMELESS = (DIFFUSERS, "model", "pytorch_model", "ip_adapter")


@dataclass(frozen=True, kw_only=True)
class ControlFile:
    """A ControlNet, a T2I-Adapter or an IP-Adapter. Only headers were read.

    Attributes:
        root: the folder or file.
        kind: "controlnet", "t2i-adapter" or "ip-adapter".
        family: what it is made for: "sd1", "sd2" or "sdxl".
        what: what it is, for people, with an article: "a ControlNet (Union)".
        part: its tensors by diffusers' names, and the config that diffusers' class has: ControlNetModel,
            ControlNetUnionModel or T2IAdapter. A control-LoRA has `NAME.up` and `NAME.down` in place of some
            of a ControlNet's `NAME.weight`. An IP-Adapter has `image_projection.*`, the tensors and the
            config of the class of its image projection (ImageProjection, IPAdapterFullImageProjection,
            IPAdapterPlusImageProjection), and `layers.J.to_k_ip.weight` and `layers.J.to_v_ip.weight`,
            (C, context) each, for the J-th cross-attention in the order of `cross_attentions`.
        needs_base: what the weights have to be completed with: "" is nothing, "difference" adds to those of a
            base's UNet, "lora" is a low-rank change of them (`with_base.completed`).
        base: of one that was completed, the tensors of the base's UNet that its weights are made of.
        made: of one that was completed, the weights that no file has; `part` has their shapes.
        channel_order: of its picture, "rgb" or "bgr".
        global_pool: its residuals are averaged over height and width (the ControlNet "shuffle").
        control_types: of a Union, what each of its types is; the published have no others than CONTROL_TYPES.
        tokens: of an IP-Adapter, how many of them a picture becomes.
        image_features: of an IP-Adapter, what it reads of the image encoder: "image_embeds", which are
            projected, or the penultimate "hidden_states".
        encoder: of an IP-Adapter, the image encoder that it reads pictures through, once it was found.
        processor: how pictures are cut and normalised for that.
        layers: of an IP-Adapter, the cross-attentions that its layers belong to in its family's UNet, by
            module names; empty where no published UNet has as many.
        notes: for the user: what was assumed, and what is not used.
    """

    root: Path
    kind: str
    family: str
    what: str
    part: Component
    needs_base: str = ""
    base: Mapping[str, TensorHeader] = field(default_factory=dict[str, TensorHeader])
    made: Mapping[str, Weight] = field(default_factory=dict[str, Weight])
    channel_order: str = "rgb"
    global_pool: bool = False
    control_types: tuple[str, ...] = ()
    tokens: int = 0
    image_features: str = ""
    encoder: Component | None = None
    processor: Mapping[str, Any] = field(default_factory=dict[str, Any])
    layers: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What people call it: the file's or folder's name, or in a hub's cache its repository's."""
        path = Path(os.path.abspath(self.root))
        name = path.name
        if path.is_file():
            name = path.parent.name if path.stem.split(".")[0] in _NAMELESS else path.stem
        return called(path, name)

    @property
    def parts(self) -> Mapping[str, Component]:
        """Its one part, by its kind, and an image encoder."""
        return {part.name: part for part in (self.part, self.encoder) if part is not None}

    @property
    def tokenizers(self) -> Mapping[str, WriteTokenizer]:
        """None."""
        return {}

    @property
    def configs(self) -> Mapping[str, Mapping[str, Any]]:
        """How pictures are cut for the image encoder, if there is one."""
        return {"feature_extractor": self.processor} if self.encoder else {}

    @property
    def fused(self) -> tuple[FusedAdapter, ...]:
        """None."""
        return ()

    @property
    def skips_last_layer(self) -> bool:
        """Whether the context is taken early: no, as it has no text encoder."""
        return False

    @property
    def vectors(self) -> Mapping[str, int]:
        """What joins its time embedding (`engines.spec.VECTORS`): of SDXL's the text and six sizes.

        Of a Union also what its pictures are.
        """
        config = self.part.config
        found: dict[str, int] = {}
        if config.get("addition_embed_type") == "text_time":
            ids = len(TIME_IDS) - 1  # no aesthetic score
            joined = int(config["projection_class_embeddings_input_dim"])
            width = joined - ids * int(config["addition_time_embed_dim"])
            found = {"text_embeds": width, "time_ids": ids}
        if types := config.get("num_control_type"):
            found[CONTROL_TYPE] = int(types)
        return found

    @property
    def latent_scale(self) -> int:
        """Pixels per latent cell; nothing says so of an IP-Adapter, which fits any."""
        config = self.part.config
        if self.kind == CONTROLNET:  # each of its picture's widths but the first halves it
            return 2 ** (len(config["conditioning_embedding_out_channels"]) - 1)
        if self.kind == T2I_ADAPTER:  # that of XL begins at the second level
            return int(config["downscale_factor"]) // (2 if config["adapter_type"] == XL_ADAPTER else 1)
        return 8

    @property
    def facts(self) -> dict[str, Any]:
        """How its picture and its outputs are treated, for the manifest."""
        return {
            "kind": self.kind,
            "channel_order": self.channel_order,
            "global_pool": self.global_pool,
            "control_types": list(self.control_types),
        } | ({"tokens": self.tokens, "image_features": self.image_features} if self.tokens else {})

    @property
    def title(self) -> str:
        """What it is and what for, for people."""
        return f"{self.what} for {FAMILIES[self.family]}"

    def lines(self) -> tuple[str, ...]:
        """What its names and shapes say, for people, and the notes."""
        config = self.part.config
        said: list[str] = []
        if widths := config.get("block_out_channels") or config.get("channels"):
            said.append(f"widths {', '.join(map(str, widths))}")
        if self.kind == CONTROLNET:
            if any(".transformer_blocks." in name for name in self.part.tensors):  # small ones have none
                said.append(f"reads a context of {config['cross_attention_dim']} numbers a token")
            said.append(
                f"reads a picture of {config['conditioning_channels']} channels, {self.channel_order}"
            )
        if self.kind == T2I_ADAPTER:
            channels = config["in_channels"]
            said.append(f"reads a picture of {channels} channel{'s' * (channels != 1)}")
        if self.kind == IP_ADAPTER:
            width = config.get("embed_dims", config.get("image_embed_dim"))
            said.append(f"{self.tokens} tokens a picture, of {self.image_features} of {width} numbers")
            if not self.layers:
                said.append(f"{len(config['layer_widths'])} layers, as many as no published UNet has")
        if self.control_types:
            said.append(
                f"control types: {', '.join(f'{i} {name}' for i, name in enumerate(self.control_types))}"
            )
        if self.global_pool:
            said.append("its residuals are averaged over the picture")
        if self.needs_base:
            said.append("needs the checkpoint that it was made of")
        return (*said, *self.notes)
