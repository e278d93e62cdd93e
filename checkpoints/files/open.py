"""Open a checkpoint: find its parts, recognise its family, and refuse what cannot be exported.

Only JSON and safetensors headers are read. Nothing here imports torch or unpickles.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast

from ...engines.errors import CheckpointError
from ...engines.hub import called, snapshot
from ...engines.package import IMAGE_LATENTS, TIME_IDS, FusedAdapter
from ...engines.spec import TEXT_ENCODERS
from .component import (
    DIFFUSERS,
    DOWNLOAD,
    SUPPORTED,
    Component,
    TensorHeader,
    missing,
    read_component,
    read_headers,
    read_json,
)
from .configs import check_config, read_config, read_recommended
from .families import (
    CLASSES,
    OTHER,
    PIPELINES,
    PipelineFolder,
    as_in_pipeline,
    class_of,
    defaults,
    layout_of,
    left_out,
    refuse_class,
    refuse_scheduler,
    refuse_unet,
)
from .file_kinds import refuse_other_formats
from .folder_kinds import kind_of_folder
from .quantised import refuse_quantised
from .single_file import check_prediction_type, open_single_file, open_vae_file
from .tokenizers import WriteTokenizer, copy_tokenizer, tokenizer_files, write_clip_tokenizer

# The width of a UNet's `time_ids` -> its numbers, in the order of diffusers' `_get_add_time_ids`.
_TIME_IDS = {6: TIME_IDS[:6], 5: (*TIME_IDS[:4], "aesthetic_score")}
# The family of a one-file checkpoint -> the pipeline whose layout and defaults it has.
_FILE_PIPELINES = {
    "sd1": "StableDiffusionPipeline",
    "sd2": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sdxl-refiner": "StableDiffusionXLImg2ImgPipeline",
    "unclip": "StableUnCLIPImg2ImgPipeline",
}
_LCM = PIPELINES["LatentConsistencyModelPipeline"]
TINY = "AutoencoderTiny"
# A tiny decoder's first convolution, by diffusers' names and in TAESD's own files.
_TINY_NAMES = {"decoder.layers.0.weight", "1.weight"}
_SCALING = 0.18215  # of 1.x and 2.x; the default of AutoencoderKL
_VAE_FIX = "Use the folder or file of an AutoencoderKL, or of an AutoencoderTiny (TAESD)."


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What can be exported: the parts, and what a package's manifest says about them.

    Attributes:
        root: the folder or file.
        parts: `unet` and `vae`, and some of `text_encoder`, `text_encoder_2`, `image_encoder`,
            `image_normalizer`, `tiny_vae`.
        tokenizers: by their folders' names, what writes them.
        configs: JSON objects by their folders' names: `scheduler`, and for unCLIP `feature_extractor` and
            `image_noising_scheduler`.
        defaults: a request's steps, guidance scale and strength, and what the folder recommends, by the names
            of `engines.package.Defaults`.
        zero_empty_prompt: as in `engines.package.Manifest`.
        predicts_by: what says which type the UNet predicts: "scheduler_config.json", "the tensor v_pred", ….
        fused: the adapters that are part of the weights.
        few_steps: a request's defaults that one of these asks for, by the names of
            `engines.package.Defaults`; they go before all others.
        notes: for the user: what was assumed about a one-file checkpoint, which tensors and metadata are not
            used, and which variant of a folder's weights is taken.
    """

    root: Path
    parts: Mapping[str, Component]
    tokenizers: Mapping[str, WriteTokenizer]
    configs: Mapping[str, Mapping[str, Any]]
    defaults: Mapping[str, Any]
    zero_empty_prompt: bool = False
    predicts_by: str = "scheduler_config.json"
    fused: tuple[FusedAdapter, ...] = ()
    few_steps: Mapping[str, Any] = field(default_factory=dict[str, Any])
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check that the parts fit each other; raises CheckpointError."""
        refuse_unet(self.unet)
        refuse_scheduler(self.scheduler, self.root)
        for part in self.parts.values():
            refuse_quantised(part.folder, part.tensors)
        _ = self.vectors  # raises where a part is missing
        context = sum(int(part.config.get("hidden_size", 512)) for part in self.text_encoders)
        wanted = int(self.unet.config.get("cross_attention_dim", 1280))
        if context != wanted:
            raise CheckpointError(
                f"{self.unet.folder} wants a context of width {wanted}",
                expected=f"{context}, the width of {' and '.join(part.name for part in self.text_encoders)}",
                fix=DOWNLOAD,
            )
        _check_latents(self.vae, self.latent_scale)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        prefer_fp16: bool = False,
        vae: Path | None = None,
        tiny_vae: Path | None = None,
        prediction_type: str | None = None,
    ) -> Checkpoint:
        """Read configs and safetensors headers.

        Args:
            path: a folder in diffusers' layout, a repository in Hugging Face's cache, or a `.safetensors`
                file that holds a whole checkpoint.
            prefer_fp16: take the `.fp16.safetensors` variant where both are there.
            vae: a folder or file of another autoencoder, in place of the checkpoint's.
            tiny_vae: a folder or file of a tiny autoencoder (TAESD) for previews.
            prediction_type: what the UNet of a one-file checkpoint predicts; None is what its file says.

        Raises:
            CheckpointError: the path does not exist; the family is not supported; a config or a weights file
                is damaged; weights are pickled or quantised; parts do not fit each other.
            UsageError: an unknown `prediction_type`.
        """
        root = snapshot(Path(path))
        if not root.exists():
            raise CheckpointError(f"{root} does not exist", expected=SUPPORTED, fix="Check the path.")
        check_prediction_type(prediction_type)
        other_vae = None if vae is None else partial(_replace_vae, path=vae, prefer_fp16=prefer_fp16)
        if root.is_file():
            found = _open_file(root, prediction_type, other_vae)
        else:
            found = _open_folder(root, prefer_fp16, prediction_type, other_vae)
        if tiny_vae is None:
            return found
        scale = float(found.vae.config.get("scaling_factor", _SCALING))
        tiny = _open_vae(tiny_vae, "tiny_vae", scaling_factor=scale, prefer_fp16=prefer_fp16)
        _check_latents(tiny, found.latent_scale)
        return replace(found, parts={**found.parts, "tiny_vae": tiny})

    @property
    def name(self) -> str:
        """What people call it: the file's or folder's name, or in a hub's cache its repository's."""
        path = Path(os.path.abspath(self.root))
        return called(path, path.stem if path.is_file() else path.name)

    @property
    def unet(self) -> Component:
        """The UNet."""
        return self.parts["unet"]

    @property
    def vae(self) -> Component:
        """The autoencoder of finished pictures."""
        return self.parts["vae"]

    @property
    def text_encoders(self) -> tuple[Component, ...]:
        """The text encoders, in the order in which their features are joined."""
        return tuple(self.parts[name] for name in TEXT_ENCODERS if name in self.parts)

    @property
    def vectors(self) -> Mapping[str, int]:
        """The UNet's conditions besides the prompt (`engines.spec.VECTORS`) and their widths.

        Raises:
            CheckpointError: the part that makes one is missing, or makes another width.
        """
        config = self.unet.config
        vectors: dict[str, int] = {}
        if config.get("time_cond_proj_dim"):
            vectors["timestep_cond"] = int(config["time_cond_proj_dim"])
        joined = int(config.get("projection_class_embeddings_input_dim") or 0)
        if config.get("class_embed_type") == "projection":
            vectors["class_labels"] = joined
            self._require("image_encoder", joined == 2 * self._width("image_encoder"), joined)
        if config.get("addition_embed_type") == "text_time":
            pooled = self._width("text_encoder_2")
            count, rest = divmod(joined - pooled, int(config.get("addition_time_embed_dim") or 1))
            self._require("text_encoder_2", count in _TIME_IDS and not rest, joined)
            vectors |= {"text_embeds": pooled, "time_ids": count}
        return vectors

    def _width(self, name: str) -> int:
        """The width of a part's projected embedding; 0 where there is no such part."""
        return int(self.parts[name].config.get("projection_dim", 512)) if name in self.parts else 0

    def _require(self, name: str, ok: bool, joined: int) -> None:
        if not ok:
            found = f"one of width {self._width(name)}" if name in self.parts else "none"
            raise CheckpointError(
                f"{self.unet.folder} is conditioned by {joined} values from the {name}, and there is {found}",
                expected=SUPPORTED,
                fix=OTHER,
            )

    @property
    def family(self) -> str:
        """The family's name, for people. Nothing is decided by it."""
        if "image_normalizer" in self.parts:
            return "unclip"
        if "timestep_cond" in self.vectors:
            return "lcm"
        if "text_encoder_2" in self.parts:
            return "sdxl" if "text_encoder" in self.parts else "sdxl-refiner"
        return "sd2" if self.parts["text_encoder"].config.get("hidden_act") == "gelu" else "sd1"

    @property
    def scheduler(self) -> Mapping[str, Any]:
        """The checkpoint's `scheduler_config.json`."""
        return self.configs["scheduler"]

    @property
    def skips_last_layer(self) -> bool:
        """Whether the context is taken one layer before the last and not normalised: all of SDXL."""
        return "text_encoder_2" in self.parts

    @property
    def time_ids(self) -> tuple[str, ...]:
        """What the numbers of the vector `time_ids` are."""
        return _TIME_IDS[self.vectors["time_ids"]] if "time_ids" in self.vectors else ()

    @property
    def image_latents(self) -> tuple[str, ...]:
        """What the channels behind the latent in the UNet's input are."""
        return IMAGE_LATENTS if self.unet.config.get("in_channels", 4) == 9 else ()

    @property
    def sample_size(self) -> tuple[int, int]:
        """Height and width of the latents that the UNet was trained at."""
        size: Any = self.unet.config.get("sample_size") or 64
        written_by = str(self.unet.config.get("_diffusers_version", ""))
        if isinstance(size, int) and re.match(r"0\.[0-8]\.", written_by):
            size = max(size, 64)  # early configs of 1.x say 32; diffusers' pipelines mend it too
        height, width = cast(list[int], size) if isinstance(size, list | tuple) else (size, size)
        return height, width

    @property
    def latent_scale(self) -> int:
        """Pixels per latent cell."""
        return vae_scale(self.vae.config)


# Opens the autoencoder that takes the place of the checkpoint's: of its config, if there is one, and the
# scaling factor of its family.
_OtherVae = Callable[[Mapping[str, Any] | None, float], Component]


def _open_folder(
    root: Path, prefer_fp16: bool, prediction_type: str | None, other_vae: _OtherVae | None
) -> Checkpoint:
    if not (root / "model_index.json").is_file():
        refuse_without_index(root)
    index = read_json(root / "model_index.json")
    layout = layout_of(str(index.get("_class_name")), root)
    absent = left_out(layout, index)
    parts: dict[str, Component] = {}
    for name, stem in layout.parts.items():
        if name == "vae" and other_vae is not None:
            own = None
            with suppress(CheckpointError):  # whatever is wrong with it, it is not used
                own = read_config(root / name / "config.json", name)
            parts[name] = other_vae(own, 0.13025 if "text_encoder_2" in layout.parts else _SCALING)
        elif name not in absent:
            parts[name] = _read_part(root / name, name, stem, index, prefer_fp16=prefer_fp16)
    tokenizers = {folder: root / folder for name, folder in TEXT_ENCODERS.items() if name in parts}
    for name, folder in tokenizers.items():
        if not folder.is_dir():
            missing(folder)
        refuse_class(name, class_of(index, name, "CLIPTokenizer"), folder)
        tokenizer_files(folder)
    configs = _read_configs(root, layout, index)
    configs["scheduler"] = as_in_pipeline(configs["scheduler"], str(index["_class_name"]))
    if prediction_type is not None:
        configs["scheduler"]["prediction_type"] = prediction_type
    return Checkpoint(
        root=root,
        parts=parts,
        tokenizers={name: partial(copy_tokenizer, folder=folder) for name, folder in tokenizers.items()},
        configs=configs,
        defaults={**defaults(layout, configs["scheduler"]), **read_recommended(root)},
        # Pipelines of other families do not read the key.
        zero_empty_prompt=layout.zero_empty_prompt and bool(index.get("force_zeros_for_empty_prompt", True)),
        predicts_by="scheduler_config.json" if prediction_type is None else "the caller",
        notes=_noted_variants(parts),
    )


def _read_configs(root: Path, layout: PipelineFolder, index: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The configs of parts without weights, of the classes that the index names."""
    configs: dict[str, dict[str, Any]] = {}
    for name, file in layout.configs.items():
        config = read_json(root / name / file)
        if name in CLASSES:
            refuse_class(name, class_of(index, name, CLASSES[name][0]), root / name)
        elif index.get(name) is not None or isinstance(config.setdefault("_class_name", None), str):
            config["_class_name"] = class_of(index, name, config.get("_class_name"))
        check_config(config, root / name / file, name)
        configs[name] = config
    return configs


def refuse_without_index(root: Path) -> NoReturn:
    """Raise the CheckpointError for a folder that is not in diffusers' layout, saying what it is."""
    kind = kind_of_folder(root)
    if kind is None:
        raise CheckpointError(
            f"{root} is no checkpoint: model_index.json is missing, and there is no .safetensors file",
            expected="a folder in diffusers' layout, or a file",
            fix="Check the path; `latentrt inspect` says what any other file or folder is.",
        )
    raise CheckpointError(
        f"{root} is {kind.what}", expected="a folder in diffusers' layout, or a file", fix=kind.advice(root)
    )


def _noted_variants(parts: Mapping[str, Component]) -> tuple[str, ...]:
    """A line for each part whose weights are a variant that nobody asked for."""
    notes: list[str] = []
    for name, part in parts.items():
        files = {header.file.name for header in part.tensors.values() if header.file.parent == part.folder}
        variants = sorted(file for file in files if re.search(r"\.(?!fp16\.)[\w-]+\.safetensors$", file))
        if variants:
            notes.append(f"{name}: {variants[0]} is taken, there are no other weights")
    return tuple(notes)


def _read_part(
    folder: Path, name: str, stem: str, index: Mapping[str, Any], *, prefer_fp16: bool
) -> Component:
    """A part of the class that the index names, or its config where the index names none."""
    part = read_component(folder, name, stem, prefer_fp16=prefer_fp16)
    check_config(part.config, folder / "config.json", name)
    named = class_of(index, name, part.config.get("_class_name", CLASSES[name][0]))
    refuse_class(name, named, folder)
    return replace(part, config={**part.config, "_class_name": named}) if stem == DIFFUSERS else part


def _open_file(path: Path, prediction_type: str | None, other_vae: _OtherVae | None) -> Checkpoint:
    found = open_single_file(path, prediction_type=prediction_type, without_vae=other_vae is not None)
    layout = PIPELINES[_FILE_PIPELINES[found.family]]
    parts = dict(found.components)
    if parts["unet"].config.get("time_cond_proj_dim"):  # distilled for few steps, whatever its family
        layout = replace(layout, steps=_LCM.steps, guidance_scale=_LCM.guidance_scale)
    if other_vae is not None:
        parts["vae"] = other_vae(parts["vae"].config if "vae" in parts else None, found.scaling_factor)
    pads = found.tokenizers.items()
    return Checkpoint(
        root=path,
        parts=parts,
        tokenizers={name: partial(write_clip_tokenizer, pad_token=pad) for name, pad in pads},
        configs=found.configs,
        defaults=defaults(layout, found.scheduler),
        # As in the folder that the refiner is published in.
        zero_empty_prompt=layout.zero_empty_prompt and found.family != "sdxl-refiner",
        predicts_by=found.predicts_by,
        notes=found.notes,
    )


def _replace_vae(
    own: Mapping[str, Any] | None, scaling_factor: float, *, path: Path, prefer_fp16: bool
) -> Component:
    """The autoencoder at `path`. Its latents must be like those of `own`, the config of the checkpoint's."""
    scale = float((own or {}).get("scaling_factor", scaling_factor))
    part = _open_vae(path, "vae", scaling_factor=scale, prefer_fp16=prefer_fp16)
    _check_latents(part, 8 if own is None else vae_scale(own))  # 8 is that of every family
    return part


def _check_latents(part: Component, scale: int) -> None:
    """Raise CheckpointError unless latents have four channels and `scale` pixels a cell."""
    channels, found = cast(object, part.config.get("latent_channels", 4)), vae_scale(part.config)
    if channels != 4 or found != scale:
        raise CheckpointError(
            f"{part.folder} has latents of {channels} channels, {found} pixels a cell",
            expected=f"4 channels and {scale} pixels, as this checkpoint's",
            fix="Use an autoencoder of the same family.",
        )


def is_tiny(vae: Component) -> bool:
    """Whether it is an AutoencoderTiny: it has no posterior, and is fast enough for a preview each step."""
    return vae.config.get("_class_name") == TINY


def vae_scale(config: Mapping[str, Any]) -> int:
    """Pixels per latent cell of an autoencoder, as diffusers' pipelines compute it."""
    is_tiny = config.get("_class_name") == TINY
    widths = config.get("decoder_block_out_channels" if is_tiny else "block_out_channels")
    return int(2 ** (len(widths or (0,) * 4) - 1))


def _open_vae(path: Path, name: str, *, scaling_factor: float, prefer_fp16: bool) -> Component:
    """The autoencoder in a diffusers folder or a `.safetensors` file, as the part "vae" or "tiny_vae".

    `scaling_factor` is for files, which do not have it.

    Raises:
        CheckpointError: it is missing or damaged, no tiny one for "tiny_vae", or without encoder for "vae".
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist", expected="an autoencoder", fix=_VAE_FIX)
    if path.is_file():
        part = _open_vae_file(path, name, scaling_factor)
    else:
        part = read_component(path, name, DIFFUSERS, prefer_fp16=prefer_fp16)
        check_config(part.config, path / "config.json", name)
        refuse_class("vae", class_of({}, "vae", part.config.get("_class_name", CLASSES["vae"][0])), path)
    if name == "tiny_vae" and not is_tiny(part):
        raise CheckpointError(
            f"{path} holds a full autoencoder",
            expected="a tiny one (TAESD)",
            fix="Pass it as --vae, or use TAESD's file.",
        )
    if name == "vae" and is_tiny(part) and not any(tensor.startswith("encoder.") for tensor in part.tensors):
        raise CheckpointError(
            f"{path} has a decoder and no encoder",
            expected="both, in place of the checkpoint's autoencoder",
            fix="Pass it as --tiny-vae, for previews, or use a file with both.",
        )
    return part


def _open_vae_file(path: Path, name: str, scaling_factor: float) -> Component:
    refuse_other_formats(path)
    headers = read_headers(path)
    if _TINY_NAMES.isdisjoint(headers):
        return replace(open_vae_file(path, scaling_factor=scaling_factor), name=name)
    if "decoder.layers.0.weight" not in headers:
        # TAESD's decoder by its places in torch's Sequential, whose first layer, the clamp, diffusers does
        # not count among its layers.
        headers = {f"decoder.layers.{_one_less(old)}": header for old, header in headers.items()}
    return Component(name=name, folder=path, config=_tiny_config(headers), tensors=headers)


def _one_less(name: str) -> str:
    place, _, rest = name.partition(".")
    return f"{int(place) - 1}.{rest}" if place.isdecimal() else name


def _tiny_config(headers: Mapping[str, TensorHeader]) -> dict[str, object]:
    """AutoencoderTiny's config from the decoder's tensors: a level is some blocks and a bare convolution."""
    blocks, levels = 0, list[int]()
    places = {name.split(".")[2] for name in headers if name.startswith("decoder.layers.")}
    layers = sorted(map(int, filter(str.isdecimal, places)))
    for place in layers[1:]:  # the first convolution takes the latent
        if f"decoder.layers.{place}.conv.0.weight" in headers:
            blocks += 1
        else:
            levels.append(blocks)
            blocks = 0
    first = headers["decoder.layers.0.weight"].shape
    widths = [first[0]] * len(levels)
    return {
        "_class_name": TINY,
        "latent_channels": first[1],
        "decoder_block_out_channels": widths,
        "encoder_block_out_channels": widths,
        "num_decoder_blocks": levels,
        "num_encoder_blocks": levels[::-1],
    }
