"""Files that people really have: each opens as what it is, or is refused in words that say what it is."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers.loaders import single_file_utils
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from latentrt.checkpoints.files.component import Component, TensorHeader
from latentrt.checkpoints.files.open import Checkpoint
from latentrt.checkpoints.files.report import report
from latentrt.checkpoints.files.single_file import open_single_file
from latentrt.engines.errors import CheckpointError
from tests.checkpoints.odd_files import (
    DISTILLED,
    ODD_FILES,
    UNET,
    Opens,
    Refused,
    modules,
    other_vae,
    source,
    stored,
    write,
)
from tests.export.ldm_files import FULL, under, unet_to_ldm, write_header_only

OPENS = [id for id, file in ODD_FILES.items() if isinstance(file.answer, Opens)]
REFUSED = [id for id, file in ODD_FILES.items() if isinstance(file.answer, Refused)]


def read(header: TensorHeader, tensor: torch.Tensor) -> torch.Tensor:
    """What a header says of the tensor that the safetensors library reads under its name."""
    tensor = tensor if header.rows is None else tensor[slice(*header.rows)]
    return (tensor.T if header.transposed else tensor).reshape(header.shape)


def check_tensors(part: Component, wanted: dict[str, torch.Tensor]) -> None:
    assert set(part.tensors) - {"text_model.embeddings.position_ids"} == set(wanted)
    files = {file: load_file(file) for file in {header.file for header in part.tensors.values()}}
    for name, tensor in wanted.items():
        header = part.tensors[name]
        found = read(header, files[header.file][header.name])
        assert found.dtype == tensor.dtype, name
        assert torch.equal(found.double(), tensor.double()), name


@pytest.mark.parametrize("id", OPENS)
def test_it_opens(id: str, tmp_path: Path) -> None:
    file = ODD_FILES[id]
    answer = file.answer
    assert isinstance(answer, Opens)
    path = file.make(tmp_path)
    options = dict(answer.options or {})
    if "vae" in options:
        options["vae"] = write(tmp_path / "vae.safetensors", other_vae())
    opened = Checkpoint.open(path, **options)
    assert (opened.family, opened.scheduler.get("prediction_type", "epsilon")) == (
        answer.family,
        answer.predicts,
    )
    assert opened.unet.config.get("in_channels", 4) == answer.channels
    assert set(opened.parts) == set(answer.tensors)
    for name, tensors in answer.tensors.items():
        check_tensors(opened.parts[name], tensors)
    said = "\n".join(opened.notes)
    for note in answer.notes:
        assert re.search(note, said), said
    if answer.predicts_by is not None:
        assert opened.predicts_by == answer.predicts_by
    if path.is_file():
        check_leftovers(path, opened)
    if not options:
        check_report(path, opened)


def check_leftovers(path: Path, opened: Checkpoint) -> None:
    """Every tensor of the file is used, or counted in the note of those that are not."""
    with safe_open(path, "pt") as stream:
        names = set(stream.keys())
    used = {tensor.name for part in opened.parts.values() for tensor in part.tensors.values()}
    unused = [note for note in opened.notes if note.startswith("tensors that are not used: ")]
    counted = sum(int(count) for note in unused for count in re.findall(r": (\d+) \(", note))
    assert counted == len(names - used - {"v_pred", "ztsnr"})


def check_report(path: Path, opened: Checkpoint) -> None:
    found = report(path)
    assert (found.kind, found.opens, found.problem, found.missing) == ("checkpoint", True, "", ())
    assert (found.family, found.predicts_by, found.notes) == (opened.family, opened.predicts_by, opened.notes)
    assert set(found.parts) == set(opened.parts) - ({"image_normalizer"} if path.is_file() else set())
    weights = opened.unet.tensors.values()
    assert found.parts["unet"].tensors == len(weights)
    assert set(found.parts["unet"].types) == {tensor.dtype for tensor in weights}
    assert found.size == path.stat().st_size if path.is_file() else found.size > 0
    assert json.loads(json.dumps(found.to_json()))["family"] == opened.family


@pytest.mark.parametrize("id", REFUSED)
def test_it_is_refused_as_what_it_is(id: str, tmp_path: Path) -> None:
    file = ODD_FILES[id]
    answer = file.answer
    assert isinstance(answer, Refused)
    path = file.make(tmp_path)
    with pytest.raises(CheckpointError, match=f"(?s){answer.words}"):
        Checkpoint.open(path)
    found = report(path)
    assert (found.kind, found.family, found.opens) == (answer.kind, answer.family, False)
    assert found.what
    assert found.todo
    json.dumps(found.to_json())


def test_there_are_enough() -> None:
    assert len(ODD_FILES) >= 60
    assert all(file.reported for file in ODD_FILES.values())


@pytest.mark.parametrize("name", ["ssd-1b", "vega", "lcm", "lcm-xl", "unclip"])
def test_configs_are_those_of_the_folders(name: str, tmp_path: Path) -> None:
    """diffusers builds the same modules of them, in which every tensor fits."""
    opened = open_single_file(write(tmp_path / "model.safetensors", stored(name)))
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(opened.components["unet"].config))
    unet.load_state_dict(source(name)["unet"], strict=True, assign=True)
    unet, wanted = unet.eval(), modules(name)["unet"]
    assert [type(block) for block in unet.up_blocks] == [type(block) for block in wanted.up_blocks]
    assert type(unet.mid_block) is type(wanted.mid_block)
    for key in ("cross_attention_dim", "attention_head_dim", "time_cond_proj_dim", "class_embed_type"):
        assert json.dumps(unet.config[key]) == json.dumps(wanted.config[key]), key
    if name == "unclip":
        config = CLIPVisionConfig(**opened.components["image_encoder"].config)
        with torch.device("meta"):
            vision = CLIPVisionModelWithProjection(config)
        vision.load_state_dict(source(name)["image_encoder"], strict=True, assign=True)
        for key in ("num_attention_heads", "image_size", "patch_size", "projection_dim", "hidden_act"):
            assert getattr(config, key) == getattr(modules(name)["image_encoder"].config, key)


@pytest.mark.parametrize("name", DISTILLED)
def test_diffusers_names_the_distilled_unets_tensors_so(name: str, tmp_path: Path) -> None:
    tensors = stored(name)
    config = dict(modules(name)["unet"].config)
    theirs = single_file_utils.convert_ldm_unet_checkpoint(dict(tensors), config)
    ours = open_single_file(write(tmp_path / "model.safetensors", tensors)).components["unet"].tensors
    assert set(theirs) == set(ours)
    assert all(torch.equal(theirs[key], tensors[header.name]) for key, header in ours.items())


# Parameters of the UNets, in millions, as their model cards round them.
@pytest.mark.parametrize(("name", "millions"), [("ssd-1b", 1331), ("vega", 745)])
def test_distilled_unets_at_full_size(name: str, millions: int, tmp_path: Path) -> None:
    with torch.device("meta"):
        wanted = UNet2DConditionModel(**{**FULL["sdxl"].unet, **DISTILLED[name]})
    shapes = {key: tensor.shape for key, tensor in wanted.state_dict().items()}
    assert round(sum(tensor.numel() for tensor in wanted.parameters()) / 1e6) == millions
    rest = {key: tensor for key, tensor in stored("sdxl").items() if not key.startswith(UNET)}
    ldm = under(UNET, unet_to_ldm(wanted.state_dict(), wanted.config))
    width = "conditioner.embedders.1.model.text_projection"
    rest[width] = torch.empty(1280, 1280, device="meta")  # six ids of 256 numbers beside it
    write_header_only(tmp_path / "model.safetensors", rest | ldm)
    with torch.device("meta"):
        config = open_single_file(tmp_path / "model.safetensors").components["unet"].config
        found = UNet2DConditionModel.from_config(dict(config))
    assert {key: tensor.shape for key, tensor in found.state_dict().items()} == shapes
    assert found.config.attention_head_dim == [5, 10, 20]


def test_few_steps_are_the_default_of_latent_consistency_models(tmp_path: Path) -> None:
    for name in ("lcm", "lcm-xl"):
        opened = Checkpoint.open(write(tmp_path / "model.safetensors", stored(name)))
        assert opened.scheduler["_class_name"] == "LCMScheduler"
        assert (opened.defaults["num_inference_steps"], opened.defaults["guidance_scale"]) == (4, 8.5)
        assert opened.vectors["timestep_cond"] == 16


def test_a_report_of_what_does_not_open_says_the_rest(tmp_path: Path) -> None:
    path = ODD_FILES["no autoencoder"].make(tmp_path)
    found = report(path)
    assert (found.missing, found.predicts, found.channels) == (("vae",), "epsilon", 4)
    assert found.adapters == {"lora": "sd1", "controlnet": "sd1", "embedding": {"text_encoder": 64}}
    assert "--vae" in found.todo


@pytest.mark.parametrize(
    ("id", "notes"),
    [("LoHa", ("rank 4",)), ("DoRA", ("rank 4", "with magnitudes (DoRA)")), ("OFT", ())],
)
def test_what_is_said_of_a_lora(id: str, notes: tuple[str, ...], tmp_path: Path) -> None:
    assert report(ODD_FILES[id].make(tmp_path)).notes == notes


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        report(tmp_path / "nowhere")


def test_a_report_needs_numpy_alone(tmp_path: Path) -> None:
    """In a process where the libraries of training and drawing cannot be imported."""
    path = write(tmp_path / "model.safetensors", stored("sd1"))
    blocked = ("torch", "diffusers", "transformers", "onnx", "onnx_ir", "onnxruntime", "safetensors", "PIL")
    code = f"""
import sys
sys.modules.update(dict.fromkeys({blocked!r}))
from latentrt.checkpoints.files.report import report
print(report({str(path)!r}).family)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "sd1\n"
