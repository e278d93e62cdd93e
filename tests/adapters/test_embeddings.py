"""Embedding files in every form that tools write, and what is refused: T38, T39, T43, T57."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

import latentrt.demo
from latentrt.adapters.embeddings import (
    MOST_VECTORS,
    Embedding,
    embedding_inputs,
    make_embedding,
    read_embedding,
    refuse_name,
    vocabulary_size,
)
from latentrt.engines.errors import CheckpointError, PackageError, UsageError
from latentrt.engines.package import Package
from latentrt.engines.spec import TensorSpec
from latentrt.export.pickles.convert import convert_pickle

DEMO = Package.open(Path(latentrt.demo.__file__).parent / "package")


def inputs(dtype: str = "float32", **widths: int) -> Mapping[str, TensorSpec]:
    return {
        net: TensorSpec(name="extra_embeddings", dtype=dtype, shape=("E", width))
        for net, width in widths.items()
    }


SD1, SD2 = inputs(text_encoder=768), inputs(text_encoder=1024)
XL, REFINER = inputs(text_encoder=768, text_encoder_2=1280), inputs(text_encoder_2=1280)


def rows(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.fixture
def file(tmp_path: Path) -> Any:
    def write(arrays: Mapping[str, np.ndarray], name: str = "easy.safetensors") -> Path:
        save_file(dict(arrays), tmp_path / name)
        return tmp_path / name

    return write


def equal(found: Embedding, wanted: Mapping[str, np.ndarray]) -> None:
    assert found.vectors.keys() == wanted.keys()
    for net, array in wanted.items():
        np.testing.assert_array_equal(found.vectors[net], array)


# ── forms ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("key", "name"),
    [("emb_params", "easy"), ("string_to_param.*", "easy"), ("clip_l", "easy"), ("<cat-toy>", "<cat-toy>")],
)
def test_one_tensor(file: Any, key: str, name: str) -> None:
    path = file({key: rows(4, 768)})
    found = read_embedding(path, SD1)
    equal(found, {"text_encoder": rows(4, 768)})
    assert (found.name, len(found)) == (name, 4)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_embedding(path, SD1, "other").name == "other"


def test_one_vector_without_an_axis(file: Any) -> None:
    equal(read_embedding(file({"<cat>": rows(1024)}), SD2), {"text_encoder": rows(1, 1024)})


def test_two_encoders(file: Any) -> None:
    first, second = rows(3, 768), rows(3, 1280, seed=1)
    path = file({"clip_g": second, "clip_l": first})
    equal(read_embedding(path, XL), {"text_encoder": first, "text_encoder_2": second})
    equal(read_embedding(path, REFINER), {"text_encoder_2": second})  # T38: the base's, for its refiner
    assert read_embedding(path, XL).name == "easy"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("taken", ["float32", "float16"])
def test_types(tmp_path: Path, dtype: torch.dtype, taken: str) -> None:
    stored = torch.from_numpy(rows(2, 768)).to(dtype)
    save_torch({"emb_params": stored}, tmp_path / "easy.safetensors")
    found = read_embedding(tmp_path / "easy.safetensors", inputs(taken, text_encoder=768))
    wanted = stored.to(getattr(torch, taken)).numpy()
    equal(found, {"text_encoder": wanted})
    assert found.vectors["text_encoder"].dtype == wanted.dtype


def test_vectors_are_read_only(file: Any) -> None:
    with pytest.raises(ValueError, match="read-only"):
        read_embedding(file({"emb_params": rows(2, 768)}), SD1).vectors["text_encoder"][:] = 0


def test_arrays() -> None:
    """What a program has, or a LoRA's file (OneTrainer's bundles)."""
    bundled = {"clip_l": rows(2, 768), "clip_g": rows(2, 1280)}
    found = make_embedding("face", bundled, XL)
    equal(found, {"text_encoder": rows(2, 768), "text_encoder_2": rows(2, 1280)})
    assert found.name == "face"
    again = make_embedding("other", {"string_to_param.*": rows(2, 768)}, SD1)
    equal(again, {"text_encoder": rows(2, 768)})
    assert len({found.sha256, again.sha256, make_embedding("a", {"b": rows(3, 768)}, SD1).sha256}) == 3
    assert again.sha256 == make_embedding("x", {"y": rows(2, 768)}, SD1).sha256, "by content"
    assert again.is_like(make_embedding("x", {"y": rows(2, 768)}, SD1))
    assert not again.is_like(make_embedding("x", {"y": rows(2, 768, seed=9)}, SD1))


# ── pickles become safetensors ───────────────────────────────────────────────────────────────────────


def a1111(vectors: torch.Tensor, kind: str) -> dict[str, Any]:
    """What AUTOMATIC1111's training saved: first a module of parameters, later a dict."""
    parameters: Any = {"*": torch.nn.Parameter(vectors)}
    return {
        "string_to_token": {"*": torch.tensor(265) if kind == "module" else 265},
        "string_to_param": torch.nn.ParameterDict(parameters) if kind == "module" else parameters,
        "name": "face",
        "step": 5000,
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
    }


@pytest.mark.parametrize("kind", ["module", "dict"])
def test_pickles_of_a1111(tmp_path: Path, kind: str) -> None:
    torch.save(a1111(torch.from_numpy(rows(3, 768)), kind), tmp_path / "easy.pt")
    with pytest.raises(CheckpointError, match=r"is a pickle: .* latentrt convert .*easy\.pt -o .*easy\.saf"):
        read_embedding(tmp_path / "easy.pt", SD1)
    convert_pickle(tmp_path / "easy.pt", tmp_path / "easy.safetensors")
    found = read_embedding(tmp_path / "easy.safetensors", SD1)
    equal(found, {"text_encoder": rows(3, 768)})
    assert found.name == "easy", "A1111 calls it by its file"


def test_pickles_of_a1111_for_sdxl_and_of_diffusers(tmp_path: Path) -> None:
    torch.save({"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)}, tmp_path / "xl.pt")
    torch.save({"<cat-toy>": torch.ones(768)}, tmp_path / "learned_embeds.bin")
    for name in ("xl.pt", "learned_embeds.bin"):
        convert_pickle(tmp_path / name, (tmp_path / name).with_suffix(".safetensors"))
    assert len(read_embedding(tmp_path / "xl.safetensors", XL)) == 1
    assert read_embedding(tmp_path / "learned_embeds.safetensors", SD1).name == "<cat-toy>"


def test_a_pickle_with_two_words_keeps_both_and_is_no_embedding(tmp_path: Path) -> None:
    two = {"string_to_param": {"*": torch.ones(1, 768), "+": torch.zeros(1, 768)}}
    torch.save(two, tmp_path / "two.pt")
    convert_pickle(tmp_path / "two.pt", tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"two.safetensors has 2 tensors \('\*', '\+'\)"):
        read_embedding(tmp_path / "two.safetensors", SD1)


def test_another_module_in_its_place_is_not_read(tmp_path: Path) -> None:
    module = torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.ones(1, 768))})
    module.__dict__["_parameters"] = [1]
    torch.save({"string_to_param": module}, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match="no tensors by name"):
        convert_pickle(tmp_path / "odd.pt", tmp_path / "odd.safetensors")


# ── refused ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("model", "arrays", "message"),
    [
        # T38: an embedding of 1.x on SDXL, and the reverse
        (XL, {"emb_params": rows(4, 768)}, r"easy.safetensors is an embedding with clip_g missing .*4x768"),
        (
            XL,
            {"emb_params": rows(4, 1280)},
            r"clip_l missing .*; expected clip_l \(n, 768\) for text_encoder",
        ),
        (XL, {"clip_l": rows(4, 768)}, r"clip_g missing .*; expected clip_g \(n, 1280\) for text_encoder_2"),
        (REFINER, {"clip_l": rows(4, 768)}, "clip_g missing"),
        (SD1, {"clip_l": rows(1, 768), "clip_g": rows(1, 1280)}, "clip_g 1x1280 as well: it is for SDXL"),
        (SD1, {"clip_g": rows(1, 1280)}, "clip_l missing"),
        # T39: of 2.x on 1.x, and the reverse
        (SD1, {"emb_params": rows(2, 1024)}, r"shape 2x1024 for text_encoder; expected 768 numbers"),
        (SD2, {"emb_params": rows(2, 768)}, r"shape 2x768 for text_encoder; expected 1024 numbers"),
        # T43: OneTrainer's clip_g of clip_l's width
        (
            XL,
            {"clip_l": rows(2, 768), "clip_g": rows(2, 768)},
            r"easy.safetensors has vectors of the shape 2x768 for text_encoder_2; expected 1280 numbers",
        ),
        (XL, {"clip_l": rows(2, 768), "clip_g": rows(3, 1280)}, "2 vectors for text_encoder and has 3"),
        (SD1, {"a": rows(1, 768), "b": rows(1, 768)}, r"has 2 tensors \('a', 'b'\); expected one, or clip_l"),
        (XL, {"clip_l": rows(1, 768), "clip_g": rows(1, 1280), "t5xxl": rows(1, 4)}, "has 3 tensors"),
        (SD1, {}, r"has 0 tensors \(none\)"),
        (SD1, {"a": rows(1, 1, 768)}, "shape 1x1x768"),
        (SD1, {"a": np.ones((), np.float32)}, "shape of one number"),
        (SD1, {"a": rows(0, 768)}, "has 0 vectors; expected 1 to 75"),
        (SD1, {"a": rows(MOST_VECTORS + 1, 768)}, "has 76 vectors; expected 1 to 75"),
        (SD1, {"a": np.array([[1, np.nan, *[0] * 766]], np.float32)}, "NaN or infinity"),
        (SD1, {"a": np.array([[1, -np.inf, *[0] * 766]], np.float32)}, "NaN or infinity"),
        (SD1, {"a": np.ones((1, 768), np.int32)}, "stores 'a' as I32; expected floats"),
        (SD1, {f"a{i}": rows(1) for i in range(10_000)}, "has 10000 tensors"),
        # other kinds, whatever they are called
        (
            SD1,
            {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": rows(4, 8)},
            "is a LoRA",
        ),
        (SD1, {"unet.mid_block.attentions.0.proj_in.lora_A.weight": rows(4, 8)}, "is a LoRA"),
        (SD1, {"controlnet_cond_embedding.conv_in.weight": rows(4, 8)}, "is a ControlNet"),
    ],
)
def test_refusals(file: Any, model: Any, arrays: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_embedding(file(arrays), model)


def test_numbers_beyond_the_encoders_type(file: Any) -> None:
    path = file({"a": np.full((1, 768), 7e4, np.float32)})
    read_embedding(path, SD1)
    with pytest.raises(CheckpointError, match=r"numbers up to 7e\+04; expected at most 65504, as float16"):
        read_embedding(path, inputs("float16", text_encoder=768))


def test_damaged_files(tmp_path: Path, file: Any) -> None:
    """T57: truncated, with a name twice, or far too large."""
    whole = file({"a": rows(2, 768)}).read_bytes()
    (tmp_path / "half.safetensors").write_bytes(whole[:-100])
    entry = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = f"{{{entry},{entry}}}".encode()
    (tmp_path / "twice.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    for name in ("half", "twice", "none"):
        with pytest.raises(CheckpointError, match=name):
            read_embedding(tmp_path / f"{name}.safetensors", SD1)
    with pytest.raises(CheckpointError, match="bytes; expected at most 16777216"):
        read_embedding(file({"a": np.zeros((2**13, 768), np.float32)}), SD1)


def test_arrays_of_other_types() -> None:
    with pytest.raises(CheckpointError, match="the embedding 'face' has 'a' as int64; expected floats"):
        make_embedding("face", {"a": np.ones((1, 768), np.int64)}, SD1)
    with pytest.raises(CheckpointError, match=r"lora.safetensors is an embedding with clip_g missing"):
        make_embedding("face", {"clip_l": rows(1, 768)}, XL, where="lora.safetensors")


@pytest.mark.parametrize("name", ["", " a", "a\n", "a\nb", "x" * 256])
def test_names_that_no_prompt_has(name: str) -> None:
    with pytest.raises(UsageError, match=r"an embedding is called .*; expected 1 to 255 printable"):
        refuse_name(name)


# ── packages ─────────────────────────────────────────────────────────────────────────────────────────


def test_the_shipped_package_takes_embeddings() -> None:
    assert {net: item.shape for net, item in embedding_inputs(DEMO).items()} == {"text_encoder": ("E", 96)}
    path = Path(latentrt.demo.__file__).parent / "checkpoint" / "text_encoder" / "model.safetensors"
    with safe_open(path, "np") as checkpoint:
        names = list(checkpoint.keys())
        (name,) = [key for key in names if key.endswith("token_embedding.weight")]
        assert vocabulary_size(DEMO, "text_encoder") == checkpoint.get_slice(name).get_shape()[0]


def test_an_old_package_is_to_be_exported_again() -> None:
    net = DEMO.manifest.nets["text_encoder"]
    older = replace(net, spec=replace(net.spec, inputs=net.spec.inputs[:-1]))
    manifest = replace(DEMO.manifest, nets={**DEMO.manifest.nets, "text_encoder": older})
    with pytest.raises(
        PackageError, match=r"'text_encoder' has no input 'extra_embeddings'.*Export the chec"
    ):
        embedding_inputs(replace(DEMO, manifest=manifest))


def test_a_net_without_a_table() -> None:
    with pytest.raises(PackageError, match="'vae_decoder' has 0 weights called"):
        vocabulary_size(DEMO, "vae_decoder")
