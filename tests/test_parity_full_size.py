"""Checkpoints of the published sizes, opened as they are, against diffusers. Minutes and gigabytes each.

Weights are random, in half precision, and the arithmetic is fp32. Both programs run in processes of their
own, one after the other, so that their memory does not add up; `pytest -s` prints what they took.

    python -m pytest -m slow -n 0 -s tests/test_parity_full_size.py -k sd1     # 7 GB of memory and of disk
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from latentrt.benchmarks.machine import resident_bytes
from latentrt.benchmarks.models.checkpoints import config_of, write_json, write_part
from latentrt.checkpoints.files.tokenizers import write_clip_tokenizer
from latentrt.engines.safetensors_format import write_file
from tests.export.ldm_files import FULL, PUBLISHED, Tensors, build, one_file, tensors_of
from tests.opened_pair import diffusers_pipeline, lean
from tests.parity_pair import BAR, PROMPTS, drawn, psnr

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*__array.*:DeprecationWarning"),
]
SEED = 4
# The sides of the picture, as small as UNet and memory allow.
SIDES = {"sd1": 128, "sd2": 128, "sdxl": 128}
PIPELINES = {
    "sd1": "StableDiffusionPipeline",
    "sd2": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
}


@pytest.fixture
def large(tmp_path: Path) -> Iterator[Path]:
    """A folder that is emptied at once: pytest would keep gigabytes."""
    folder = tmp_path / "large"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def write_folder(root: Path, family: str) -> dict[str, Any]:
    """Write a folder of random weights, tensor by tensor; the modules, whose tensors are mapped from it."""
    with torch.device("meta"):
        modules = build(FULL[family])
    index: dict[str, Any] = {
        "_class_name": PIPELINES[family],
        "scheduler": ["diffusers", PUBLISHED[family]["_class_name"]],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "force_zeros_for_empty_prompt": True,
    }
    root.mkdir()
    for seed, (part, module) in enumerate(modules.items()):
        is_text = part.startswith("text_encoder")
        shapes = {name: tensor.shape for name, tensor in tensors_of(part, module).items()}
        config = module.config.to_dict() if is_text else config_of(module)
        stem = "model" if is_text else "diffusion_pytorch_model"
        write_part(root / part, stem, config, shapes, torch.float16, seed)
        index[part] = ["transformers" if is_text else "diffusers", type(module).__name__]
        if is_text:
            tokenizer = part.replace("text_encoder", "tokenizer")
            pads = part == "text_encoder_2" or family == "sd2"
            write_clip_tokenizer(root / tokenizer, "!" if pads else "<|endoftext|>")
            index[tokenizer] = ["transformers", "CLIPTokenizer"]
        prefix = "text_model." if part == "text_encoder" else ""
        own = {key: key if key.startswith(prefix) else prefix + key for key in module.state_dict()}
        found = load_file(root / part / f"{stem}.safetensors")
        module.load_state_dict({key: found[name] for key, name in own.items()}, strict=True, assign=True)
    write_json(root / "scheduler" / "scheduler_config.json", PUBLISHED[family])
    write_json(root / "model_index.json", index)
    return modules


def write_one_file(path: Path, modules: Mapping[str, Any], family: str) -> Path:
    """Write the same as one file, a tensor at a time."""
    stored: Tensors = {
        name: torch.arange(77)[None] if tensor.is_meta else tensor
        for name, tensor in one_file(dict(modules), family).items()
        if not (tensor.is_meta and tensor.ndim == 0)
    }

    def content(name: str) -> bytes:
        tensor = stored[name].contiguous()
        return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()

    types = {torch.float16: "F16", torch.float32: "F32", torch.int64: "I64"}
    write_file(path, {name: (types[tensor.dtype], tensor.shape) for name, tensor in stored.items()}, content)
    return path


def draw_theirs(
    kind: str, folder: Path, file: Path, parameters: dict[str, Any]
) -> tuple[Any, dict[str, float]]:
    """What diffusers draws of the file, with the seconds and the peak memory of this process."""
    began = perf_counter()
    torch.set_num_threads(2)
    picture = drawn(diffusers_pipeline(kind, folder, file), [SEED], **parameters)
    return picture, {"seconds": perf_counter() - began, "peak_gb": resident_bytes()[1] / 1e9}


@pytest.mark.parametrize("family", SIDES)
def test_a_file_of_the_published_size(family: str, large: Path) -> None:
    modules = write_folder(large / "folder", family)
    file = write_one_file(large / "model.safetensors", modules, family)
    del modules
    size = {"height": SIDES[family], "width": SIDES[family]}
    parameters: dict[str, Any] = {
        "prompt": PROMPTS[0],
        "num_inference_steps": 2,
        "guidance_scale": 5.0,
        **size,
    }
    one, other = lean(large / "lean", [file, large / "folder"], {**parameters, "seed": SEED}, archive=None)
    np.testing.assert_array_equal(one, other)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        wanted, theirs = pool.submit(
            draw_theirs, PIPELINES[family], large / "folder", file, parameters
        ).result()
    decibels = psnr(wanted, one)
    ours = [json.loads((large / "lean" / f"{number}.json").read_text()) for number in range(2)]
    print(json.dumps({"family": family, "psnr": decibels, "ours": ours, "diffusers": theirs}))
    assert decibels >= BAR
