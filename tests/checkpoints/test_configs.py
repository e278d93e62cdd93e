"""Values that no config should have: named with file and key as a folder is read, before its weights are."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import transformers

from latentrt.checkpoints.files.configs import check_config
from latentrt.checkpoints.files.open import Checkpoint
from latentrt.checkpoints.manifest import request_defaults
from latentrt.engines.errors import CheckpointError
from latentrt.runtime.sampling.config import SCHEDULER_CLASSES

SCHEDULER = "scheduler/scheduler_config.json"


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of diffusers with NumPy 2
@pytest.mark.parametrize("name", SCHEDULER_CLASSES)
def test_every_scheduler_as_diffusers_writes_it(name: str, tmp_path: Path) -> None:
    getattr(diffusers, name)().save_pretrained(tmp_path)
    path = tmp_path / "scheduler_config.json"
    check_config(json.loads(path.read_text()), path, "scheduler")


@pytest.mark.parametrize(
    ("part", "config"),
    [
        ("unet", {**diffusers.UNet2DConditionModel().config}),
        ("vae", {**diffusers.AutoencoderKL().config}),
        ("tiny_vae", {**diffusers.AutoencoderTiny().config}),
        ("text_encoder", transformers.CLIPTextConfig().to_dict()),
        ("image_encoder", transformers.CLIPVisionConfig().to_dict()),
        ("feature_extractor", transformers.CLIPImageProcessor().to_dict()),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_default_of_a_part(part: str, config: dict[str, Any]) -> None:
    check_config(json.loads(json.dumps(config, default=str)), Path("config.json"), part)


@pytest.mark.parametrize(
    ("file", "key", "value", "shown"),
    [
        ("unet/config.json", "sample_size", "64", '"64"'),
        ("unet/config.json", "sample_size", -1, "-1"),
        ("unet/config.json", "sample_size", math.nan, "NaN"),
        ("unet/config.json", "sample_size", math.inf, "Infinity"),
        ("unet/config.json", "sample_size", [64, -1], r"\[64, -1\]"),
        ("unet/config.json", "sample_size", [64, 64, 64], r"\[64, 64, 64\]"),
        ("unet/config.json", "sample_size", 10**12, str(10**12)),
        ("unet/config.json", "sample_size", True, "true"),
        ("unet/config.json", "in_channels", "4", '"4"'),
        ("unet/config.json", "cross_attention_dim", math.nan, "NaN"),
        ("unet/config.json", "cross_attention_dim", "a", '"a"'),
        ("vae/config.json", "latent_channels", "4", '"4"'),
        ("vae/config.json", "scaling_factor", "x", '"x"'),
        ("vae/config.json", "block_out_channels", 5, "5"),
        ("text_encoder/config.json", "hidden_size", None, "null"),
        ("text_encoder/config.json", "num_hidden_layers", "12", '"12"'),
        (SCHEDULER, "num_train_timesteps", -1, "-1"),
        (SCHEDULER, "num_train_timesteps", 10**12, str(10**12)),
        (SCHEDULER, "num_train_timesteps", "1000", '"1000"'),
        (SCHEDULER, "beta_start", math.nan, "NaN"),
        (SCHEDULER, "beta_start", "x", '"x"'),
        (SCHEDULER, "beta_start", 5, "5"),
        (SCHEDULER, "beta_end", 10**400, "1000"),
        (SCHEDULER, "trained_betas", "x", '"x"'),
        (SCHEDULER, "trained_betas", [math.nan], r"\[NaN\]"),
        (SCHEDULER, "steps_offset", "x", '"x"'),
        (SCHEDULER, "steps_offset", math.nan, "NaN"),
        (SCHEDULER, "steps_offset", -5, "-5"),
        (SCHEDULER, "steps_offset", 10**9, str(10**9)),
        (SCHEDULER, "timestep_spacing", "x", '"x"'),
    ],
)
def test_values_that_are_named(copy: Path, file: str, key: str, value: object, shown: str) -> None:
    change(copy / file, **{key: value})
    with pytest.raises(CheckpointError, match=rf"{copy / file}: {key} is {shown}.*; expected (a|leading) ?"):
        Checkpoint.open(copy)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"trained_betas": [0.1, 0.2]}, "2 betas between 0.1 and 0.2"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid'"),
        ({"beta_start": 0}, "1000 betas between 0 and"),
    ],
)
def test_noise_schedules_that_cannot_be_computed(copy: Path, values: dict[str, Any], said: str) -> None:
    change(copy / SCHEDULER, **values)
    with pytest.raises(CheckpointError, match=f"{copy / SCHEDULER}: {said}"):
        Checkpoint.open(copy)


@pytest.mark.parametrize("written", [{"_class_name": None}, {"_class_name": 5}, {}])
def test_a_scheduler_whose_class_nobody_names(copy: Path, written: dict[str, Any]) -> None:
    path = copy / SCHEDULER
    config = {key: value for key, value in json.loads(path.read_text()).items() if key != "_class_name"}
    path.write_text(json.dumps({**config, **written}))
    Checkpoint.open(copy)  # the index names it
    change(copy / "model_index.json", scheduler=None)
    with pytest.raises(CheckpointError, match=f"{path}: _class_name is (null|5); expected a text"):
        Checkpoint.open(copy)


def test_keys_that_nobody_reads_may_hold_anything(copy: Path) -> None:
    """diffusers reads such configs: what it does not know it leaves alone."""
    change(copy / SCHEDULER, comment={"score": math.nan}, lambda_min_clipped=-math.inf)
    diffusers.DDIMScheduler.from_pretrained(copy / "scheduler")
    assert math.isnan(Checkpoint.open(copy).scheduler["comment"]["score"])


@pytest.mark.parametrize("value", [math.nan, -math.inf, "x"])
def test_a_number_that_a_folder_recommends(copy: Path, value: object) -> None:
    (copy / "recommended.json").write_text(json.dumps({"guidance_scale": 3.5, "width": 128}))
    found = request_defaults(Checkpoint.open(copy))
    assert (found.guidance_scale, found.width) == (3.5, 128)
    (copy / "recommended.json").write_text(json.dumps({"guidance_scale": value}))
    with pytest.raises(CheckpointError, match=r"recommended\.json is damaged \(defaults\.guidance_scale is"):
        Checkpoint.open(copy)


def test_inspect_says_the_same(copy: Path) -> None:
    change(copy / SCHEDULER, beta_start=math.nan)
    found = subprocess.run(
        [sys.executable, "-m", "latentrt", "inspect", copy], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    assert f"cannot be opened: {copy / SCHEDULER}: beta_start is NaN" in found.stdout
