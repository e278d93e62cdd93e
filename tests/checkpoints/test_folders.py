"""Folders as people have them: whose class counts, which weights are taken, what a part is called."""

import json
import os
import pickle
import shlex
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from latentrt.checkpoints.files.open import Checkpoint
from latentrt.checkpoints.files.report import report
from latentrt.checkpoints.opened import open_checkpoint
from latentrt.checkpoints.opening import Options, check_tokenizers
from latentrt.engines.errors import CheckpointError, SamplerError, UsageError
from latentrt.export.pickles.convert import convert_pickle
from latentrt.runtime.prompts.tokenizer import tokenize
from latentrt.runtime.sampling.names import resolve
from latentrt.runtime.sampling.samplers import make_table
from tests.export.ldm_files import FULL, TINY, build, one_file, write_header_only
from tests.recipes import RECIPES, make_checkpoint

STEM = "diffusion_pytorch_model"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 1234\n"


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("named", "written"),
    [
        ("DDIMScheduler", "FlaxDDIMScheduler"),
        ("DDIMScheduler", "PNDMScheduler"),
        ("EulerDiscreteScheduler", None),
        ("FlaxPNDMScheduler", "FlaxPNDMScheduler"),
        (None, "FlaxDDIMScheduler"),
    ],
)
def test_the_index_names_the_schedulers_class(copy: Path, named: str | None, written: str | None) -> None:
    """diffusers makes the class that model_index.json names, whatever `_class_name` is in the config.

    Releases that still had Flax read such names without it.
    """
    path = copy / "scheduler" / "scheduler_config.json"
    config = {**json.loads(path.read_text()), "_class_name": written, "skip_prk_steps": True}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    change(copy / "model_index.json", scheduler=None if named is None else ["diffusers", named])
    found = Checkpoint.open(copy).scheduler
    wanted = (named or str(written)).removeprefix("Flax")
    if named is not None and not named.startswith("Flax"):
        theirs = DiffusionPipeline.from_pretrained(copy, safety_checker=None).scheduler
        assert type(theirs).__name__ == wanted
    assert found["_class_name"] == wanted
    assert resolve(None, found).scheduler == wanted


def test_a_flax_pipeline_is_the_same(copy: Path) -> None:
    change(copy / "model_index.json", _class_name="FlaxStableDiffusionPipeline")
    change(copy / "model_index.json", unet=["diffusers", "FlaxUNet2DConditionModel"])
    assert Checkpoint.open(copy).unet.config["_class_name"] == "UNet2DConditionModel"


@pytest.mark.parametrize(
    ("part", "found"),
    [
        ("vae", "AsymmetricAutoencoderKL"),
        ("vae", "ConsistencyDecoderVAE"),
        ("unet", "UNetMotionModel"),
        ("text_encoder", "BertModel"),
        ("tokenizer", "BertTokenizer"),
    ],
)
def test_other_classes_are_named(copy: Path, part: str, found: str) -> None:
    change(copy / "model_index.json", **{part: ["diffusers", found]})
    with pytest.raises(CheckpointError, match=f"{part} holds a {found}; expected a .* as {part}"):
        Checkpoint.open(copy)


@pytest.mark.parametrize("part", ["vae", "unet"])
def test_the_config_names_the_class_where_the_index_does_not(copy: Path, part: str) -> None:
    change(copy / part / "config.json", _class_name="VQModel")
    assert Checkpoint.open(copy).parts[part].config["_class_name"] != "VQModel"
    change(copy / "model_index.json", **{part: None})
    with pytest.raises(CheckpointError, match=f"{part} holds a VQModel"):
        Checkpoint.open(copy)


@pytest.mark.parametrize("entry", ["AutoencoderKL", ["diffusers"], [None, None], {"class": "x"}])
def test_an_index_that_says_something_else(copy: Path, entry: object) -> None:
    change(copy / "model_index.json", vae=entry)
    with pytest.raises(CheckpointError, match=r"model_index\.json says .* of vae"):
        Checkpoint.open(copy)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"_class_name": "EDMEulerScheduler", "sigma_max": 120.0}, "EDM's convention"),
        ({"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_data": 0.5}, "EDM's convention"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "flow matching"),
        ({"use_flow_sigmas": True}, "flow matching"),
        ({"prediction_type": "flow_prediction"}, "flow matching"),
        ({"_class_name": "CMStochasticIterativeScheduler"}, "consistency"),
        ({"prediction_type": "v-pred"}, "predicts 'v-pred'"),
    ],
)
def test_training_conventions_are_refused_by_name(copy: Path, changed: dict[str, Any], named: str) -> None:
    change(copy / "scheduler" / "scheduler_config.json", **changed)
    if "_class_name" in changed:
        assert hasattr(diffusers, changed["_class_name"])
        change(copy / "model_index.json", scheduler=["diffusers", changed["_class_name"]])
    with pytest.raises(CheckpointError, match=named):
        Checkpoint.open(copy)


def test_what_a_folder_says_wrongly_may_be_told(copy: Path) -> None:
    change(copy / "scheduler" / "scheduler_config.json", prediction_type="v-pred")
    found = Checkpoint.open(copy, prediction_type="v_prediction")
    assert found.scheduler["prediction_type"] == "v_prediction"


@pytest.mark.parametrize(
    "name",
    [
        f"{STEM}.bf16.safetensors",
        f"{STEM}.non_ema.safetensors",
        f"{STEM}.fp32.safetensors",
    ],
)
def test_a_variant_alone_is_taken(copy: Path, name: str) -> None:
    (copy / "unet" / f"{STEM}.safetensors").rename(copy / "unet" / name)
    found = Checkpoint.open(copy)
    assert found.unet.tensors["conv_in.weight"].file == copy / "unet" / name
    assert found.notes == (f"unet: {name} is taken, there are no other weights",)


@pytest.mark.parametrize(
    "index", [f"{STEM}.safetensors.index.bf16.json", f"{STEM}.bf16.safetensors.index.json"]
)
def test_a_variant_in_shards(copy: Path, index: str) -> None:
    folder = copy / "unet"
    shard = f"{STEM}-00001-of-00001.bf16.safetensors"
    (folder / f"{STEM}.safetensors").rename(folder / shard)
    (folder / index).write_text(json.dumps({"weight_map": {"conv_in.weight": shard}}))
    assert Checkpoint.open(copy).unet.tensors["conv_in.weight"].file == folder / shard


def test_of_two_variants_one_is_to_be_named(copy: Path) -> None:
    folder = copy / "unet"
    (folder / f"{STEM}.safetensors").rename(folder / f"{STEM}.bf16.safetensors")
    shutil.copy(folder / f"{STEM}.bf16.safetensors", folder / f"{STEM}.non_ema.safetensors")
    with pytest.raises(CheckpointError, match=r"as .*\.bf16\.safetensors and .*\.non_ema") as error:
        Checkpoint.open(copy)
    move, source, target = shlex.split(error.value.fix.partition(": ")[2])
    assert move == "mv"
    Path(source).rename(target)
    assert Checkpoint.open(copy).unet.tensors["conv_in.weight"].file == Path(target)


def test_weights_under_another_name(copy: Path) -> None:
    folder = copy / "unet"
    (folder / f"{STEM}.safetensors").rename(folder / "model.safetensors")
    (folder / "notes.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"only model\.safetensors, notes\.txt; .* mv ") as error:
        Checkpoint.open(copy)
    _, source, target = shlex.split(error.value.fix.partition(": ")[2])
    Path(source).rename(target)
    Checkpoint.open(copy)


def test_several_weights_of_other_names(copy: Path) -> None:
    for name in "ab":
        shutil.copy(copy / "vae" / f"{STEM}.safetensors", copy / "vae" / f"{name}.safetensors")
    (copy / "vae" / f"{STEM}.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"only a\.safetensors, b\.safetensors.*hf download"):
        Checkpoint.open(copy)


@pytest.mark.parametrize(
    "names",
    [
        [f"{STEM}.bin"],
        [f"{STEM}-00001-of-00002.bin", f"{STEM}-00002-of-00002.bin"],
        [f"{STEM}.fp16.bin", f"{STEM}.bin"],
        [f"{STEM}-00001-of-00002.fp16.bin", f"{STEM}-00002-of-00002.fp16.bin"],
    ],
)
def test_pickled_weights_are_converted_by_the_advice(copy: Path, tmp_path: Path, names: list[str]) -> None:
    """In a folder with a space in its name, as printed."""
    copy = copy.rename(tmp_path / "my model")
    whole = copy / "unet" / f"{STEM}.safetensors"
    tensors = load_file(whole)
    shards = sum("-of-" in name for name in names)
    for number, name in enumerate(names):
        part = dict(list(tensors.items())[number::shards]) if shards else tensors
        torch.save(part, copy / "unet" / name)
    whole.unlink()
    with pytest.raises(CheckpointError, match="weights as pickles") as error:
        Checkpoint.open(copy)
    latentrt, convert, *sources, _, output = shlex.split(error.value.fix.partition(": ")[2])
    assert (latentrt, convert) == ("latentrt", "convert")
    convert_pickle([Path(source) for source in sources], Path(output))
    found = load_file(whole)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    Checkpoint.open(copy)


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "unet/config.json",
        "scheduler/scheduler_config.json",
        f"unet/{STEM}.safetensors",
        "text_encoder/model.safetensors",
    ],
)
def test_git_lfs_pointers_are_named(copy: Path, name: str) -> None:
    (copy / name).write_text(POINTER)
    with pytest.raises(CheckpointError, match=f"{Path(name).name} is a git-lfs pointer"):
        Checkpoint.open(copy)


@pytest.mark.parametrize("name", ["unet.bin", f"{STEM}.bin", "x.safetensors.index.json"])
def test_git_lfs_pointers_in_place_of_other_weights(copy: Path, name: str) -> None:
    (copy / "unet" / f"{STEM}.safetensors").unlink()
    name = f"{STEM}.safetensors.index.json" if name.endswith("json") else name
    (copy / "unet" / name).write_text(POINTER)
    with pytest.raises(CheckpointError, match=f"{name} is a git-lfs pointer"):
        Checkpoint.open(copy)


def test_git_lfs_pointers_in_place_of_a_tokenizer_or_recommendations(copy: Path) -> None:
    merges = (copy / "tokenizer" / "merges.txt").read_text("utf-8")
    (copy / "tokenizer" / "merges.txt").write_text(POINTER)
    with pytest.raises(CheckpointError, match=r"merges\.txt is a git-lfs pointer"):
        Checkpoint.open(copy)
    (copy / "tokenizer" / "merges.txt").write_text(merges, "utf-8")
    (copy / "recommended.json").write_text(POINTER)
    with pytest.raises(CheckpointError, match=r"recommended\.json is a git-lfs pointer"):
        Checkpoint.open(copy)


@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt", "x.bin"])
def test_git_lfs_pointers_in_place_of_a_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(CheckpointError, match="is a git-lfs pointer"):
        Checkpoint.open(tmp_path / name)
    with pytest.raises(CheckpointError, match="is a git-lfs pointer"):
        convert_pickle(tmp_path / name, tmp_path / "y.safetensors")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder and a file as huggingface_hub keeps them: links by name to files by hash."""
    plain = tmp_path_factory.mktemp("plain")
    make_checkpoint(RECIPES["tiny1"], plain / "folder")
    with torch.device("meta"):
        write_header_only(plain / "dream v8.safetensors", one_file(build(TINY["sd1"]), "sd1"))
    cache = tmp_path_factory.mktemp("hub") / "models--some-one--Dream--Shaper-8"
    snapshot = cache / "snapshots" / ("ab12" * 10)
    (cache / "blobs").mkdir(parents=True)
    files = [path.relative_to(plain) for path in sorted(plain.rglob("*")) if path.is_file()]
    for number, file in enumerate(files):
        blob = cache / "blobs" / f"{number:064x}"
        shutil.copy(plain / file, blob)
        target = snapshot / (file.relative_to("folder") if file.parts[0] == "folder" else file)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(os.path.relpath(blob, target.parent))
    return snapshot, snapshot / "dream v8.safetensors"


def test_names_are_those_that_people_know(
    hub: tuple[Path, Path], copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, file = hub
    assert Checkpoint.open(folder).name == "Shaper-8"
    (folder.parents[1] / "refs").mkdir()
    (folder.parents[1] / "refs" / "main").write_text(folder.name)
    whole = Checkpoint.open(folder.parents[1])
    assert (whole.name, whole.root) == ("Shaper-8", folder)
    assert Checkpoint.open(file).name == "dream v8"
    assert Checkpoint.open(file.resolve()).name == "Shaper-8"
    (tmp_path / "mine").symlink_to(folder)
    assert Checkpoint.open(tmp_path / "mine").name == "mine"
    assert Checkpoint.open(copy).name == "copy"
    monkeypatch.chdir(copy)
    assert Checkpoint.open(".").name == "copy"
    assert Checkpoint.open("unet/..").name == "copy"
    named = copy.rename(tmp_path / ("f" * 40))
    assert Checkpoint.open(named).name == "f" * 40, "no cache, so nothing better is known"


@pytest.mark.parametrize("found", ["missing", "pickles", "damaged", "another class", "int8"])
def test_a_folder_whose_autoencoder_is_replaced(copy: Path, checkpoint: Path, found: str) -> None:
    """What is wrong with a part that another takes the place of does not matter."""
    weights = copy / "vae" / f"{STEM}.safetensors"
    tensors = load_file(weights)
    if found == "missing":
        shutil.rmtree(copy / "vae")
    elif found == "pickles":
        weights.rename(weights.with_suffix(".bin"))
    elif found == "damaged":
        weights.write_bytes(b"")
        (copy / "vae" / "config.json").write_text("{")
    elif found == "another class":
        change(copy / "model_index.json", vae=["diffusers", "VQModel"])
    else:
        save_file({name: tensor.to(torch.int8) for name, tensor in tensors.items()}, weights)
    with pytest.raises(CheckpointError):
        Checkpoint.open(copy)
    if found in ("missing", "damaged"):  # then nothing says how many pixels a cell had
        change(checkpoint_vae := shutil.copytree(checkpoint / "vae", copy / "other") / "config.json")
        with pytest.raises(CheckpointError, match="expected 4 channels and 8 pixels"):
            Checkpoint.open(copy, vae=checkpoint_vae.parent)
    else:
        assert Checkpoint.open(copy, vae=checkpoint / "vae").vae.folder == checkpoint / "vae"


@pytest.mark.parametrize("family", FULL)
def test_a_file_without_autoencoder(family: str, tmp_path: Path) -> None:
    """Such as "noVAE" files; by headers of the real sizes."""
    path, vae = tmp_path / "no vae.safetensors", tmp_path / "vae.safetensors"
    with torch.device("meta"):
        stored = one_file(build(FULL[family]), family)
    first = "first_stage_model."
    write_header_only(path, {name: t for name, t in stored.items() if not name.startswith(first)})
    write_header_only(vae, {name: t for name, t in stored.items() if name.startswith(first)})
    with pytest.raises(CheckpointError, match="has no vae") as error:
        Checkpoint.open(path)
    words = shlex.split(error.value.fix.partition(": ")[2])
    assert words == ["latentrt", "generate", "PROMPT", "-m", str(path), "--vae", "VAE"]
    found = Checkpoint.open(path, vae=vae)
    assert found.vae.folder == vae
    assert found.vae.config["scaling_factor"] == FULL[family].vae["scaling_factor"]
    with pytest.raises(UsageError, match="prediction_type is"):
        Checkpoint.open(path, vae=vae, prediction_type="x0")


def test_a_file_whose_autoencoder_is_replaced(tmp_path: Path) -> None:
    """Its own says how many pixels a cell has, if it can be read."""
    path, vae = tmp_path / "model.safetensors", tmp_path / "vae.safetensors"
    with torch.device("meta"):
        stored = one_file(build(TINY["sd1"]), "sd1")
    write_header_only(path, stored)
    write_header_only(vae, {name: t for name, t in stored.items() if name.startswith("first_stage_model.")})
    assert Checkpoint.open(path, vae=vae).latent_scale == 2
    broken = {name: t for name, t in stored.items() if "encoder.conv_in" not in name}
    write_header_only(path, broken)
    with pytest.raises(CheckpointError, match=r"encoder\.conv_in.* is missing"):
        Checkpoint.open(path)
    with pytest.raises(CheckpointError, match="expected 4 channels and 8 pixels"):
        Checkpoint.open(path, vae=vae)


# Scheduler configs as early folders have them; None is a key that is not there.
OUTDATED: dict[str, dict[str, Any]] = {
    "PNDMScheduler": {"steps_offset": None, "clip_sample": None, "skip_prk_steps": True},
    "DDIMScheduler": {"steps_offset": None, "clip_sample": None},
    "LMSDiscreteScheduler": {"steps_offset": None, "clip_sample": None},
    "DDIM, wrong offset": {"steps_offset": 0, "clip_sample": True},
    "Euler, leading": {"steps_offset": None, "timestep_spacing": "leading"},
    "PNDM, Runge-Kutta": {"steps_offset": None, "skip_prk_steps": None},
}


@pytest.mark.filterwarnings("ignore:.*__array.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("pipeline", "outdated"),
    [
        *(("StableDiffusionPipeline", name) for name in OUTDATED if "Runge" not in name),
        *(("StableDiffusionInpaintPipeline", name) for name in OUTDATED),
    ],
)
def test_outdated_schedulers_are_mended_as_in_diffusers(copy: Path, pipeline: str, outdated: str) -> None:
    """The pipeline's own scheduler, and others made `from_config` of it."""
    kinds = {"DDIM, wrong offset": "DDIMScheduler", "Euler, leading": "EulerDiscreteScheduler"}
    kind = kinds.get(outdated, "PNDMScheduler" if outdated.startswith("PNDM") else outdated)
    path = copy / "scheduler" / "scheduler_config.json"
    config = {**json.loads(path.read_text()), "_class_name": kind, **OUTDATED[outdated]}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    change(copy / "model_index.json", scheduler=["diffusers", kind], _class_name=pipeline)
    loaded = getattr(diffusers, pipeline).from_pretrained(copy, safety_checker=None)
    found = Checkpoint.open(copy).scheduler
    others = {"ddim": "DDIM", "euler": "EulerDiscrete", "dpmpp_2m": "DPMSolverMultistep", "ddpm": "DDPM"}
    for other in (None, *others):
        scheduler = loaded.scheduler
        if other is not None:
            scheduler = getattr(diffusers, f"{others[other]}Scheduler").from_config(scheduler.config)
        scheduler.set_timesteps(10)
        table = make_table(resolve(other, json.loads(json.dumps(found))), 10)
        assert np.allclose(table.t, scheduler.timesteps.numpy(), atol=1e-2), other


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("written_by", "size", "wanted"), [("0.6.0", 32, 64), ("0.9.0", 32, 32), ("0.8.0.dev0", 96, 96)]
)
def test_sizes_of_early_folders(copy: Path, written_by: str, size: int, wanted: int) -> None:
    change(copy / "unet" / "config.json", _diffusers_version=written_by, sample_size=size)
    assert Checkpoint.open(copy).sample_size == (wanted, wanted)
    loaded = DiffusionPipeline.from_pretrained(copy, safety_checker=None)
    assert loaded.unet.config.sample_size == wanted


def test_a_folder_with_a_file_alone(tmp_path: Path, copy: Path) -> None:
    """As many repositories are: one large file, no folders."""
    (tmp_path / "my repo").mkdir()
    (tmp_path / "my repo" / "small.safetensors").write_bytes(b"")
    (tmp_path / "my repo" / "large.safetensors").write_bytes(b"12345678")
    with pytest.raises(CheckpointError, match=r"\(large\.safetensors, small\.safetensors\)") as error:
        Checkpoint.open(tmp_path / "my repo")
    words = shlex.split(error.value.fix.partition(": ")[2])
    assert words == ["latentrt", "inspect", str(tmp_path / "my repo" / "large.safetensors")]


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "Euler a", "DDIMScheduler", "Heun"])
def test_samplers_that_cannot_say_a_continuous_timestep(sampler: str) -> None:
    """Models in EDM's way with diffusers' Euler: another class would tell the UNet something else."""
    model = {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous", "sigma_max": 120.0}
    model |= {"sigma_min": 0.002, "prediction_type": "v_prediction"}
    assert resolve("Euler", model).timestep_type == resolve(None, model).timestep_type == "continuous"
    with pytest.raises(SamplerError, match=r"log.sigma. / 4.*sampler='euler'"):
        resolve(sampler, model)


# ── folders that are no checkpoint ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("part", "kind"), [("vae", "an autoencoder's folder"), ("unet", "a UNet's folder")])
def test_opening_a_part_says_what_inspecting_it_says(copy: Path, part: str, kind: str) -> None:
    with pytest.raises(CheckpointError, match=f"{part} is {kind}") as caught:
        Checkpoint.open(copy / part)
    found = report(copy / part)
    assert (found.what, found.todo) == (kind, caught.value.fix)
    tensors = load_file(next((copy / part).glob("*.safetensors"))).values()
    assert (found.tensors, found.size) == (len(tensors), sum(t.nbytes for t in tensors))


def test_of_many_files_the_checkpoint_is_advised(tmp_path: Path) -> None:
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(4, 9_000_000)}, tmp_path / "large.safetensors")
    with pytest.raises(CheckpointError, match="Look at a file: latentrt inspect") as caught:
        Checkpoint.open(tmp_path)
    write_header_only(tmp_path / "model.safetensors", one_file(build(TINY["sd1"]), "sd1"))
    with pytest.raises(CheckpointError, match="Open the file: ") as caught:
        Checkpoint.open(tmp_path)
    assert caught.value.fix.endswith(str(tmp_path / "model.safetensors"))
    assert report(tmp_path).todo == caught.value.fix


@pytest.mark.parametrize("value", [{"a": 1}, [1, 2], torch.nn.Module])
def test_the_oldest_pickles_are_pickles(tmp_path: Path, value: object) -> None:
    (tmp_path / "x.safetensors").write_bytes(pickle.dumps(value, protocol=0))
    assert report(tmp_path / "x.safetensors").kind == "pickle"


def test_a_report_says_what_was_expected(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(9)}, tmp_path / "whole.safetensors")
    content = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(content[:-9])
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path / "half.safetensors")
    found = report(tmp_path / "half.safetensors")
    assert (found.problem, found.expected) == (caught.value.found, caught.value.expected)


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("tokenizer_config.json", "[]", "no JSON object"),
        ("tokenizer_config.json", '{"model_max_length": "x"}', "model_max_length is 'x'"),
        ("special_tokens_map.json", "{", "Expecting property name"),
        ("vocab.json", "{}", "out of vocabulary"),
    ],
)
def test_a_damaged_tokenizer_is_named_where_the_user_has_it(
    copy: Path, tmp_path: Path, file: str, text: str, said: str
) -> None:
    """Before the weights are hashed; `latentrt inspect` says the same."""
    (copy / "tokenizer" / file).write_text(text)
    (copy / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)
    options = Options(dtype="fp32", reads=())
    with pytest.raises(CheckpointError, match=f"(?s){copy / 'tokenizer'}.*{said}") as caught:
        open_checkpoint(copy, options, tokenize=tokenize, store=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    with pytest.raises(CheckpointError, match=said):
        check_tokenizers(Checkpoint.open(copy), tokenize)
    assert "hf download" in caught.value.fix
