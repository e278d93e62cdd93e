"""Trains the demo model from nothing: `python -m latentrt.demo.train --out FOLDER`.

Stages: autoencoder on crops, cached latents, decoder, then denoiser and text encoder. Step counts and seeds
are fixed. Every stage leaves its state in the work folder; the same command continues a run that was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

# Before torch starts its threads: each of the two processes computes on one.
os.environ["OMP_NUM_THREADS"] = "1"

import diffusers
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from . import model, shapes, tokenizer, train_unet, train_vae
from .model import Parts
from .parallel import WORKERS, log, start

_PORT = 29517


def main() -> None:
    """Parse the command line and run the two processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="diffusers folder to write")
    parser.add_argument("--work", type=Path, help="folder for the state of the stages (default: OUT.work)")
    parser.add_argument("--port", type=int, default=_PORT, help="TCP port on which the two processes meet")
    arguments = parser.parse_args()
    out: Path = arguments.out
    work: Path = arguments.work or out.with_name(out.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    mp.spawn(worker, args=(out, work, arguments.port), nprocs=WORKERS)  # pyright: ignore[reportPrivateImportUsage]
    print(f"{out}: written after {(time.monotonic() - started) / 60:.1f} minutes")


def worker(rank: int, out: Path, work: Path, port: int) -> None:
    """One of the two processes; the first one writes the files."""
    start(rank, port)
    vae, latents = train_vae.train(work, rank)

    def checkpoint(parts: Parts) -> None:
        if rank == 0:
            save(parts, out)

    checkpoint(train_unet.train(vae, latents, work, rank, checkpoint))
    log(rank, "done")
    dist.destroy_process_group()


def save(parts: Parts, out: Path) -> None:
    """Write the diffusers folder, weights rounded to float16; the live modules stay float32."""
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    nets = {"vae": parts.vae, "unet": parts.unet, "text_encoder": parts.text_encoder}
    for name, net in nets.items():
        single = {key: value.clone() for key, value in net.state_dict().items()}
        net.half().save_pretrained(temporary / name)
        # float16 and back would round the weights that training goes on with.
        net.float().load_state_dict(single)
        _strip_paths(temporary / name / "config.json")
    tokenizer.save(shapes.vocabulary(), temporary / "tokenizer")
    model.scheduler().save_pretrained(temporary / "scheduler")
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (temporary / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (temporary / "recommended.json").write_text(
        json.dumps(model.RECOMMENDED, indent=2) + "\n", encoding="utf-8"
    )
    shutil.rmtree(out, ignore_errors=True)
    temporary.replace(out)


def _strip_paths(file: Path) -> None:
    """Drop what a configuration says about this machine's folders."""
    config = json.loads(file.read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key not in ("_name_or_path", "name_or_path")}
    file.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
