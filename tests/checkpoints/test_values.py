"""Weights that are not finite, or too large for a net, are named before anything is computed with them."""

import re
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from latentrt.checkpoints.files import values
from latentrt.checkpoints.files.component import Component, read_headers
from latentrt.checkpoints.files.open import Checkpoint
from latentrt.checkpoints.files.values import check_values
from latentrt.checkpoints.precision.calibration import components
from latentrt.engines.errors import CheckpointError
from latentrt.export.nets.build import NETS
from tests.recipes import RECIPES, make_checkpoint

TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def part(folder: Path, **tensors: torch.Tensor) -> Component:
    path = folder / "x.safetensors"
    save_file(tensors, path)
    return Component(name="unet", folder=folder, config={}, tensors=read_headers(path))


def check(part: Component, names: Iterable[str], dtype: str) -> None:
    check_values(part.folder, {name: part.tensors[name] for name in names}, dtype)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_bit_pattern_is_judged_as_torch_does(tmp_path: Path, stored: torch.dtype, dtype: str) -> None:
    """One tensor for each number; the oracle is torch's isfinite and its largest number of the type."""
    bits = torch.arange(-128, 128, dtype=torch.int8)
    if stored.itemsize == 2:
        bits = torch.arange(-(2**15), 2**15, 37, dtype=torch.int16)  # and the edges of each exponent
        edges = torch.arange(-(2**15), 2**15, 2**7, dtype=torch.int32)
        near = torch.cat([edges - 1, edges, edges + 1]).clamp(-(2**15), 2**15 - 1)
        bits = torch.cat([bits, near.to(torch.int16)])
    numbers = bits.view(stored)
    wide = numbers.to(torch.float64)
    fits = wide.isfinite() & (wide.abs() <= torch.finfo(getattr(torch, dtype)).max)
    found = part(tmp_path, **{f"w{i}": number.clone() for i, number in enumerate(numbers)})
    check(found, [f"w{i}" for i in range(len(numbers)) if fits[i]], dtype)
    for i in [int(i) for i in np.flatnonzero(~fits.numpy())][::17]:
        what = "NaN or infinite" if not wide[i].isfinite() else "values up to"
        with pytest.raises(CheckpointError, match=f"'w{i}' has .*{what}"):
            check(found, [f"w{i}"], dtype)


@pytest.mark.parametrize("stored", TYPES)
def test_one_bad_number_is_found_wherever_it_is(
    tmp_path: Path, stored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(values, "_CHUNK", 64)
    sound = torch.linspace(-2, 2, 130).to(TYPES[stored])
    for place in (0, 63, 64, 129):
        broken = sound.float().clone()
        broken[place] = float("nan")
        found = part(tmp_path, sound=sound, broken=broken.to(TYPES[stored]))
        check(found, ["sound"], "float16")
        with pytest.raises(CheckpointError, match="'broken' has 1 values of 130 that are NaN") as error:
            check(found, ["sound", "broken"], "float16")
        assert str(tmp_path) in error.value.found


def test_only_what_a_net_reads_counts(tmp_path: Path) -> None:
    whole = torch.full((4, 3), 7e4)
    whole[1:] = 1
    found = part(tmp_path, whole=whole, empty=torch.zeros(0, 3), position_ids=torch.arange(3))
    check(found, ["empty", "position_ids"], "float16")
    header = found.tensors["whole"]
    rows = {
        "query": replace(header, rows=(0, 1), shape=(1, 3)),
        "key": replace(header, rows=(1, 4), shape=(3, 3)),
        "turned": replace(header, rows=(1, 4), shape=(3, 3), transposed=True),
    }
    found = replace(found, tensors=rows)
    check(found, ["key", "turned"], "float16")
    with pytest.raises(CheckpointError, match=r"'query' has values up to 7e\+04"):
        check(found, rows, "float16")
    check(found, rows, "float32")


def test_a_weight_that_fp16_cannot_hold(tmp_path: Path) -> None:
    source = make_checkpoint(RECIPES["tiny1"], tmp_path / "tiny1", dtype=torch.float32)
    path = source / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["decoder.conv_in.bias"][3] = -7e4
    save_file(tensors, path, metadata={"format": "pt"})
    checkpoint = Checkpoint.open(source)
    with pytest.raises(CheckpointError, match=r"'decoder.conv_in.bias' has values up to 7e\+04"):
        NETS["vae_decoder"].build(checkpoint, torch.float16)
    NETS["vae_decoder"].build(checkpoint, torch.float32)


@pytest.mark.parametrize(("dtype", "fix"), [(torch.float16, "--dtype fp32"), (torch.float32, "damaged")])
def test_a_weight_that_float32_cannot_hold(tmp_path: Path, dtype: torch.dtype, fix: str) -> None:
    source = make_checkpoint(RECIPES["tiny1"], tmp_path / "tiny1", dtype=torch.float32)
    path = source / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["decoder.conv_in.bias"] = tensors["decoder.conv_in.bias"].double()
    tensors["decoder.conv_in.bias"][3] = -1e39
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'decoder.conv_in.bias' has values up to 1e\+39") as error:
        NETS["vae_decoder"].build(Checkpoint.open(source), dtype)
    assert fix in error.value.fix


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_are_not_finite_are_named_at_export(
    checkpoint: Path, tmp_path: Path, part: str, bad: float, dtype: torch.dtype
) -> None:
    """A broken merge: one value. The advice is not another dtype."""
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    (weights,) = (copy / part).glob("*.safetensors")
    tensors = load_file(weights)
    name = next(
        name for name in tensors if name.endswith("norm1.weight" if part != "vae" else "conv_in.bias")
    )
    tensors[name].view(-1)[3] = bad
    save_file(tensors, weights)
    opened = Checkpoint.open(copy)
    nets = components(opened)
    with pytest.raises(CheckpointError, match=f"'{re.escape(name)}' has 1 values of") as error:
        _ = [NETS[net].build(opened, dtype) for net in nets]
    assert str(copy / part) in error.value.found
    assert "--dtype fp32" not in error.value.fix
