from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from latentrt.checkpoints.files.component import TensorHeader, read_headers, read_tensors
from latentrt.engines.errors import CheckpointError
from latentrt.export.nets.torch_net import read_as_torch

TENSORS = {
    "unet.weight": torch.arange(6.0).reshape(2, 3),
    "bias": torch.tensor([1, 2, 3], dtype=torch.float16),
    "brain": torch.tensor([1, 2, 3], dtype=torch.bfloat16),
    "empty": torch.empty(0, 4),
    "scalar": torch.tensor(3, dtype=torch.float64),
    "small": torch.tensor([1, -2, 448]).to(torch.float8_e4m3fn),
    "smaller": torch.tensor([[1, -2, 57344]]).to(torch.float8_e5m2),
}


def written(folder: Path) -> Path:
    save_file(TENSORS, folder / "x.safetensors", metadata={"format": "pt"})
    return folder / "x.safetensors"


def test_headers_metadata_and_tensors(tmp_path: Path) -> None:
    path = written(tmp_path)
    headers = read_headers(path)
    assert headers["bias"] == TensorHeader(file=path, name="bias", dtype="F16", shape=(3,))
    found = read_tensors(headers)
    assert list(found) == list(headers)
    for name, tensor in TENSORS.items():
        assert found[name].shape == tuple(tensor.shape)
        assert np.array_equal(found[name].astype(np.float64), tensor.double().numpy())
    kinds = [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
    assert [found[name].dtype for name in ("brain", "small", "smaller")] == kinds
    assert not any(array.flags.writeable for array in found.values())


def test_torch_takes_the_same_memory(tmp_path: Path) -> None:
    headers = read_headers(written(tmp_path))
    headers["turned"] = replace(headers["smaller"], transposed=True, shape=(3, 1))
    found = read_as_torch(headers)
    assert torch.equal(found.pop("turned").float(), TENSORS["smaller"].T.float())
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].double(), tensor.double())


def test_slices_and_transposes_are_views_of_the_mapped_file(tmp_path: Path) -> None:
    header = read_headers(written(tmp_path))["unet.weight"]  # (2, 3)
    found = read_tensors(
        {
            "whole": header,
            "row": replace(header, rows=(1, 2), shape=(1, 3)),
            "transposed": replace(header, transposed=True, shape=(3, 2)),
            "convolution": replace(header, rows=(0, 1), shape=(3, 1, 1)),
        }
    )
    whole = TENSORS["unet.weight"].numpy()
    assert np.array_equal(found["row"], whole[1:2])
    assert np.array_equal(found["transposed"], whole.T)
    assert np.array_equal(found["convolution"], whole[0, :, None, None])
    assert all(np.shares_memory(array, found["whole"]) for array in found.values()), "one mapping, no copies"


def test_a_file_that_changed_is_refused(tmp_path: Path) -> None:
    header = read_headers(written(tmp_path))["unet.weight"]
    path = tmp_path / "x.safetensors"
    save_file({"unet.weight": torch.zeros(5)}, path)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        read_tensors({"x": header})
    for changed in (replace(header, name="gone", shape=(5,)), replace(header, dtype="F16", shape=(5,))):
        with pytest.raises(CheckpointError, match="changed while it was read"):
            read_tensors({"x": changed})
    path.unlink()
    with pytest.raises(CheckpointError, match="is not a file"):
        read_tensors({"x": header})
