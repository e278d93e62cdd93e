"""Checkpoints of every architecture at reduced width, as people have them, and who draws with them.

A checkpoint is written as one file and as a diffusers folder of the same weights. Ours draws in a process
where the libraries of training cannot be imported; diffusers draws here.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from filelock import FileLock
from PIL import Image

from latentrt.checkpoints.files.tokenizers import write_clip_tokenizer
from latentrt.export.architectures import Architecture
from tests.checkpoints.odd_files import LAYOUTS, OTHER_VAE, VISIONS, WORDS, modules, recipe_of, stored, write
from tests.export.ldm_files import PUBLISHED
from tests.parity_pair import PROMPTS, blob, photo
from tests.recipes import IMAGE_NOISE, PROCESSOR, TINY_VAE, named_parts, seeing_parts
from tests.traced_graphs import make_archive

CLIP_WORDS = 49408
H, W = 40, 56
SIZE = {"height": H, "width": W}
_TEXT = {"prompt": PROMPTS[0], "negative_prompt": "square", "num_inference_steps": 4, "guidance_scale": 5.0}
_MASKED = {"image": photo(H, W), "mask_image": blob(H, W), "strength": 0.9, **_TEXT, **SIZE}
_LCM = {"_class_name": "LCMScheduler", "original_inference_steps": 50, "timestep_scaling": 10.0}
_AESTHETIC = {"aesthetic_score": 7.0, "negative_aesthetic_score": 1.5}


@dataclass(frozen=True, kw_only=True)
class Small:
    """An architecture at reduced width, and a picture to draw with it.

    Attributes:
        recipe: of `odd_files.RECIPES`.
        pipeline: diffusers' class.
        scheduler: what its `scheduler_config.json` has, beside what is published for its family.
        index: what its `model_index.json` has besides the parts.
        parameters: of the picture, for diffusers and for us.
        file: whether one file can hold it: nothing in one says what differs in the others.
        read_by_diffusers: whether diffusers reads that file: unCLIP's it does not, and of latent consistency
            models' it leaves out the guidance embedding, silently.
        text_2: what the config of its second text encoder has besides.
        tiny: whether a tiny autoencoder takes the place of its own.
    """

    recipe: str
    pipeline: str = "StableDiffusionPipeline"
    scheduler: Mapping[str, Any] = field(default_factory=dict[str, Any])
    index: Mapping[str, Any] = field(default_factory=dict[str, Any])
    parameters: Mapping[str, Any] = field(default_factory=lambda: {**_TEXT, **SIZE})
    file: bool = True
    read_by_diffusers: bool = True
    text_2: Mapping[str, Any] = field(default_factory=dict[str, Any])
    tiny: bool = False

    @property
    def layout(self) -> str:
        """The family whose files it is like."""
        return LAYOUTS.get(self.recipe, self.recipe)

    @property
    def archive(self) -> str:
        """The archive with its templates: one for each layout, and one that is made in seconds."""
        return self.recipe if self.recipe == "smallest" else self.layout


_XL = Small(recipe="sdxl", pipeline="StableDiffusionXLPipeline", index={"force_zeros_for_empty_prompt": True})
_VARIED = Small(
    recipe="unclip",
    pipeline="StableUnCLIPImg2ImgPipeline",
    scheduler={"_class_name": "PNDMScheduler"},
    parameters={**_TEXT, **SIZE, "image": photo(90, 70), "noise_level": 40},
    read_by_diffusers=False,
)
_FEW_STEPS = {"prompt": PROMPTS[0], "num_inference_steps": 4, "guidance_scale": 8.5, **SIZE}

# By the names of `export.architectures.ARCHITECTURES`, and one for tests that run each time.
SMALL: Mapping[str, Small] = {
    "smallest": Small(recipe="smallest"),
    "sd1": Small(recipe="sd1"),
    "sd1-inpainting": Small(
        recipe="sd1-inpainting", pipeline="StableDiffusionInpaintPipeline", parameters=_MASKED
    ),
    "sd2": Small(recipe="sd2"),
    "sd2-inpainting": Small(
        recipe="sd2-inpainting",
        pipeline="StableDiffusionInpaintPipeline",
        scheduler={"prediction_type": "epsilon"},
        parameters=_MASKED,
    ),
    "sdxl": _XL,
    "sdxl-inpainting": replace(
        _XL, recipe="sdxl-inpainting", pipeline="StableDiffusionXLInpaintPipeline", parameters=_MASKED
    ),
    "sdxl-refiner": Small(
        recipe="sdxl-refiner",
        pipeline="StableDiffusionXLImg2ImgPipeline",
        index={"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True},
        parameters={**_TEXT, **_AESTHETIC, "image": photo(H, W), "strength": 0.6},
    ),
    "sdxl-end-by-id": replace(_XL, text_2={"eos_token_id": 49407}, file=False),
    "lcm-sd1": Small(
        recipe="lcm",
        pipeline="LatentConsistencyModelPipeline",
        scheduler=_LCM,
        parameters=_FEW_STEPS,
        read_by_diffusers=False,
    ),
    "lcm-sdxl": replace(_XL, recipe="lcm-xl", scheduler=_LCM, parameters=_FEW_STEPS, read_by_diffusers=False),
    "ssd-1b": replace(_XL, recipe="ssd-1b"),
    "segmind-vega": replace(_XL, recipe="vega"),
    "sd1-taesd": Small(recipe="sd1", tiny=True),
    "unclip-h": _VARIED,
    "unclip-l": replace(_VARIED, recipe="unclip-l", file=False),
}


def write_file(path: Path, name: str, more: Mapping[str, torch.Tensor] | None = None) -> Path:
    """Write an architecture's checkpoint as one file, with tensors besides."""
    return write(path, {**stored(SMALL[name].recipe, CLIP_WORDS), **(more or {})})


def write_folder(root: Path, name: str, **scheduler: Any) -> Path:
    """Write an architecture's checkpoint as diffusers' and transformers' `save_pretrained` do."""
    small = SMALL[name]
    parts = dict(modules(small.recipe, CLIP_WORDS))
    settings = {**PUBLISHED[small.layout], **small.scheduler, **scheduler}
    kind = getattr(diffusers, small.pipeline)
    index: dict[str, Any] = {
        "_class_name": small.pipeline,
        "scheduler": ["diffusers", settings["_class_name"]],
        **{part: [None, None] for part in kind._optional_components},
        **small.index,
    }
    _write_json(root / "scheduler" / "scheduler_config.json", settings)
    if small.recipe in VISIONS:
        parts["image_normalizer"] = _normalizer(small)
        index |= _write_unclip(root, VISIONS[small.recipe]["image_size"])
    for part, module in parts.items():
        module.save_pretrained(root / part)
        library = "diffusers" if hasattr(module, "register_to_config") else "transformers"
        index[part] = ["stable_diffusion" if part == "image_normalizer" else library, type(module).__name__]
        if part.startswith("text_encoder"):
            tokenizer = part.replace("text_encoder", "tokenizer")
            open_clip = part == "text_encoder_2" or small.layout == "sd2"
            write_clip_tokenizer(root / tokenizer, "!" if open_clip else "<|endoftext|>")
            index[tokenizer] = ["transformers", "CLIPTokenizer"]
    if small.text_2:
        config = root / "text_encoder_2" / "config.json"
        _write_json(config, {**json.loads(config.read_text()), **small.text_2})
    _write_json(root / "model_index.json", index)
    return root


def _normalizer(small: Small) -> Any:
    """The statistics of image embeddings: none in the larger model, whose file does not have them."""
    torch.manual_seed(3)
    found = StableUnCLIPImageNormalizer(VISIONS[small.recipe]["projection_dim"])
    if not small.file:
        found.mean.data.uniform_(-0.5, 0.5)
        found.std.data.uniform_(0.5, 1.5)
    return found


def _write_unclip(root: Path, size: int) -> dict[str, Any]:
    """Write what unCLIP has besides; its entries in `model_index.json`."""
    sizes = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    _write_json(root / "feature_extractor" / "preprocessor_config.json", {**PROCESSOR, **sizes})
    _write_json(root / "image_noising_scheduler" / "scheduler_config.json", IMAGE_NOISE)
    return {
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "image_noising_scheduler": ["diffusers", "DDPMScheduler"],
    }


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(data)))


def templates(factory: pytest.TempPathFactory, archive: str) -> Path:
    """An archive of graphs in fp32 (`Small.archive`), made once for all workers of a run.

    It has text encoders for CLIP's words and for those of the odd files, and their other autoencoder.
    """
    root = factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    path = root / "templates" / f"{archive}.zip"
    path.parent.mkdir(exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            unfinished = path.with_suffix(".unfinished")
            make_archive(unfinished, _architectures(archive), dtypes=["fp32"])
            unfinished.rename(path)
    return path


def _architectures(archive: str) -> dict[str, Architecture]:
    small = {name: small for name, small in SMALL.items() if small.archive == archive}
    found = {name: architecture_of(one) for name, one in small.items()}
    if archive != "smallest":
        found |= {f"{name} of few words": architecture_of(one, WORDS) for name, one in small.items()}
    if archive == "sd1":
        other = {"_class_name": "AutoencoderKL", **OTHER_VAE}
        found["another autoencoder"] = replace(found["sd1"], parts={**found["sd1"].parts, "vae": other})
    return found


def architecture_of(small: Small, words: int = CLIP_WORDS) -> Architecture:
    """What templates are made of."""
    recipe = recipe_of(small.recipe, words)
    text_2 = recipe.text_encoder_2 and {**recipe.text_encoder_2, **small.text_2}
    parts = named_parts(recipe.unet, recipe.vae, text_encoder=recipe.text_encoder, text_encoder_2=text_2)
    if small.tiny:
        parts["vae"] = parts["tiny_vae"] = {"_class_name": "AutoencoderTiny", **TINY_VAE}
    if small.recipe in VISIONS:
        parts |= seeing_parts(VISIONS[small.recipe])
    return Architecture(parts=parts, feature_extractor=PROCESSOR)


# Draws each of the pictures that its standard input lists, with the libraries of training blocked.
_LEAN = """
import json, sys
from time import perf_counter

for name in ("torch", "diffusers", "transformers", "onnxscript", "safetensors"):
    sys.modules[name] = None  # an import of it raises ImportError

from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from latentrt.benchmarks.machine import resident_bytes
from latentrt.checkpoints import opened
from latentrt.runtime import Pipeline
from latentrt.runtime.model import CheckpointOptions

jobs = json.load(sys.stdin)
if jobs["templates"]:
    opened.Options = partial(opened.Options, templates=Path(jobs["templates"]))
options = {name: Path(path) for name, path in jobs["options"].items()}
parameters = {
    name: Image.open(value) if name in ("image", "mask_image") else value
    for name, value in jobs["parameters"].items()
}
for model, out in jobs["models"]:
    began = perf_counter()
    package = (Path(model) / "manifest.json").is_file()
    with Pipeline.open(model, checkpoint=None if package else CheckpointOptions(**options)) as pipe:
        *_, step = pipe.stream(**parameters)
        np.save(f"{out}.npy", np.stack([np.asarray(picture) for picture in step.preview()]))
        if "tiny_vae" in options:
            np.savez(f"{out}.npz", latent=step.latent, tiny=np.asarray(step.preview("tiny")[0]))
    facts = {"seconds": perf_counter() - began, "peak_gb": resident_bytes()[1] / 1e9}
    Path(f"{out}.json").write_text(json.dumps(facts))
"""


def lean(
    folder: Path,
    models: Sequence[Path],
    parameters: Mapping[str, Any],
    *,
    archive: Path | None,
    **options: Path,
) -> list[np.ndarray]:
    """What we draw with each of `models` in one process without torch: (N, H, W, 3) uint8.

    Args:
        folder: for the cache and what passes between the processes.
        models: checkpoints or packages.
        parameters: as `Pipeline.stream` takes them; pictures are Pillow's.
        archive: the templates; None is those that ship.
        options: of `CheckpointOptions`.
    """
    folder.mkdir()
    given = dict(parameters)
    for name, value in parameters.items():
        if isinstance(value, Image.Image):
            given[name] = str(folder / f"{name}.png")
            value.save(given[name])
    outs = [str(folder / str(number)) for number in range(len(models))]
    jobs = {
        "templates": str(archive or ""),
        "options": {name: str(path) for name, path in options.items()},
        "parameters": given,
        "models": list(zip(map(str, models), outs, strict=True)),
    }
    subprocess.run(
        [sys.executable, "-W", "error", "-c", _LEAN],
        check=True,
        timeout=1800,
        input=json.dumps(jobs),
        text=True,
        env={**os.environ, "LATENTRT_CACHE": str(folder / "cache")},
    )
    return [np.load(f"{out}.npy") for out in outs]


def diffusers_pipeline(kind: str, folder: Path, file: Path | None = None, **parts: Any) -> Any:
    """diffusers' pipeline in fp32: of a file with the configs of `folder`, or of the folder."""
    if "XL" not in kind and "UnCLIP" not in kind:
        parts |= {"safety_checker": None, "requires_safety_checker": False}
    maker: Any = getattr(diffusers, kind)
    if file is None:
        pipe = maker.from_pretrained(folder, dtype=torch.float32, **parts)
    else:
        pipe = maker.from_single_file(
            str(file), config=str(folder), torch_dtype=torch.float32, local_files_only=True, **parts
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe
