"""What is read of an adapter's file, what is refused and how; nothing is half applied."""

import hashlib
import json
import shutil
import struct
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentrt.adapters import files
from latentrt.adapters.files import read_adapter
from latentrt.adapters.keys import flat
from latentrt.adapters.merging import merged
from latentrt.engines.errors import AdapterError, ModelError
from tests.adapters.tiny import bound, normal, targets, write

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
NAME = f"lora_unet_{flat(LAYER)}"
TEXT = "text_model_encoder_layers_0_mlp_fc1"
SD1 = targets("sd1")
WIDTH = SD1["unet"][f"{LAYER}.weight"][0]

Tensors = dict[str, torch.Tensor]


def pair(name: str, out: int = WIDTH, inputs: int = WIDTH, rank: int = 2) -> Tensors:
    return {f"{name}.lora_up.weight": normal(out, rank), f"{name}.lora_down.weight": normal(rank, inputs)}


def text_pair(prefix: str) -> Tensors:
    return pair(f"{prefix}{TEXT}", 96, 64)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "style.v1.safetensors"


def refused(path: Path, match: str, shapes: Any = SD1, *, allow_unused: bool = False) -> AdapterError:
    with pytest.raises(AdapterError, match=match) as caught:
        bound(path, shapes, allow_unused=allow_unused)
    error = caught.value
    assert isinstance(error, ModelError)
    assert error.exit_code == 3
    assert error.found
    assert error.expected
    assert error.fix
    assert len(str(error)) < 10_000
    return error


# ── what is read ──────────────────────────────────────────────────────────────────────────────────────────


def test_name_hashes_and_metadata(path: Path) -> None:
    write(path, pair(NAME), {"ss_network_dim": "2", "modelspec.title": "x"})
    found = read_adapter(path)
    content = path.read_bytes()
    assert found.name == "style.v1"
    assert found.sha256 == hashlib.sha256(content).hexdigest()
    (length,) = struct.unpack("<Q", content[:8])
    assert found.short_hash == hashlib.sha256(content[8 + length :]).hexdigest()[:12]
    assert found.metadata == {"ss_network_dim": "2", "modelspec.title": "x"}
    adapter = bound(path, SD1)
    assert (adapter.name, adapter.sha256, adapter.short_hash) == (found.name, found.sha256, found.short_hash)
    assert (adapter.applied, adapter.total, adapter.kinds) == (2, 2, {"lora": 1})


@pytest.mark.parametrize(
    ("noted", "taken"), [("ab" * 32, True), ("AB" * 32, False), ("x", False), ("", False)]
)
def test_a1111s_hash_is_the_trainers_where_it_is_one(noted: str, taken: bool, path: Path) -> None:
    write(path, pair(NAME), {"sshs_model_hash": noted})
    assert (read_adapter(path).short_hash == noted[:12]) == taken


def test_factors_are_read_when_they_are_computed_with(path: Path) -> None:
    """What stays in memory is what is no factor: alphas."""
    write(path, {**pair(NAME), f"{NAME}.alpha": torch.tensor(1.0)})
    found = read_adapter(path)
    assert [name for name, array in found.tensors.items() if isinstance(array, np.ndarray)] == [
        f"{NAME}.alpha"
    ]


def cut(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size - 64)


def written_over(path: Path) -> None:
    content = path.read_bytes()
    with path.open("r+b") as stream:
        stream.write(content)


def replaced(path: Path) -> None:
    """By a file of the same size and time of writing."""
    other = path.with_name("other")
    shutil.copy2(path, other)
    other.replace(path)


@pytest.mark.parametrize("change", [cut, written_over, replaced, Path.unlink])
def test_a_file_that_is_another_one_now_is_not_computed_with(change: Any, path: Path) -> None:
    """A mapped one would end the process, or draw other numbers under the old hash."""
    one = bound(write(path, pair(NAME)), SD1).changes["unet"][f"{LAYER}.weight"]
    base = np.zeros((WIDTH, WIDTH), np.float32)
    merged(base, [(one, 1.0)])
    time.sleep(0.02)  # the clock of file systems is coarse
    change(path)
    with pytest.raises(AdapterError, match=r"since it was loaded|cannot be read any more") as caught:
        merged(base, [(one, 0.5)])
    assert "Load it again" in caught.value.fix


def test_a_file_that_changes_while_it_is_read_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, pair(NAME))
    for change in (cut, written_over):

        def config(found: Path, change: Any = change) -> bytes:
            time.sleep(0.02)
            change(found)
            return b""

        monkeypatch.setattr(files, "read_config", config)
        with pytest.raises(AdapterError, match="has changed"):
            read_adapter(path)
        monkeypatch.undo()
        write(path, pair(NAME))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_factors_of_any_type(kind: torch.dtype, path: Path) -> None:
    stored = {name: x.to(kind) for name, x in pair(NAME).items()}
    change = bound(write(path, stored), SD1).changes["unet"][f"{LAYER}.weight"]
    up, down = (x.double() for x in stored.values())
    found = merged(np.zeros((WIDTH, WIDTH), np.float32), [(change, 1.0)])
    np.testing.assert_allclose(found, (up @ down).numpy(), rtol=1e-6, atol=1e-6)


def test_embeddings_that_lie_in_the_file(path: Path) -> None:
    bundled = {
        "bundle_emb.my.style.clip_l": normal(3, 64),
        "bundle_emb.one.string_to_param.*": normal(64),
        "bundle_emb.one.clip_g": normal(2, 128),
    }
    write(path, pair(NAME) | bundled)
    found = bound(path, targets("sd1"))
    assert {name: {e: x.shape for e, x in by.items()} for name, by in found.embeddings.items()} == {
        "my.style": {"clip_l": (3, 64)},
        "one": {"clip_l": (1, 64)},
    }
    assert found.unused == ("bundle_emb.one.clip_g",)
    write(path, bundled)
    assert bound(path, targets("sdxl")).embeddings["one"].keys() == {"clip_l", "clip_g"}
    refused(
        path,
        r"embedding bundle_emb.one.clip_g of the shape \(2, 128\)",
        {"text_encoder_2": {"text_model.embeddings.token_embedding.weight": (100, 64)}},
    )
    write(path, bundled | {"bundle_emb.one.clip_l": normal(1, 64)})
    refused(path, "two changes of one tensor: bundle_emb.one.*string_to_param")


# ── files that are none ───────────────────────────────────────────────────────────────────────────────────


def test_no_such_file(tmp_path: Path) -> None:
    refused(tmp_path / "none.safetensors", "is no file")
    refused(tmp_path, "is a folder without adapter_model.safetensors or pytorch_lora_weights.safetensors")


def test_a_pickle_is_to_be_converted(tmp_path: Path) -> None:
    torch.save(pair(NAME), tmp_path / "x.pt")
    error = refused(tmp_path / "x.pt", "is a pickle")
    assert error.fix.endswith(f"latentrt convert {tmp_path / 'x.pt'} -o {tmp_path / 'x.safetensors'}")


def test_a_pointer_and_a_page(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(path, "git-lfs pointer")
    path.write_text("<!DOCTYPE html><html></html>")
    assert "Download the file again" in refused(path, "an HTML page").fix
    path.write_bytes(b"7z\xbc\xaf" + bytes(300))
    assert refused(path, "a 7z archive").fix == f"Unpack it: 7z x {path}"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", "b")
    assert refused(path, "a zip archive").fix.endswith(f"python3 -m zipfile -e {path} {path.parent}")


@pytest.mark.parametrize("end", [-1, -100, 50])
def test_t57_a_truncated_file(end: int, path: Path) -> None:
    write(path, pair(NAME, rank=64))
    content = path.read_bytes()
    path.write_bytes(content[:end])
    error = refused(path, "ends after|bytes of tensors")
    assert "Download the file again" in error.fix


def test_t57_a_key_twice(path: Path) -> None:
    entry = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    text = f'{{"a.alpha":{entry},"a.alpha":{entry}}}'.encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    refused(path, "a name twice")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("part", ["lora_up.weight", "alpha"])
def test_t57_numbers_that_are_not_finite(part: str, kind: torch.dtype, value: float, path: Path) -> None:
    stored = {name: x.to(kind) for name, x in (pair(NAME) | {f"{NAME}.alpha": torch.tensor(1.0)}).items()}
    stored[f"{NAME}.{part}"].view(-1)[-1] = value
    refused(write(path, stored), f"NaN or infinity in {NAME}.{part}")


def test_t57_too_many_keys(path: Path) -> None:
    places = range(0, 400_000, 4)
    entries = {f"a{i}.alpha": {"dtype": "F32", "shape": [], "data_offsets": [i, i + 4]} for i in places}
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(400_000))
    refused(path, "has 100000 tensors; expected at most 20000")


def test_a_file_too_large(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, pair(NAME))
    monkeypatch.setattr(files, "_SIZE_LIMIT", 100)
    refused(path, "bytes; expected at most 100")


def test_numbers_of_a_type_that_no_adapter_has(path: Path) -> None:
    text = json.dumps(
        {
            f"{NAME}.alpha": {"dtype": "U16", "shape": [1], "data_offsets": [0, 2]},
            f"{NAME}.diff": {"dtype": "U16", "shape": [1], "data_offsets": [2, 4]},
        }
    ).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    refused(path, "in U16")


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.int64, torch.bool])
@pytest.mark.parametrize("part", ["lora_up.weight", "diff_b"])
def test_integers_are_quantised_weights(kind: torch.dtype, part: str, path: Path) -> None:
    """Those that count are none: an alpha, and whether an IA3 is of inputs."""
    stored = pair(NAME) | {f"{NAME}.diff_b": normal(WIDTH)}
    stored[f"{NAME}.{part}"] = torch.ones(stored[f"{NAME}.{part}"].shape, dtype=kind)
    error = refused(write(path, stored), f"{NAME}.{part} in .*, so it is quantised")
    assert "floats" in error.expected
    write(path, pair(NAME) | {"bundle_emb.x.clip_l": torch.ones(1, 64, dtype=kind)})
    refused(path, "so it is quantised")
    counts = {f"{NAME}.alpha": torch.tensor(2).to(kind), f"{NAME}.scalar": torch.tensor([1]).to(kind)}
    assert bound(write(path, pair(NAME) | counts), SD1).applied == 4


def test_a_checkpoint_is_drawn_with_otherwise(path: Path) -> None:
    write(path, {"model.diffusion_model.input_blocks.0.0.weight": normal(4, 4, 3, 3)})
    assert refused(path, "a whole checkpoint").fix.endswith(f"latentrt generate PROMPT -m {path}")
    write(path, {"<frame>": normal(2, 96)})
    assert "embedding:NAME" in refused(path, "is a textual inversion").fix


def test_a_dora_without_magnitudes_is_said(path: Path, logged: list[str]) -> None:
    noted = {"lora_adapter_metadata": json.dumps({"unet.use_dora": True, "unet.lora_alpha": 2})}
    write(path, pair(NAME), noted)
    assert bound(path, SD1).kinds == {"lora": 1}
    assert "it says that it is a DoRA, and has no magnitudes" in " ".join(read_adapter(path).notes())
    assert "says that it is a DoRA" in logged.pop()
    write(path, pair(NAME) | {f"{NAME}.dora_scale": normal(WIDTH, 1)}, noted)
    bound(path, SD1)
    assert not logged
    assert "magnitudes" not in " ".join(read_adapter(path).notes())


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({"clip_l": normal(2, 768), "clip_g": normal(2, 1280)}, "is a textual inversion"),
        ({"emb_params": normal(2, 768)}, "is a textual inversion"),
        ({"first_stage_model.encoder.conv_in.weight": normal(1, 1, 3, 3)}, "is an autoencoder alone"),
        ({"down_blocks.0.resnets.0.conv1.weight": normal(1, 1)}, "is a UNet alone"),
        ({"model.diffusion_model.input_blocks.0.0.weight": normal(4, 4, 3, 3)}, "is a whole checkpoint"),
        ({"x": normal(2)}, r"is no adapter that is known \(x\)"),
        ({"x.alpha": normal(1)}, r"is no adapter that is known \(x.alpha\)"),
        (pair(NAME) | {f"{NAME}.oft_R.weight": normal(2)}, "second form .oft_R"),
        ({"lllite_unet_input_blocks_4_1.depth1.0.weight": normal(2)}, "ControlNet-LLLite"),
        ({"lora_controlnet": normal(1), "input_blocks.0.0.up": normal(1)}, "control-LoRA"),
        ({f"{NAME}.lambda_layer": normal(1), f"{NAME}.alpha": normal(1)}, "T-LoRA"),
        (pair(NAME) | {"unet.x.lora_embedding_A": normal(1)}, "lora_embedding_A"),
        ({f"{NAME}.lokr_t1": normal(1), f"{NAME}.lokr_w1_a": normal(1, 1)}, "lokr_t1"),
        ({f"unet.{LAYER}.ia3_l": normal(1)}, "IA3 of PEFT's form"),
        ({f"unet.{LAYER}.boft_R": normal(1)}, "boft_R"),
        ({f"unet.{LAYER}.vera_lambda_b": normal(1)}, "VeRA"),
    ],
)
def test_kinds_that_cannot_be_used_are_named(tensors: Tensors, match: str, path: Path) -> None:
    refused(write(path, tensors), match)


# ── another base ──────────────────────────────────────────────────────────────────────────────────────────


CONTEXT = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
WIDTHS = {"sd1": 768, "sd2": 1024, "sdxl": 2048, "sdxl-refiner": 1280}
BASES = {
    "sd1": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sdxl": "SDXL",
    "sdxl-refiner": "the SDXL refiner",
}


@pytest.mark.parametrize("model", WIDTHS)
@pytest.mark.parametrize("made_for", WIDTHS)
@pytest.mark.parametrize("form", ["lora", "peft", "lokr"])
def test_t32_an_adapter_for_another_base(form: str, made_for: str, model: str, path: Path) -> None:
    width = WIDTHS[made_for]
    stored = {
        "lora": pair(f"lora_unet_{flat(CONTEXT)}", 64, width),
        "peft": {
            f"unet.{CONTEXT}.lora_A.weight": normal(2, width),
            f"unet.{CONTEXT}.lora_B.weight": normal(64, 2),
        },
        "lokr": {
            f"lora_unet_{flat(CONTEXT)}.lokr_w1": normal(8, 8),
            f"lora_unet_{flat(CONTEXT)}.lokr_w2": normal(8, width // 8),
        },
    }[form]
    write(path, stored)
    shapes = {"unet": {f"{CONTEXT}.weight": (64, WIDTHS[model])}}
    if made_for == model:
        assert bound(path, shapes).unused == ()
        return
    for allow_unused in (True, False):
        error = refused(path, f"is made for {BASES[made_for]}", shapes, allow_unused=allow_unused)
        assert f"attn2.to_k reads {width} numbers" in error.found
        assert f"{BASES[model]}, whose attn2.to_k reads {WIDTHS[model]}" in error.expected


def test_t32_on_models_of_unknown_width(path: Path) -> None:
    write(path, pair(f"lora_unet_{flat(CONTEXT)}", 32, 48))
    error = refused(path, "made for another model: its attn2.to_k reads 48")
    assert error.expected.startswith("an adapter for this model")


@pytest.mark.parametrize("on_input", [True, False])
def test_ia3s_factors_are_no_width(on_input: bool, path: Path) -> None:
    """They lie on cross-attention, one for each output in a column."""
    stored = {"weight": normal(1, 48) if on_input else normal(32, 1), "on_input": torch.tensor(on_input)}
    write(path, {f"lora_unet_{flat(CONTEXT)}.{part}": x for part, x in stored.items()})
    assert bound(path, {"unet": {f"{CONTEXT}.weight": (32, 48)}}).kinds == {"ia3": 1}


# ── keys without a tensor ─────────────────────────────────────────────────────────────────────────────────


def test_t6_t7_unknown_keys_are_named_with_the_nearest(path: Path) -> None:
    absent = NAME.replace("down_blocks_0", "down_blocks_7")
    write(path, pair(NAME) | pair(absent))
    error = refused(path, "2 of 4 keys that this model has no use for")
    for part in ("lora_up", "lora_down"):
        assert f"{absent}.{part}.weight (nearest: {NAME})" in error.found
    adapter = bound(path, SD1, allow_unused=True)
    assert sorted(adapter.unused) == sorted(pair(absent))
    assert (adapter.applied, adapter.total) == (2, 4)
    write(path, pair(f"lora_te_{TEXT.replace('0', '9')}", 96, 64))
    refused(path, "layers_9_mlp_fc1")
    refused(path, "changes nothing in this model", allow_unused=True)


def test_many_unknown_keys_are_counted(path: Path) -> None:
    stored = pair(NAME)
    for i in range(30):
        stored |= {f"lora_unet_x{i}.diff": normal(1)}
    error = refused(write(path, stored), "30 of 32 keys")
    assert error.found.count("lora_unet_x") == 20
    assert error.found.endswith("and 10 more")
    assert "--lora-lenient, or allow_unused=True in Python" in error.fix


def test_keys_of_no_grammar(path: Path) -> None:
    odd = {"x": normal(1), "." * 1000 + "alpha": normal(1), f"{NAME}.lora_left.weight": normal(1)}
    refused(write(path, pair(NAME) | odd), "3 of 5 keys")
    assert set(bound(path, SD1, allow_unused=True).unused) == set(odd)


def test_an_alpha_alone_and_whole_weights_are_no_change(path: Path) -> None:
    other = NAME.replace("to_q", "to_k")
    odd = {f"{other}.alpha": torch.tensor(1.0), f"unet.{LAYER}.base_layer.weight": normal(WIDTH, WIDTH)}
    error = refused(write(path, pair(NAME) | odd), "2 of 4 keys")
    assert f"{other}.alpha (alpha alone is no change)" in error.found
    assert f"{LAYER}.base_layer.weight (weight alone is no change)" in error.found
    adapter = bound(path, SD1, allow_unused=True)
    assert set(adapter.unused) == set(odd)
    assert adapter.kinds == {"lora": 1}


def test_a_bias_where_the_model_has_none(path: Path) -> None:
    write(path, pair(NAME) | {f"{NAME}.diff_b": normal(WIDTH)})
    refused(path, rf"1 of 3 keys .*{NAME}.diff_b \(it has no bias\)")
    adapter = bound(path, SD1, allow_unused=True)
    assert (adapter.unused, adapter.kinds) == ((f"{NAME}.diff_b",), {"lora": 1})


@pytest.mark.parametrize("form", ["lora", "lokr"])
def test_t12_parts_for_an_encoder_that_the_model_lacks(form: str, path: Path, logged: list[str]) -> None:
    unet = {"unet": SD1["unet"]}
    for prefix in ("lora_te1_", "lora_te2_", "text_encoder."):
        text = text_pair(prefix)
        if form == "lokr":
            text = {f"{prefix}{TEXT}.lokr_w1": normal(2, 2), f"{prefix}{TEXT}.lokr_w2": normal(48, 32)}
        write(path, pair(NAME) | text)
        adapter = bound(path, unet)
        assert set(adapter.unused) == set(text)
        assert adapter.changes.keys() == {"unet"}
        assert "2 of 4 keys have no use in this model" in logged[-1]
        write(path, text)
        refused(path, "changes only parts that this model lacks", unet)


@pytest.mark.parametrize("form", ["lora", "lokr"])
def test_t12_parts_for_clip_l_on_the_refiner(form: str, path: Path) -> None:
    """Which has the encoder of `lora_te2_` alone: the same layers of the other one are not taken for its."""
    refiner = targets("sdxl-refiner")
    tensor = "text_model.encoder.layers.0.mlp.fc1.weight"
    shape = refiner["text_encoder_2"][tensor]

    def parts(prefix: str) -> Tensors:
        if form == "lora":
            return pair(f"{prefix}{TEXT}", *shape)
        sizes = {"w1": (2, 2), "w2": (shape[0] // 2, shape[1] // 2)}
        return {f"{prefix}{TEXT}.lokr_{name}": normal(*size) for name, size in sizes.items()}

    first, second = parts("lora_te1_"), parts("lora_te2_")
    adapter = bound(write(path, first | second), refiner)
    assert set(adapter.unused) == set(first)
    assert {part: set(changes) for part, changes in adapter.changes.items()} == {"text_encoder_2": {tensor}}
    refused(write(path, first), "changes only parts that this model lacks", refiner)


# ── two changes of a tensor, and half of one ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        (pair(NAME) | pair(f"unet.{LAYER}"), "two changes of one tensor"),
        (pair(NAME) | {f"unet.{LAYER}.lora_A.weight": normal(2, WIDTH)}, "two changes of one tensor"),
        (pair(NAME) | {f"{NAME}.diff": normal(WIDTH, WIDTH)}, "one change of a tensor"),
        ({f"{NAME}.diff": normal(8, 8), f"{NAME}.w_norm": normal(8)}, "one change of a tensor"),
        ({f"{NAME}.lora_up.weight": normal(8, 2)}, "expected down too"),
        ({f"{NAME}.lora_down.weight": normal(2, 8), f"{NAME}.alpha": normal(1)}, "expected up too"),
        ({f"{NAME}.hada_w1_a": normal(8, 2)}, "hada_w1_b and hada_w2_a and hada_w2_b too"),
        ({f"{NAME}.lokr_w1": normal(8, 2)}, "has no lokr_w2, or half of it"),
        ({f"{NAME}.lokr_w1": normal(2, 2), f"{NAME}.lokr_w2_a": normal(2, 2)}, "has no lokr_w2, or half"),
        ({f"{NAME}.on_input": torch.tensor(1)}, "expected weight too"),
        ({f"{NAME}.a1.weight": normal(2, 2)}, "expected a2 and b1 and b2 too"),
        ({f"{NAME}.dora_scale": normal(2, 2)}, "expected what they belong to"),
        (pair(NAME) | {f"{NAME}.rescale": normal(2, 2)}, "no rescale here"),
        ({f"{NAME}.oft_blocks": normal(8, 4, 4), f"{NAME}.dora_scale": normal(WIDTH)}, "no dora_scale here"),
        (
            pair(NAME) | {f"{NAME}.dora_scale": normal(32), f"{NAME}.lora_magnitude_vector": normal(32)},
            "expected one magnitude",
        ),
        (
            {"lora_unet_conv_in.diff_b": normal(32), "lora_unet_conv_in.b_norm": normal(32)},
            "two differences of a bias",
        ),
        ({"lora_unet_conv_in.lora_B.bias": normal(32)}, "a bias without its factors"),
        (pair(NAME) | {f"{NAME}.alpha": normal(2)}, r"alpha of the shape \(2,\)"),
        (pair("lora_unet_conv_norm_out", 32, 1), "an input of the shape"),
    ],
)
def test_t57_parts_that_are_too_many_or_too_few(tensors: Tensors, match: str, path: Path) -> None:
    for allow_unused in (False, True):
        refused(write(path, tensors), match, allow_unused=allow_unused)


# ── shapes ────────────────────────────────────────────────────────────────────────────────────────────────


LINEAR, CONV = (8, 6), (8, 6, 3, 3)
UP, DOWN = {"lora_up.weight": (8, 2)}, {"lora_down.weight": (2, 6)}
HADA = {"hada_w1_a": (8, 1), "hada_w1_b": (1, 6), "hada_w2_a": (8, 1), "hada_w2_b": (1, 6)}
TUCKER = {"hada_w1_a": (2, 8), "hada_w1_b": (2, 6), "hada_w2_a": (2, 8), "hada_w2_b": (2, 6)}
GLORA = {"a1.weight": (6, 2), "a2.weight": (2, 6), "b1.weight": (8, 2), "b2.weight": (2, 6)}


@pytest.mark.parametrize(
    ("shape", "found", "match"),
    [
        (LINEAR, UP | {"lora_down.weight": (3, 6)}, r"\(8, 2\) and \(3, 6\)"),
        (LINEAR, DOWN | {"lora_up.weight": (7, 2)}, r"\(7, 2\) and"),
        (LINEAR, UP | {"lora_down.weight": (2, 5)}, r"an input of the shape \(5,\)"),
        (LINEAR, {"lora_up.weight": (8,), "lora_down.weight": (6,)}, r"a factor of the shape \(6,\)"),
        (LINEAR, {"lora_up.weight": (8, 0), "lora_down.weight": (0, 6)}, r"a factor of the shape \(0, 6\)"),
        (LINEAR, {"lora_up.weight": (8, 5000), "lora_down.weight": (5000, 6)}, "a rank of at most 4096"),
        (CONV, {"lora_up.weight": (8, 2, 1, 1), "lora_down.weight": (2, 6, 1, 1)}, "an input of"),
        (CONV, UP | {"lora_down.weight": (2, 9, 2, 3)}, "an input of"),
        (CONV, UP | DOWN | {"lora_mid.weight": (2, 3, 3, 3)}, "has a core"),
        ((8, 5, 3, 3), UP | {"lora_down.weight": (2, 4, 3, 3)}, "an input of"),
        ((8,), UP | {"lora_down.weight": (2, 1)}, "an input of"),
        (LINEAR, {"diff": (6, 8)}, "a difference of the shape"),
        (LINEAR, {"set_weight": (6, 8)}, "a weight of the shape"),
        (LINEAR, {"weight": (7,), "on_input": ()}, "scales 7 inputs"),
        (LINEAR, {"oft_blocks": (3, 3, 3)}, "has blocks of the shape"),
        (LINEAR, {"oft_blocks": (2, 4, 2)}, "has blocks of the shape"),
        (LINEAR, {"oft_blocks": (2, 4)}, "has blocks of the shape"),
        (LINEAR, {"oft_diag": (1, 2, 4, 4)}, "has blocks of the shape"),
        ((12, 6), {"oft_blocks": (2, 4, 3, 3)}, "has blocks of the shape"),
        ((12, 6), {"oft_blocks": (3, 3, 4, 4)}, "has blocks of the shape"),
        (LINEAR, {"oft_blocks": (2, 4, 4), "rescale": (6, 1)}, "rescales with the shape"),
        (LINEAR, {"lokr_w1": (2, 2), "lokr_w2": (4, 4)}, "the Kronecker product of"),
        (LINEAR, {"lokr_w1": (2, 4), "lokr_w2": (4, 1)}, "the Kronecker product of"),
        (LINEAR, {"lokr_w1": (2, 0), "lokr_w2": (4, 1)}, "the Kronecker product of"),
        ((8,), {"lokr_w1": (2, 1), "lokr_w2": (4, 1)}, "the Kronecker product of"),
        (LINEAR, {"lokr_w1": (2,), "lokr_w2": (4, 3)}, "lokr_w1 of the shape"),
        (LINEAR, {"lokr_w1": (2, 2), "lokr_w2": (4, 3), "lokr_w2_a": (4, 1)}, "whole and in factors"),
        (LINEAR, {"lokr_w1": (2, 2), "lokr_w2_a": (4, 1), "lokr_w2_b": (2, 3)}, "factors of one rank"),
        (LINEAR, HADA | {"hada_w2_a": (7, 1)}, "hada_w2_a"),
        (CONV, TUCKER | {"hada_t1": (2, 2, 3, 3)}, "one of hada_t1 and hada_t2"),
        (LINEAR, GLORA | {"b2.weight": (2, 5)}, "an input of"),
        (LINEAR, GLORA | {"a2.weight": (3, 6)}, "factors of"),
        (LINEAR, GLORA | {"a1.weight": (6,)}, "factors of"),
        (
            (8, 9, 3, 3),
            GLORA | {"a1.weight": (9, 2), "a2.weight": (2, 9), "b2.weight": (2, 4, 3, 3)},
            "expected 9 inputs",
        ),
        (LINEAR, UP | DOWN | {"dora_scale": (7,)}, "a magnitude of"),
        (LINEAR, UP | DOWN | {"dora_scale": (6,)}, "a magnitude of"),
        (LINEAR, UP | DOWN | {"lora_magnitude_vector": (1, 6)}, "a magnitude of"),
    ],
)
def test_t57_shapes_that_do_not_fit(
    shape: tuple[int, ...], found: dict[str, tuple[int, ...]], match: str, path: Path
) -> None:
    write(path, {f"lora_unet_conv_in.{part}": torch.ones(size) for part, size in found.items()})
    error = refused(path, match, {"unet": {"conv_in.weight": shape}}, allow_unused=True)
    assert "lora_unet_conv_in" in error.found
    assert f"for unet: conv_in.weight of the shape {shape}" in error.expected


def test_two_sizes_of_a_first_convolution(path: Path) -> None:
    stored = {"hada_w1_a": (8, 1), "hada_w1_b": (1, 4, 3, 3), "hada_w2_a": (8, 1), "hada_w2_b": (1, 9, 3, 3)}
    write(path, {f"lora_unet_conv_in.{part}": torch.ones(size) for part, size in stored.items()})
    refused(path, "inputs of two sizes", {"unet": {"conv_in.weight": (8, 9, 3, 3)}})


def test_a_module_whose_weight_is_none(path: Path) -> None:
    write(path, pair("lora_unet_x"))
    refused(path, "changes a weight that is none", {"unet": {"x.bias": (8,)}})


def test_the_base_of_a_misfit_is_named(path: Path) -> None:
    stored = pair("lora_te_text_model_encoder_layers_0_self_attn_q_proj", 768, 768)
    refused(write(path, stored), r"\(the file is made for Stable Diffusion 1.x\)")
