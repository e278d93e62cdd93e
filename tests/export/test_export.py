import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from latentrt.checkpoints import writing
from latentrt.engines.errors import CheckpointError, NumericError, StorageError, UsageError
from latentrt.engines.package import Defaults, Package
from latentrt.export import export_package
from latentrt.export.nets.build import NETS
from latentrt.export.target import complete
from latentrt.export.traced import TracedGraphs
from tests.export.conftest import Exported, relative_l2

BARS = {"fp32": 1e-5, "fp16": 5e-3}
both = pytest.mark.parametrize("which", ["sd1", "sd2"])


@pytest.fixture
def exported(which: str, request: pytest.FixtureRequest) -> Exported:
    return request.getfixturevalue(which)


def graphs(exported: Exported) -> dict[str, onnx.ModelProto]:
    package = exported.package
    return {
        name: onnx.load(package.path(net.graph), load_external_data=False)
        for name, net in package.manifest.nets.items()
    }


@both
def test_every_graph_passes_onnxs_checker(exported: Exported) -> None:
    for net in exported.package.manifest.nets.values():
        onnx.checker.check_model(str(exported.package.path(net.graph)), full_check=True)


@both
def test_every_weight_is_stored_once_under_its_own_name(exported: Exported) -> None:
    package = exported.package
    parts = {
        "text_encoder": "text_encoder",
        "unet": "unet_whole",
        "vae_encoder": "vae_encoder",
        "vae_decoder": "vae_decoder",
    }
    source = exported.checkpoint
    halves: list[set[str]] = []
    for folder, net in parts.items():
        with safe_open(package.root / folder / "weights.safetensors", framework="np") as stream:
            stored = set(stream.keys())
        graph = onnx.load(package.path(package.manifest.nets[net].graph), load_external_data=False).graph
        external = {
            item.name for item in graph.initializer if item.data_location == onnx.TensorProto.EXTERNAL
        }
        assert external == stored
        used = {name for node in graph.node for name in node.input}
        assert stored <= used
        if folder.startswith("vae"):
            halves.append(stored)
        else:
            # A package has the names of published checkpoints, whoever wrote this one.
            prefix = "text_model." if folder == "text_encoder" else ""
            assert stored == {
                prefix + name.removeprefix("text_model.") for name in source.parts[folder].tensors
            }
    assert halves[0].isdisjoint(halves[1])
    assert halves[0] | halves[1] == set(source.vae.tensors)


@both
def test_what_stays_in_the_graphs_is_small(exported: Exported) -> None:
    for name, model in graphs(exported).items():
        inline = [item for item in model.graph.initializer if item.data_location != onnx.TensorProto.EXTERNAL]
        assert all(item.ByteSize() < 1024 for item in inline), name
        assert model.ByteSize() < 400_000


def test_weights_keep_the_narrower_type(sd1: Exported, sd2: Exported) -> None:
    # fp32 arithmetic on an fp16 checkpoint, and fp16 arithmetic on an fp32 one: both store fp16.
    for exported in (sd1, sd2):
        for path in exported.package.root.glob("*/weights.safetensors"):
            with safe_open(path, framework="np") as stream:
                assert {stream.get_slice(name).get_dtype() for name in stream.keys()} == {"F16"}  # noqa: SIM118


@both
def test_boundaries_are_the_contracts(exported: Exported) -> None:
    kinds = {1: "float32", 2: "uint8", 6: "int32", 10: "float16"}
    for name, model in graphs(exported).items():
        spec = exported.package.manifest.nets[name].spec
        for found, wanted in ((model.graph.input, spec.inputs), (model.graph.output, spec.outputs)):
            described = [
                (
                    item.name,
                    kinds[item.type.tensor_type.elem_type],
                    tuple(dim.dim_param or dim.dim_value for dim in item.type.tensor_type.shape.dim),
                )
                for item in found
            ]
            assert described == [(item.name, item.dtype, item.shape) for item in wanted]


def test_fused_operators_are_native(sd1: Exported) -> None:
    counts = {name: Counter(node.op_type for node in model.graph.node) for name, model in graphs(sd1).items()}
    # One down, one middle and two up transformer blocks: self- and cross-attention, three norms each.
    assert counts["unet_whole"]["Attention"] == counts["unet"]["Attention"] == 8
    assert counts["unet"]["LayerNormalization"] == 12
    # Two in each of 8 ResNet blocks, one in each transformer, one at the end.
    assert counts["unet"]["GroupNormalization"] == 2 * 8 + 4 + 1
    assert counts["text_encoder"]["Attention"] == 2
    assert counts["text_encoder"]["LayerNormalization"] == 5
    assert counts["vae_decoder"]["Attention"] == counts["vae_encoder"]["Attention"] == 1
    assert not {"SplitToSequence", "SequenceAt", "Expand", "Identity", "Constant"} & set().union(
        *counts.values()
    )
    assert all(model.opset_import[0].version == 23 for model in graphs(sd1).values())


def test_the_text_encoder_is_causal_by_attribute(sd1: Exported) -> None:
    attention = [node for node in graphs(sd1)["text_encoder"].graph.node if node.op_type == "Attention"]
    for node in attention:
        assert len([name for name in node.input if name]) == 3
        assert {item.name: item.i for item in node.attribute}["is_causal"] == 1


def test_upcast_attention_is_written_out(sd2: Exported) -> None:
    for name in ("unet", "unet_whole"):
        counts = Counter(node.op_type for node in graphs(sd2)[name].graph.node)
        assert counts["Attention"] == 0
        assert counts["Softmax"] == 2 * 7
    scores = [name for name in sd2.package.manifest.nets["unet"].fp32_islands if name.endswith("/scores")]
    assert len(scores) == 2 * 7
    assert scores[0] == "down_blocks.0.attentions.0.transformer_blocks.0.attn1/Attention/scores"


def test_the_sinusoid_stays_in_float32(sd1: Exported, sd2: Exported) -> None:
    islands = sd2.package.manifest.nets["unet_time"].fp32_islands
    assert {"time_proj/Sin", "time_proj/Cos"} <= set(islands)
    assert all(name.startswith("time_proj/") for name in islands)
    assert not any(net.fp32_islands for net in sd1.package.manifest.nets.values())
    # In fp16, 999 and 999.4 are the same number.
    one, other = (sd2.run("unet_time", timestep=np.array([time], np.float32)) for time in (999.0, 999.4))
    assert any(not np.array_equal(one[name], other[name]) for name in one)


@both
@pytest.mark.parametrize(
    ("rows", "height", "width", "tokens"), [(1, 8, 8, 77), (3, 9, 14, 154), (2, 4, 3, 77)]
)
def test_the_unet_at_sizes_that_were_not_traced(
    exported: Exported, rows: int, height: int, width: int, tokens: int
) -> None:
    manifest = exported.package.manifest
    dtype = np.float16 if manifest.dtype == "fp16" else np.float32
    random = np.random.default_rng(0)
    sample = random.standard_normal((rows, 4, height, width)).astype(dtype)
    context = random.standard_normal((rows, tokens, manifest.context_width)).astype(dtype)
    timestep = np.array([999.0, 20.0, 500.0][:rows], np.float32)
    reference = NETS["unet"].build(exported.checkpoint, torch.float32).module
    with torch.no_grad():
        wanted = reference(*(torch.from_numpy(item).float() for item in (sample, timestep, context)))
    found = exported.run("unet_whole", sample=sample, timestep=timestep, encoder_hidden_states=context)
    assert relative_l2(found["out_sample"], wanted) < BARS[manifest.dtype]


@both
@pytest.mark.parametrize("prompts", [1, 5])
def test_the_text_encoder(exported: Exported, prompts: int) -> None:
    ids = np.random.default_rng(0).integers(0, 300, (prompts, 77)).astype(np.int32)
    with torch.no_grad():
        no = np.zeros(1, np.int32)
    with torch.no_grad():
        wanted = (
            NETS["text_encoder"]
            .build(exported.checkpoint, torch.float32)
            .module(torch.from_numpy(ids), torch.from_numpy(no))
        )
    found = exported.run("text_encoder", input_ids=ids, clip_skip=no)["context"]
    assert relative_l2(found, wanted) < BARS[exported.package.manifest.dtype]
    # Causal: a later token changes no earlier row.
    ids[:, 40] = 7
    again = exported.run("text_encoder", input_ids=ids, clip_skip=no)["context"]
    assert np.array_equal(again[:, :40], found[:, :40])
    assert not np.array_equal(again[:, 40:], found[:, 40:])


@both
@pytest.mark.parametrize("size", [(1, 8, 8), (3, 5, 7)])
def test_the_decoder(exported: Exported, size: tuple[int, int, int]) -> None:
    manifest = exported.package.manifest
    dtype = np.float16 if manifest.dtype == "fp16" else np.float32
    rows, height, width = size
    latent = np.random.default_rng(0).standard_normal((rows, 4, height, width)).astype(dtype)
    with torch.no_grad():
        image, mean = (
            NETS["vae_decoder"]
            .build(exported.checkpoint, torch.float32)
            .module(torch.from_numpy(latent).float())
        )
    found = exported.run("vae_decoder", latent=latent)
    scale = manifest.latent_scale
    assert found["image"].shape == (rows, height * scale, width * scale, 3)
    assert np.abs(found["image"].astype(int) - image.numpy()).max() <= (1 if manifest.dtype == "fp32" else 3)
    assert np.allclose(found["mean"], mean, atol=1e-2 if manifest.dtype == "fp16" else 1e-5)


@both
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_value_shows_in_the_mean(exported: Exported, bad: float) -> None:
    dtype = np.float16 if exported.package.manifest.dtype == "fp16" else np.float32
    latent = np.zeros((2, 4, 6, 6), dtype)
    latent[1, 2, 3, 3] = bad
    mean = exported.run("vae_decoder", latent=latent)["mean"]
    assert np.isfinite(mean[0])
    assert not np.isfinite(mean[1])


def test_the_manifest(sd1: Exported, sd2: Exported) -> None:
    one, two = sd1.package.manifest, sd2.package.manifest
    assert (one.name, one.family, one.dtype, one.latent_scale) == ("checkpoint", "sd1", "fp32", 2)
    assert (two.name, two.family, two.dtype, two.latent_scale) == ("tiny2", "sd2", "fp16", 4)
    assert one.defaults == Defaults(height=16, width=16)
    assert two.defaults == Defaults(height=48, width=32)
    assert two.scheduler["prediction_type"] == "v_prediction"
    assert (one.latent_channels, one.context_width, one.max_tokens) == (4, 80, 77)
    assert "torch 2." in two.producer
    sd1.package.verify()
    assert sorted(path.name for path in (sd1.package.root / "tokenizer").iterdir()) == [
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer_config.json",
        "vocab.json",
    ]


def test_a_package_holds_files_only(sd1: Exported) -> None:
    for path in sd1.package.root.rglob("*"):
        assert not path.is_symlink()
        assert path.is_dir() or path.stat().st_nlink == 1


def test_progress_names_every_stage(sd2: Exported) -> None:
    stages = [(item.stage, item.index, item.total) for item in sd2.progress]
    parts = ("text_encoder", "vae_encoder", "unet", "vae_decoder")
    checks = [f"check {part}" for part in parts]
    names = [f"{verb} {part}" for part in parts for verb in ("make", "measure", "verify")]
    assert stages == [(name, index, 17) for index, name in enumerate([*checks, *names, "package"])]


# From here on nothing is traced: the nets of `sd1` stand in.


@pytest.fixture
def instant(sd1: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    def copied(name: str, folder: Path, *_: Any, **__: Any) -> dict[str, Any]:
        shutil.copytree(sd1.package.root / name, folder / name, dirs_exist_ok=True)
        return {
            key: net for key, net in sd1.package.manifest.nets.items() if net.graph.startswith(name + "/")
        }

    monkeypatch.setattr(TracedGraphs, "graph", lambda *_: (None, None))
    monkeypatch.setattr(writing.CopiedWeights, "attach", lambda *_: [])
    monkeypatch.setattr(writing, "write_graphs", copied)


def write(checkpoint: Path, package: Path, **options: Any) -> Package:
    return export_package(checkpoint, package, **{"dtype": "fp32", "verify": False, **options})


@pytest.mark.usefixtures("instant")
def test_recommended_values_become_defaults(copy: Path, tmp_path: Path) -> None:
    recommended = {"num_inference_steps": 20, "height": 128, "sampler": "ddim", "guidance_scale": 3.5}
    (copy / "recommended.json").write_text(json.dumps(recommended))
    found = write(copy, tmp_path / "package").manifest.defaults
    assert found == Defaults(num_inference_steps=20, height=128, width=16, sampler="ddim", guidance_scale=3.5)


@pytest.mark.usefixtures("instant")
@pytest.mark.parametrize("text", ["{", "[1]", '{"steps": 20}'])
def test_damaged_recommendations(copy: Path, tmp_path: Path, text: str) -> None:
    (copy / "recommended.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"recommended\.json is damaged"):
        write(copy, tmp_path / "package")


@pytest.mark.usefixtures("instant")
def test_linked_checkpoints_become_real_files(checkpoint: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for path in checkpoint.rglob("*"):
        if path.is_file():
            link = cache / path.relative_to(checkpoint)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    package = write(cache, tmp_path / "package")
    assert not [path for path in package.root.rglob("*") if path.is_symlink()]


@pytest.mark.usefixtures("instant")
def test_a_tokenizer_without_its_files(copy: Path, tmp_path: Path) -> None:
    (copy / "tokenizer" / "merges.txt").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json, or vocab\.json and merges\.txt"):
        write(copy, tmp_path / "package")
    (copy / "tokenizer" / "tokenizer.json").write_text("{}")
    assert write(copy, tmp_path / "package").path("tokenizer/tokenizer.json").is_file()


@pytest.mark.usefixtures("instant")
def test_an_empty_folder_is_a_good_place(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    assert write(checkpoint, tmp_path / "package").manifest.family == "sd1"


def test_an_unknown_dtype(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="dtype is 'int8'"):
        write(checkpoint, tmp_path / "package", dtype="int8")


def test_a_folder_that_is_no_package_is_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="exists and is no package"):
        write(checkpoint, tmp_path / "package", overwrite=True)
    assert (tmp_path / "package" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_during_an_export_is_left_alone(tmp_path: Path, overwrite: bool) -> None:
    target = tmp_path / "package"

    def export() -> None:
        with complete(target, overwrite=overwrite):
            target.mkdir()
            (target / "thesis.txt").write_text("years of work")

    with pytest.raises(UsageError, match="exists and is no package"):
        export()
    assert os.listdir(tmp_path) == ["package"]
    assert (target / "thesis.txt").read_text() == "years of work"


@pytest.mark.usefixtures("instant")
def test_a_package_is_replaced_only_when_asked(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "package"
    write(checkpoint, target)
    (target / "old.txt").write_text("old")
    with pytest.raises(UsageError, match="is a package already"):
        write(checkpoint, target)
    write(checkpoint, target, overwrite=True)
    assert not (target / "old.txt").exists()
    assert sorted(os.listdir(tmp_path)) == ["package"]


@pytest.mark.parametrize("error", [NumericError("a", expected="b", fix="c"), KeyboardInterrupt()])
def test_a_failed_export_leaves_nothing_and_changes_nothing(
    checkpoint: Path, tmp_path: Path, sd1: Exported, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: Any) -> Any:
        raise error

    target = tmp_path / "package"
    shutil.copytree(sd1.package.root, target)
    monkeypatch.setattr(TracedGraphs, "graph", fail)
    with pytest.raises(type(error)):
        write(checkpoint, target, overwrite=True)
    assert os.listdir(tmp_path) == ["package"]
    Package.open(target).verify()


def under_a_prefix(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}


def with_a_nan(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {"conv_out.bias": torch.full_like(tensors["conv_out.bias"], torch.nan)}


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("unet", under_a_prefix, "do not fit its config.json"),  # what torch.compile names them
        ("unet", with_a_nan, "NaN or infinite"),
        ("vae", under_a_prefix, "do not fit its config.json"),
    ],
)
def test_weights_are_checked_before_anything_is_traced(
    part: str, change: Any, words: str, copy: Path, tmp_path: Path
) -> None:
    """The minutes that tracing takes are not spent on a checkpoint that will be refused."""
    path = copy / part / "diffusion_pytorch_model.safetensors"
    changed = change(load_file(path))
    path.unlink()
    save_file(changed, path)
    stages: list[str] = []
    with pytest.raises(CheckpointError, match=words):
        export_package(
            copy, tmp_path / "package", dtype="fp32", progress=lambda found: stages.append(found.stage)
        )
    assert {stage.split()[0] for stage in stages} == {"check"}


def test_a_full_disk(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TracedGraphs, "graph", fail)
    with pytest.raises(StorageError, match="No space left"):
        write(checkpoint, tmp_path / "package")
    assert not os.listdir(tmp_path)


def test_a_place_that_cannot_be(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        write(checkpoint, tmp_path / "file" / "package")
