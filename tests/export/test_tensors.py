from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from latentrt.checkpoints.files.component import TensorHeader, read_headers, read_tensors
from latentrt.engines.errors import CheckpointError

TENSORS = {
    "unet.weight": torch.arange(6.0).reshape(2, 3),
    "bias": torch.tensor([1, 2, 3], dtype=torch.float16),
    "brain": torch.tensor([1, 2, 3], dtype=torch.bfloat16),
    "empty": torch.empty(0, 4),
    "scalar": torch.tensor(3, dtype=torch.float64),
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
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


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
    whole = TENSORS["unet.weight"]
    assert torch.equal(found["row"], whole[1:2])
    assert torch.equal(found["transposed"], whole.T)
    assert torch.equal(found["convolution"], whole[0, :, None, None])
    storages = {tensor.untyped_storage().data_ptr() for tensor in found.values()}
    assert len(storages) == 1, "one mapping, no copies"


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
