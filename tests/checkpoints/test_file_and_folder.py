"""A file draws as the published folder of its model does: no fact is made up that a folder does not have."""

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from latentrt.checkpoints.files.single_file import open_single_file
from latentrt.runtime.sampling.names import resolve
from latentrt.runtime.sampling.samplers import SAMPLERS, make_table
from tests.export.ldm_files import PUBLISHED, TINY, build, one_file, write_header_only

# As A1111 and diffusers spell them -> the class, and what `from_config` is called with besides.
BY_NAME: dict[str, tuple[str, dict[str, Any]]] = {
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "LMS": ("LMSDiscreteScheduler", {}),
    "DPM2": ("KDPM2DiscreteScheduler", {}),
    "DPM2 a": ("KDPM2AncestralDiscreteScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "DEIS": ("DEISMultistepScheduler", {}),
    "DDIM": ("DDIMScheduler", {}),
    "DDPM": ("DDPMScheduler", {}),
    "PLMS": ("PNDMScheduler", {}),
    "LCM": ("LCMScheduler", {}),
}


@pytest.fixture(scope="module")
def schedulers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What a file of each family is read to have."""
    found: dict[str, dict[str, Any]] = {}
    for family, recipe in TINY.items():
        path = tmp_path_factory.mktemp(family) / "model.safetensors"
        with torch.device("meta"):
            write_header_only(path, one_file(build(recipe), family))
        found[family] = dict(open_single_file(path).scheduler)
    return found


@pytest.mark.parametrize("family", TINY)
def test_every_sampler_is_the_folders(family: str, schedulers: dict[str, dict[str, Any]]) -> None:
    for sampler in (None, *SAMPLERS):
        assert resolve(sampler, schedulers[family]) == resolve(sampler, PUBLISHED[family]), sampler


@pytest.mark.parametrize("family", TINY)
def test_nothing_is_said_that_no_folder_says(family: str, schedulers: dict[str, dict[str, Any]]) -> None:
    default = {"prediction_type": "epsilon"}  # of every class
    assert {**default, **PUBLISHED[family]} == schedulers[family]


@pytest.mark.filterwarnings("ignore:.*__array.*:DeprecationWarning")
@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("family", TINY)
def test_timesteps_are_those_of_diffusers_from_the_folder(
    family: str, name: str, schedulers: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """`from_pretrained`, then another class `from_config`: the way that diffusers documents."""
    (tmp_path / "scheduler_config.json").write_text(json.dumps(PUBLISHED[family]))
    own = getattr(diffusers, PUBLISHED[family]["_class_name"]).from_pretrained(tmp_path)
    kind, options = BY_NAME[name]
    scheduler = getattr(diffusers, kind).from_config(own.config, **options)
    scheduler.set_timesteps(8)
    table = make_table(resolve(name, schedulers[family]), 8)
    assert np.allclose(table.t, scheduler.timesteps.numpy(), atol=1e-2)
