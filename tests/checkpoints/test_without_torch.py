"""Reading and calibrating a checkpoint needs none of the libraries that export does."""

import json
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from latentrt.checkpoints.files.open import Checkpoint
from latentrt.checkpoints.graphs import weights
from latentrt.checkpoints.precision.calibration import CALIBRATIONS, Calibration
from latentrt.checkpoints.precision.islands import find_islands
from latentrt.export.graphs import passes
from latentrt.export.graphs.to_onnx import to_onnx
from latentrt.export.nets.build import NETS
from latentrt.export.nets.clip import tokenize
from tests.export.overflow import make_overflowing

COMPONENTS = ("text_encoder", "unet", "vae_decoder")

# Imports every module of `checkpoints`, then opens, checks, measures and stores, with the libraries blocked.
LEAN = """
import json, pkgutil, sys
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path

for name in ("torch", "diffusers", "transformers", "onnxscript", "safetensors"):
    sys.modules[name] = None  # an import of it raises ImportError

import onnx_ir as ir
import latentrt.checkpoints

for module in pkgutil.walk_packages(latentrt.checkpoints.__path__, "latentrt.checkpoints."):
    import_module(module.name)

from latentrt.checkpoints.files.component import read_tensors
from latentrt.checkpoints.files.open import Checkpoint
from latentrt.checkpoints.files.values import check_values
from latentrt.checkpoints.graphs import weights
from latentrt.checkpoints.graphs.hoist import hoist
from latentrt.checkpoints.graphs.step import write_step
from latentrt.checkpoints.precision.calibration import CALIBRATIONS, Calibration
from latentrt.checkpoints.precision.islands import find_islands
from latentrt.engines import spec
from latentrt.runtime.prompts.tokenizer import ClipTokenizer

source, folder, out = Checkpoint.open(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
tokenize = lambda folder, texts, length: ClipTokenizer.open(folder).encode(texts, length).ids
calibration = Calibration(source, tokenize)
found = []
for component in ("text_encoder", "unet", "vae_decoder"):
    model = ir.load(folder / component / "model.onnx")
    found.append(asdict(find_islands(model, component, partial(CALIBRATIONS[component], calibration))))
    if component == "unet":
        hoist(model)
for name, part in source.parts.items():
    check_values(part.folder, part.tensors, "float16")
    types = dict.fromkeys(part.tensors, ir.DataType.BFLOAT16)
    weights.write_weights(out / f"{name}.safetensors", read_tensors(part.tensors), types)
write_step(out / "step.onnx", spec.step(channels=4, float_dtype="float16"))
print(json.dumps(found))
"""


def test_a_checkpoint_is_calibrated_without_the_libraries_of_export(tmp_path: Path) -> None:
    """The lean process finds the islands that the exporter finds, with transformers' tokenizer."""
    checkpoint = make_overflowing(tmp_path / "checkpoint")
    source = Checkpoint.open(checkpoint)
    graphs, out = tmp_path / "graphs", tmp_path / "out"
    out.mkdir()
    calibration = Calibration(source, tokenize)
    wanted: list[Any] = []
    for component in COMPONENTS:
        model = traced(source, component, graphs / component)
        found = find_islands(model, component, partial(CALIBRATIONS[component], calibration))
        assert found.islands, "the checkpoint overflows"
        wanted.append(asdict(found))
    command = [sys.executable, "-W", "error", "-c", LEAN, *map(str, (checkpoint, graphs, out))]
    run = subprocess.run(command, check=True, timeout=120, stdout=subprocess.PIPE, text=True)
    assert json.loads(run.stdout) == json.loads(json.dumps(wanted))
    assert sorted(path.name for path in out.iterdir()) == [
        "step.onnx",
        "text_encoder.safetensors",
        "unet.safetensors",
        "vae.safetensors",
    ]


def traced(source: Checkpoint, component: str, folder: Path) -> ir.Model:
    """The graph of a net as the exporter has it before it measures, which is saved in `folder` too."""
    folder.mkdir(parents=True)
    net = NETS[component].build(source, torch.float16)
    state = net.module.state_dict()
    tensors = {name: state[key].numpy() for key, (name, _) in net.tensors.items()}
    slots = weights.write_weights(
        folder / weights.WEIGHTS, tensors, dict.fromkeys(tensors, ir.DataType.FLOAT16)
    )
    model = to_onnx(net)
    weights.attach(model, slots)
    passes.clean(model)
    ir.save(model, folder / "model.onnx")
    return model
