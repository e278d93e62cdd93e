"""What a file is, by its first bytes and by its tensors' names: a whole checkpoint, or which other kind.

The names are those that tools write: sd-scripts, LyCORIS, diffusers, PEFT, ControlNet, IP-Adapter and others.
A file's own name decides nothing but whether an unknown content is taken for a pickle.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ...engines.errors import CheckpointError, command
from ...engines.lfs import refuse_pointer
from ...engines.safetensors_format import NOT_FINITE, looks_like_safetensors
from .component import DOWNLOAD, PICKLES, REFUSED_CHANNELS, TensorHeader
from .ldm_names import UNET

_CONV_IN = f"{UNET}input_blocks.0.0.weight"
_FILE = (
    "UNet, text encoders and autoencoder of Stable Diffusion 1.x or 2.x, SDXL or its refiner, or of Stable"
    " unCLIP, in one file"
)


@dataclass(frozen=True, kw_only=True)
class FileKind:
    """What a file is.

    Attributes:
        name: for programs: "checkpoint", "lora", "vae", "pickle", ….
        what: for people, with an article: "a LoRA".
        todo: what to do with it, a sentence. Where it ends in a command, `{file}` stands for the path.
    """

    name: str
    what: str
    todo: str

    def advice(self, path: Path) -> str:
        """What to do with this file."""
        return self.todo.format(file=command(path), folder=command(path.parent), free=command(_free(path)))


# The kind of files that steer a UNet, and that nothing here can use.
UNUSABLE_CONTROL = "unusable-control"

_EMBEDDING = "Call it in a prompt: latentrt generate embedding:NAME -m CHECKPOINT --embd-dir {folder}"
_ADAPTER = "Draw with it and a model that it is made for: latentrt generate PROMPT -m MODEL --lora {file}"
# Of a control, by its kind.
STEER = {
    kind: "Let it steer a model that it is made for: latentrt generate PROMPT -m MODEL"
    f" {option} {{file}} {picture} PICTURE"
    for kind, option, picture in (
        ("controlnet", "--control-net", "--control-image"),
        ("t2i-adapter", "--t2i-adapter", "--control-image"),
        ("ip-adapter", "--ip-adapter", "--ip-adapter-image"),
    )
}
_NO_CONTROL = "Use a ControlNet, a T2I-Adapter or an IP-Adapter of features of an image encoder."
_OTHER = "No other architecture is supported: use a checkpoint of Stable Diffusion 1.x, 2.x or XL."
_PART = "Use the complete checkpoint; other tools also write its parts alone."
_CONVERT = "Convert it, which runs nothing of it: latentrt convert {file} -o {free}"
_UNPACK = "Unpack it: 7z x {file}"
_WEIGHTS = "Use the model's .safetensors file with fp16 or fp32 weights."

# The first bytes of files that are no safetensors.
_STARTS: tuple[tuple[bytes, FileKind], ...] = (
    (b"GGUF", FileKind(name="gguf", what="a GGUF file, of quantised weights", todo=_WEIGHTS)),
    (b"\x89HDF", FileKind(name="hdf5", what="an HDF5 file, as Keras writes", todo=_WEIGHTS)),
    (b"\x89PNG", FileKind(name="picture", what="a picture", todo=DOWNLOAD)),
    (b"\xff\xd8\xff", FileKind(name="picture", what="a picture", todo=DOWNLOAD)),
    (b"Rar!", FileKind(name="archive", what="a RAR archive", todo=_UNPACK)),
    (b"7z\xbc\xaf", FileKind(name="archive", what="a 7z archive", todo=_UNPACK)),
    (b"\x1f\x8b", FileKind(name="archive", what="a gzip archive", todo=_UNPACK)),
)
# Of a pickle in letters: an empty mapping or list, or the global that the first object is made with.
_PROTOCOL_0 = re.compile(rb"\([dl]p?\d*\n|c[\w.]+\n[\w.]+\n")
_PICKLE = FileKind(name="pickle", what="a pickle: reading one can run code", todo=_CONVERT)
_ZIP = FileKind(name="archive", what="a zip archive", todo="Unpack it: python3 -m zipfile -e {file} {folder}")
_EMPTY = FileKind(name="empty", what="empty", todo=DOWNLOAD)
_PAGE = FileKind(
    name="page",
    what="an HTML page, such as a browser saves in place of a file behind a log-in",
    todo=f"Log in and accept the model's terms first, then: {DOWNLOAD}",
)
_JSON = FileKind(name="json", what="a JSON text, such as a config or a server's refusal", todo=DOWNLOAD)
_TEXT = FileKind(name="text", what="a text, such as a server's refusal", todo=DOWNLOAD)


def kind_of_bytes(path: Path) -> FileKind | None:
    """What a file is that is no safetensors; None for safetensors, or for what only its reader can name.

    Raises:
        CheckpointError: a git-lfs pointer.
    """
    refuse_pointer(path)
    try:
        with path.open("rb") as stream:
            start = stream.read(256)
    except OSError:  # the next reader reports it
        return None
    if not start:
        return _EMPTY
    if looks_like_safetensors(path):
        return None
    for magic, kind in _STARTS:
        if start.startswith(magic):
            return kind
    if start.startswith(b"PK\x03\x04"):
        return _kind_of_zip(path)
    if start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") or _PROTOCOL_0.match(start):
        return _PICKLE
    return _kind_of_text(start) or (_PICKLE if path.suffix.lower() in PICKLES else None)


def _kind_of_zip(path: Path) -> FileKind:
    with suppress(zipfile.BadZipFile, OSError, ValueError), zipfile.ZipFile(path) as archive:
        if not any(name.endswith("data.pkl") for name in archive.namelist()):
            return _ZIP
    return _PICKLE  # torch's, perhaps half of one


def _kind_of_text(start: bytes) -> FileKind | None:
    with suppress(UnicodeDecodeError):
        text = start.decode("ascii").strip()
        if text.startswith("<"):
            return _PAGE
        if text.startswith(("{", "[")):
            return _JSON
        if len(text) > 8 and text.replace("\r", " ").replace("\n", " ").isprintable():
            return _TEXT
    return None


def refuse_other_formats(path: Path) -> None:
    """Raise CheckpointError for a file that is no safetensors, whatever it is called."""
    kind = kind_of_bytes(path) if path.is_file() else None
    if kind is not None:
        raise CheckpointError(
            f"{path} is {kind.what}",
            expected="a .safetensors file or a diffusers folder",
            fix=kind.advice(path),
        )


def _free(path: Path) -> Path:
    """Where a converted pickle goes: beside it, under a name that is free."""
    free = path.with_suffix(".safetensors")
    while free.exists():
        free = free.with_stem(f"{free.stem}-converted")
    return free


def _no_control(what: str) -> FileKind:
    """A control that steers otherwise than by residuals, features, or keys and values of tokens."""
    return FileKind(name=UNUSABLE_CONTROL, what=what, todo=_NO_CONTROL)


# What an IP-Adapter has that reads embeddings of faces: low-rank changes of all attentions, a resampler of
# its own, or two layers and a norm that is not the third.
_FACE_ID = (
    r"^(ip_adapter|adapter_modules)\.\d+\.to_(q|k|v|out)_lora\.|^image_proj(_model)?\.perceiver_resampler\."
    r"|\A(?=[\s\S]*^image_proj(_model)?\.norm\.)(?=[\s\S]*^image_proj(_model)?\.proj\.0\.)"
)
# A pattern that only this kind's tensor names match -> the kind. First match wins. Those of `_WITH_UNET`
# count though a whole checkpoint may lie beside them; the others where there is no UNet of a checkpoint.
_WITH_UNET: Mapping[str, FileKind] = {
    r"\b(base_to_ctrl|ctrl_to_base|(enc|dec)_zero_convs_(in|out)|middle_block_in)\b": _no_control(
        "a ControlNet-XS"
    ),
    r"^control_model\.": FileKind(
        name="controlnet", what="a ControlNet (original names)", todo=STEER["controlnet"]
    ),
    r"^(model\.diffusion_model\.)?double_blocks\.0\.img_attn\.": FileKind(
        name="other", what="Flux, or a relative of it", todo=_OTHER
    ),
    r"^(model\.diffusion_model\.)?joint_blocks\.0\.": FileKind(
        name="other", what="Stable Diffusion 3", todo=_OTHER
    ),
    r"^edm_(mean|std)$": FileKind(name="other", what="Playground 2.5", todo=_OTHER),
    r"^edm_vpred\.sigma_(max|min)$": FileKind(
        name="other", what="CosXL, or another model trained by EDM's convention", todo=_OTHER
    ),
    r"\bmotion_modules\.": FileKind(name="animatediff", what="AnimateDiff", todo=_OTHER),
    r"^model\.diffusion_model\..+\.(time_stack|time_mixer)\b": FileKind(
        name="other", what="Stable Video Diffusion", todo=_OTHER
    ),
}
_LORA = "lora"
_OTHER_LORAS = r"_lora\.(down|up)\.|\.lora(_down|_up|_linear_layer|\.down|\.up)\."
_BOFT = FileKind(name=_LORA, what="a LoRA (BOFT)", todo=_ADAPTER)
# Layers that diffusion transformers have, and no UNet.
_TRANSFORMERS = (
    r"\b(txt_in\.individual_token_refiner|txt_in\.text_norm|txt_norm|txtfusion|distilled_guidance_layer|"
    r"patchify_proj|head\.modulation|caption_projection|adaln_single|y_embedder|cap_embedder|adaLN_modulation)\b"
)
_WITHOUT_UNET: Mapping[str, FileKind] = {
    r"^lora_controlnet$": FileKind(
        name="controlnet", what="a control-LoRA (Stability's)", todo=STEER["controlnet"]
    ),
    r"^lllite_unet_": _no_control("a ControlNet-LLLite"),
    r"^(spatial_feat_mapping|seq_proj$)": _no_control("a fuser of T2I-Adapters (CoAdapter)"),
    r"^style_embedding$": _no_control("a style adapter (T2I-Adapter's)"),
    r"^controlnet_(x_embedder|single_blocks|blocks)\.": FileKind(
        name="other", what="a ControlNet of another architecture (a diffusion transformer)", todo=_OTHER
    ),
    r"^(task_embedding$|control_add_embedding\.)": FileKind(
        name="controlnet", what="a ControlNet (Union)", todo=STEER["controlnet"]
    ),
    r"^controlnet_cond_embedding\.": FileKind(
        name="controlnet", what="a ControlNet (diffusers' names)", todo=STEER["controlnet"]
    ),
    r"^(input_hint_block|zero_convs)\.": FileKind(
        name="controlnet", what="a ControlNet (original names)", todo=STEER["controlnet"]
    ),
    _FACE_ID: _no_control("an IP-Adapter FaceID"),
    r"^(ip_adapter|image_proj(_model)?|adapter_modules)\.|\.to_k_ip\.": FileKind(
        name="ip-adapter", what="an IP-Adapter", todo=STEER["ip-adapter"]
    ),
    r"^(adapter\.)?(body\.\d+\.(block1|resnets|in_conv)\b|.*\.in_conv\.weight$)": FileKind(
        name="t2i-adapter", what="a T2I-Adapter", todo=STEER["t2i-adapter"]
    ),
    r"\.hada_w1_": FileKind(name=_LORA, what="a LoRA (LoHa)", todo=_ADAPTER),
    r"\.lokr_w[12]": FileKind(name=_LORA, what="a LoRA (LoKr)", todo=_ADAPTER),
    r"\.boft_(R|s|P)\b": _BOFT,
    r"\.oft_(blocks|diag|R)\b": FileKind(name=_LORA, what="a LoRA (OFT)", todo=_ADAPTER),
    r"\.on_input$": FileKind(name=_LORA, what="a LoRA (IA3)", todo=_ADAPTER),
    r"^(lora|lycoris)_.+\.(a1|b1)\.weight$": FileKind(name=_LORA, what="a LoRA (GLoRA)", todo=_ADAPTER),
    r"^lora_.+\.lora_(down|up)\.": FileKind(name=_LORA, what="a LoRA (kohya's names)", todo=_ADAPTER),
    r"\.lora_(A|B)\.": FileKind(name=_LORA, what="a LoRA (PEFT's names)", todo=_ADAPTER),
    _OTHER_LORAS: FileKind(name=_LORA, what="a LoRA", todo=_ADAPTER),
    r"\.diff(_b)?$": FileKind(
        name=_LORA, what="whole differences of weights, a LoRA's relative", todo=_ADAPTER
    ),
    r"\.[wb]_norm$": FileKind(name=_LORA, what="differences of norms, a LoRA's relative", todo=_ADAPTER),
    r"\.set_weight$": FileKind(name=_LORA, what="new weights, a LoRA's relative", todo=_ADAPTER),
    r"^(lora|lycoris)_": FileKind(name=_LORA, what="a LoRA", todo=_ADAPTER),
    r"^(emb_params|clip_l|clip_g)$|^string_to_param\.": FileKind(
        name="embedding", what="a textual inversion", todo=_EMBEDDING
    ),
    r"clip_txt_mapper\.|\bchannelwise\.0\.": FileKind(name="other", what="Stable Cascade", todo=_OTHER),
    r"\bdouble_layers\.0\.attn\.w": FileKind(name="other", what="AuraFlow", todo=_OTHER),
    _TRANSFORMERS: FileKind(
        name="other", what="a model of another architecture (a diffusion transformer)", todo=_OTHER
    ),
    r"^(encoder\.)?block\.0\.layer\.0\.SelfAttention\.": FileKind(
        name="text-encoder", what="a T5 text encoder alone", todo=_OTHER
    ),
    r"^(concept_embeds|special_care_embeds)": FileKind(
        name="safety-checker", what="a safety checker", todo="None is used here."
    ),
    r"^(model\.0\.weight|conv_first\.weight|body\.0\.rdb1\..+|model\.1\.sub\.0\..+)$": FileKind(
        name="upscaler", what="an upscaler of pictures (ESRGAN)", todo="None is used here."
    ),
}
_TINY_VAE = FileKind(
    name="tiny-vae",
    what="a tiny autoencoder (TAESD)",
    todo="Give it to a checkpoint, for previews: latentrt generate PROMPT -m CHECKPOINT --tiny-vae {file}",
)
_UNET_ALONE = FileKind(name="unet", what="a UNet alone", todo=_PART)
_TEXT_ALONE = FileKind(name="text-encoder", what="a text encoder alone", todo=_PART)
# The beginnings of two names -> the kind of file that has both, where it has no whole checkpoint.
_PAIRS: Mapping[tuple[str, str], FileKind] = {
    ("1.weight", "3.conv.0."): _TINY_VAE,
    ("unet.", "vae."): FileKind(
        name="other",
        what="a diffusers pipeline in one file",
        todo="Use the pipeline's folder, with its model_index.json.",
    ),
}
# The same as above for files with one part of a checkpoint.
_PARTS: Mapping[str, FileKind] = {
    r"^(taesd_)?(encoder|decoder)\.layers\.0\.weight$": _TINY_VAE,
    r"^first_stage_model\.|^(vae\.)?(encoder|decoder)\.conv_in\.weight$": FileKind(
        name="vae",
        what="an autoencoder alone",
        todo="Give it to a checkpoint: latentrt generate PROMPT -m CHECKPOINT --vae {file}",
    ),
    r"^input_blocks\.0\.0\.weight$|^(unet\.)?(down_blocks\.0|conv_in)\.": _UNET_ALONE,
    r"^(cond_stage_model|conditioner|text_model|embeddings|transformer|token_embedding)\.": _TEXT_ALONE,
    r"^(vision_model|visual)\.": FileKind(name="image-encoder", what="an image encoder alone", todo=_PART),
}
_CHECKPOINT = FileKind(
    name="checkpoint", what="a whole checkpoint", todo="Draw with it: latentrt generate PROMPT -m {file}"
)
# Widths of the text encoders of 1.x, 2.x and XL's second: vectors of one of them are an embedding.
_TOKEN_WIDTHS = (768, 1024, 1280)
_OF_LAYERS = (".weight", ".bias")  # ends of names that no token has


def kind_of_tensors(tensors: Mapping[str, TensorHeader]) -> FileKind:
    """What a safetensors file is. The names are the usual ones (`ldm_names.usual_names`).

    "checkpoint" is what has the UNet of one; parts may be missing.
    """
    names = "\n".join(tensors)
    kinds = _WITH_UNET if _CONV_IN in tensors else {**_WITH_UNET, **_WITHOUT_UNET}
    for pattern, kind in kinds.items():
        if re.search(pattern, names, re.MULTILINE):
            stages = any(name.endswith(".oft_blocks") and len(t.shape) == 4 for name, t in tensors.items())
            return _BOFT if stages and kind.name == _LORA else kind
    if _CONV_IN in tensors:
        return _kind_of_channels(tensors[_CONV_IN].shape)
    for pair, kind in _PAIRS.items():
        if all(any(name.startswith(start) for name in tensors) for start in pair):
            return kind
    found = (kind for pattern, kind in _PARTS.items() if re.search(pattern, names, re.MULTILINE))
    return next(found, None) or _kind_of_few(tensors)


def _kind_of_channels(shape: tuple[int, ...]) -> FileKind:
    channels = shape[1] if len(shape) == 4 else 0
    if channels in (4, 9):
        return _CHECKPOINT
    what = REFUSED_CHANNELS.get(channels, f"a UNet of {channels} input channels")
    return FileKind(name="other", what=what, todo=_OTHER)


def _kind_of_few(tensors: Mapping[str, TensorHeader]) -> FileKind:
    """A file whose names say nothing: one embedding under its token's name, or no kind that is known."""
    if len(tensors) == 1:
        ((name, tensor),) = tensors.items()
        known = len(tensor.shape) == 1 and tensor.shape[0] in _TOKEN_WIDTHS
        # A matrix of any width: only the text encoder that it is for knows whether it fits.
        vectors = len(tensor.shape) == 2 and 0 not in tensor.shape and tensor.dtype in NOT_FINITE
        if known or (vectors and not name.endswith(_OF_LAYERS)):
            return FileKind(name="embedding", what="a textual inversion", todo=_EMBEDDING)
    names = f"{', '.join(list(tensors)[:3])} …" if tensors else "it has no tensors"
    return FileKind(name="unknown", what=f"no kind that is known ({names})"[:200], todo=_OTHER)


def refuse_other_kinds(path: Path, tensors: Mapping[str, TensorHeader], metadata: Mapping[str, str]) -> None:
    """Raise CheckpointError for a file without a Stable Diffusion UNet of 4 or 9 input channels."""
    kind = kind_of_tensors(tensors)
    if kind.name != _CHECKPOINT.name:
        base = base_of(tensors, metadata)
        named = f"{kind.what} for {FAMILIES[base]}" if base and kind.name in MADE_FOR else kind.what
        raise CheckpointError(f"{path} is {named}", expected=_FILE, fix=kind.advice(path))


# Families by the names that `Checkpoint.family` has -> what people call them.
FAMILIES: Mapping[str, str] = {
    "sd1": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sdxl": "SDXL",
    "sdxl-refiner": "the SDXL refiner",
    "lcm": "a latent consistency model",
    "unclip": "Stable unCLIP 2.1",
    "sd3": "Stable Diffusion 3",
    "flux": "Flux",
}
# Kinds that are made for one family.
MADE_FOR = (
    _LORA,
    "controlnet",
    UNUSABLE_CONTROL,
    "ip-adapter",
    "t2i-adapter",
    "embedding",
    "unet",
    "text-encoder",
)
# The width of the context that cross-attention reads, and of text encoders' tokens -> the family.
FAMILY_OF_CONTEXT: Mapping[int, str] = {768: "sd1", 1024: "sd2", 2048: "sdxl", 1280: "sdxl-refiner"}
# What the names of an adapter's tensors say. First match wins.
_NAMED_BASES: Mapping[str, str] = {
    r"double_blocks|single_transformer_blocks|single_blocks": "flux",
    r"joint_blocks|add_k_proj": "sd3",
    r"^lora_te2_|^text_encoder_2\.|^clip_g$|label_emb|add_embedding": "sdxl",
    r"^(lora|lycoris|oft)_unet_(input|output)_blocks_\d_1_transformer_blocks_[1-9]": "sdxl",
}
# What trainers note (sd-scripts' `ss_base_model_version`, ModelSpec's architecture) begins with.
_NOTED_BASES: Mapping[str, str] = {
    "sd_v1": "sd1",
    "sd_1": "sd1",
    "stable-diffusion-v1": "sd1",
    "sd_v2": "sd2",
    "stable-diffusion-v2": "sd2",
    "sdxl": "sdxl",
    "stable-diffusion-xl": "sdxl",
    "sd3": "sd3",
    "stable-diffusion-3": "sd3",
    "flux": "flux",
}
# Tensors whose second axis is the width of a layer's input: a LoRA's or LoHa's first factor, whole weights.
READS_INPUT = re.compile(
    r"(lora_down|lora_A|lora\.down|_lora\.down|hada_w1_b)(\.default)?(\.weight)?$"
    r"|(to_[kv](_ip)?|q_proj)\.weight$"
)
_READS_CONTEXT = re.compile(r"attn2[._](processor\.)?to_(k|v)(_ip|_lora)?\b|attn2_to_[kv]\b|\.to_k_ip\b")
_READS_TOKENS = re.compile(r"^(lora_te_|text_encoder\.|.*text_model[._]encoder).*q_proj")


def base_of(tensors: Mapping[str, TensorHeader], metadata: Mapping[str, str]) -> str | None:
    """The family that an adapter, a control or a part is for, by names, shapes and what its trainer noted.

    None where nothing says it. Names beyond 300 characters say nothing: nobody's layers are called so, and
    the patterns would take the square of their length.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if len(name) <= 300}
    names = "\n".join(tensors)
    for pattern, base in _NAMED_BASES.items():
        if re.search(pattern, names, re.MULTILINE):
            return base
    for place in (_READS_CONTEXT, _READS_TOKENS):
        if found := next(filter(None, map(FAMILY_OF_CONTEXT.get, _widths(place, tensors))), None):
            return found
    lone = [t.shape[-1] for name, t in tensors.items() if t.shape and not name.endswith(".weight")]
    if len(tensors) == len(lone) == 1 and lone[0] in FAMILY_OF_CONTEXT:  # an embedding
        return FAMILY_OF_CONTEXT[lone[0]]
    noted = (metadata.get(key, "").lower() for key in ("ss_base_model_version", "modelspec.architecture"))
    return next(
        (base for note in noted for start, base in _NOTED_BASES.items() if note.startswith(start)), None
    )


def context_width(tensors: Mapping[str, TensorHeader]) -> int | None:
    """How many numbers cross-attention reads in the UNet that an adapter changes; None if it does not say."""
    return next(_widths(_READS_CONTEXT, tensors), None)


def _widths(place: re.Pattern[str], tensors: Mapping[str, TensorHeader]) -> Iterator[int]:
    return filter(None, (_input_width(name, tensors) for name in tensors if place.search(name)))


def _input_width(name: str, tensors: Mapping[str, TensorHeader]) -> int | None:
    """How many numbers the layer reads that this tensor changes; None where the tensor does not say."""
    shape = tensors[name].shape
    if (stem := re.sub(r"\.lokr_w1(_b)?$", "", name)) != name:
        second = next((tensors[n] for n in (f"{stem}.lokr_w2", f"{stem}.lokr_w2_b") if n in tensors), None)
        return shape[1] * second.shape[1] if second and len(shape) == len(second.shape) == 2 else None
    if f"{name.removesuffix('.weight')}.on_input" in tensors:  # IA3's factors are a column
        return None
    return shape[1] if READS_INPUT.search(name) and len(shape) > 1 else None
