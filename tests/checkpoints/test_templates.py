"""Templates of a tiny architecture: made, found for what diffusers wrote, refused for others, exported."""

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from latentrt.benchmarks.models.recipes import Recipe
from latentrt.checkpoints.files.component import Component
from latentrt.checkpoints.files.open import Checkpoint
from latentrt.checkpoints.graphs import weights
from latentrt.checkpoints.manifest import published_latent_rgb
from latentrt.checkpoints.templates import archive as archives
from latentrt.checkpoints.templates.find import net_template
from latentrt.checkpoints.templates.keys import INERT
from latentrt.engines.errors import BackendError, CheckpointError, PackageError
from latentrt.engines.installed import install_command
from latentrt.engines.package import Package
from latentrt.export import export_package, templates
from latentrt.export.architectures import Architecture
from latentrt.export.graphs import passes
from latentrt.export.graphs.to_onnx import to_onnx
from latentrt.export.nets.build import NETS
from latentrt.export.templates import blank_checkpoint, make_archive
from latentrt.export.traced import trace
from latentrt.export.verify import Comparison
from tests.parity_pair import exported
from tests.recipes import PROCESSOR, RECIPES, TINY_VAE, UnclipRecipe, make_checkpoint, make_tiny_vae

SMALL = RECIPES["turbo-tiny"]
TINY_CONFIG = {"_class_name": "AutoencoderTiny", **TINY_VAE}


def architecture_of(recipe: Recipe) -> Architecture:
    parts = {"unet": recipe.unet, "vae": recipe.vae, "tiny_vae": TINY_CONFIG}
    parts |= {"text_encoder": recipe.text} if recipe.text else {}
    parts |= {"text_encoder_2": recipe.text_2} if recipe.text_2 else {}
    if isinstance(recipe, UnclipRecipe):
        width = recipe.vision["projection_dim"]
        parts |= {"image_encoder": recipe.vision, "image_normalizer": {"embedding_dim": width}}
    return Architecture(parts=parts, feature_extractor=PROCESSOR)


ARCHITECTURE = architecture_of(SMALL)
COMPONENTS = ("text_encoder", "vae_encoder", "unet", "vae_decoder", "preview_decoder")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("templates") / "templates.zip"
    lines: list[str] = []
    make_archive(path, {"small": ARCHITECTURE}, dtypes=["fp32"], progress=lines.append)
    assert lines[-1] == "5 of 5: preview_decoder of small"
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A folder whose parts diffusers and transformers wrote."""
    root = make_checkpoint(SMALL, tmp_path_factory.mktemp("source") / "small", dtype=torch.float32)
    UNet2DConditionModel(**SMALL.unet).save_pretrained(root / "unet")
    AutoencoderKL(**SMALL.vae).save_pretrained(root / "vae")
    CLIPTextModel(CLIPTextConfig(**SMALL.text or {})).save_pretrained(root / "text_encoder")
    return Checkpoint.open(root, tiny_vae=make_tiny_vae(root / "tiny"))


def changed(source: Checkpoint, name: str, **config: Any) -> Checkpoint:
    """The same checkpoint with other values in a part's config."""
    part = source.parts[name]
    return replace(source, parts={**source.parts, name: replace(part, config={**part.config, **config})})


def with_tensors(source: Checkpoint, name: str, change: Callable[[dict[str, Any]], object]) -> Checkpoint:
    part: Component = source.parts[name]
    tensors = dict(part.tensors)
    change(tensors)
    return replace(source, parts={**source.parts, name: replace(part, tensors=tensors)})


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(templates, "make_archive", lambda path, **options: calls.append((path, options)))
    templates.main(["-o", str(tmp_path / "new.zip"), "--processes", "2"])
    templates.main([])
    assert [path for path, _ in calls] == [tmp_path / "new.zip", archives.SHIPPED]
    assert [options["processes"] for _, options in calls] == [2, 1]


@pytest.mark.parametrize("component", COMPONENTS)
def test_what_the_libraries_write_has_its_template(source: Checkpoint, archive: Path, component: str) -> None:
    found = net_template(source, component, "fp32", archive=archive)
    assert found.architecture == "small"
    values = (*found.model.graph.inputs, *found.model.graph.outputs)
    for value, item in zip(values, (*found.spec.inputs, *found.spec.outputs), strict=True):
        assert value.shape is not None
        assert value.dtype is not None
        shape = [dim if isinstance(dim, int) else dim.value for dim in value.shape]
        assert (value.name, value.dtype.numpy(), shape) == (item.name, item.dtype, list(item.shape))
    bare = [value for value in found.model.graph.initializers.values() if weights.is_weight(value)]
    assert bare
    for value in bare:
        assert isinstance(value.const_value, ir.ExternalTensor)
        assert value.const_value.location == ""


@pytest.mark.parametrize(
    ("part", "config"),
    [
        ("unet", {"sample_size": 99, "dropout": 0.1, "upcast_attention": None, "_diffusers_version": "0.6"}),
        ("unet", {"attention_head_dim": [2], "only_cross_attention": (False,), "layers_per_block": [1]}),
        ("unet", {"norm_eps": 0.00001, "mid_block_scale_factor": 1.0, "transformer_layers_per_block": [1]}),
        ("unet", {"class_embeddings_concat": None, "attention_type": None, "a key of nobody": 1}),
        ("vae", {"sample_size": 1, "shift_factor": 0.0, "force_upcast": False, "_name_or_path": "somewhere"}),
        ("text_encoder", {"projection_dim": 7, "torch_dtype": "float16", "eos_token_id": 2}),
    ],
)
def test_configs_that_say_the_same_have_the_same_template(
    source: Checkpoint, archive: Path, part: str, config: Mapping[str, Any]
) -> None:
    component = "vae_decoder" if part == "vae" else part
    wanted = net_template(source, component, "fp32", archive=archive).digest
    assert net_template(changed(source, part, **config), component, "fp32", archive=archive).digest == wanted


def test_a_silent_config_means_the_default(source: Checkpoint, archive: Path) -> None:
    part = source.parts["unet"]
    told = {name: part.config[name] for name in SMALL.unet if name not in ("in_channels", "out_channels")}
    silent = replace(source, parts={**source.parts, "unet": replace(part, config=told)})
    assert net_template(silent, "unet", "fp32", archive=archive).architecture == "small"


@pytest.mark.parametrize(
    ("part", "config", "words"),
    [
        ("unet", {"norm_num_groups": 4}, "norm_num_groups is 4, in the nearest (small) 8"),
        ("unet", {"attention_head_dim": 4}, "attention_head_dim is 4, in the nearest (small) 2"),
        ("unet", {"flip_sin_to_cos": False}, "flip_sin_to_cos is False, in the nearest (small) True"),
        ("unet", {"in_channels": 9}, "in_channels is 9"),
        ("unet", {"time_cond_proj_dim": 8}, "vectors is {'timestep_cond': 8}, in the nearest (small) {}"),
        ("vae", {"scaling_factor": 0.13025}, "scaling_factor is 0.13025, in the nearest (small) 0.18215"),
        ("vae", {"latents_mean": [0, 0, 0, 1]}, "latents_mean is [0, 0, 0, 1], in the nearest (small) None"),
        ("vae", {"_class_name": "AutoencoderTiny"}, "class is 'AutoencoderTiny'"),
        ("text_encoder", {"hidden_act": "gelu"}, "hidden_act is 'gelu', in the nearest (small) 'quick_gelu'"),
        ("text_encoder", {"num_attention_heads": 4}, "num_attention_heads is 4, in the nearest (small) 2"),
    ],
)
def test_what_changes_the_graph_is_refused(
    source: Checkpoint, archive: Path, part: str, config: Mapping[str, Any], words: str
) -> None:
    component = "vae_encoder" if part == "vae" else part
    with pytest.raises(CheckpointError) as caught:
        net_template(changed(source, part, **config), component, "fp32", archive=archive)
    assert words in caught.value.found
    assert str(source.parts[part].folder) in caught.value.found
    assert f"({part})" in caught.value.found
    assert f"latentrt export {source.root} -o PACKAGE" in caught.value.fix
    assert install_command("cpu,export") in caught.value.fix


def test_a_net_that_no_template_is_of_is_refused(source: Checkpoint, tmp_path: Path) -> None:
    archives.write_archive(tmp_path / "none.zip", [], defaults={"UNet2DConditionModel": {}}, producer="")
    with pytest.raises(CheckpointError, match="there is none of a unet"):
        net_template(source, "unet", "fp32", archive=tmp_path / "none.zip")


NAME = "conv_in.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop(NAME), f"the tensor '{NAME}' of shape (32, 4, 3, 3) is missing"),
        (lambda tensors: tensors.update(more=tensors[NAME]), "the tensor 'more' is not in the nearest"),
        (
            lambda tensors: tensors.update({NAME: replace(tensors[NAME], shape=(16, 4, 3, 3))}),
            f"the tensor '{NAME}' has the shape (16, 4, 3, 3), in the nearest (small) (32, 4, 3, 3)",
        ),
    ],
)
def test_tensors_decide_too(
    source: Checkpoint, archive: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    odd = with_tensors(source, "unet", change)
    with pytest.raises(CheckpointError) as caught:
        net_template(odd, "unet", "fp32", archive=archive)
    assert words in caught.value.found


def test_tensors_that_no_net_reads_do_not_count(source: Checkpoint, archive: Path) -> None:
    """Buffers and the projection in old text encoders, and names without or with their prefix."""

    def change(tensors: dict[str, Any]) -> None:
        header = next(iter(tensors.values()))
        for name in ("text_model.embeddings.position_ids", "text_projection.weight", "logit_scale"):
            tensors[name] = header
        first = next(name for name in tensors if "layers.0" in name)
        tensors[first.removeprefix("text_model.")] = tensors.pop(first)

    odd = with_tensors(source, "text_encoder", change)
    assert net_template(odd, "text_encoder", "fp32", archive=archive).architecture == "small"


def _with_index(archive: Path, path: Path, content: str) -> Path:
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, content if name == "index.json" else old.read(name))
    return path


def test_an_archive_of_another_schema_is_refused(source: Checkpoint, archive: Path, tmp_path: Path) -> None:
    old = _with_index(archive, tmp_path / "old.zip", json.dumps({"schema": 0, "templates": []}))
    with pytest.raises(PackageError, match="has templates of schema 0; expected schema 1") as caught:
        net_template(source, "unet", "fp32", archive=old)
    assert "python -m latentrt.export.templates" in caught.value.fix


@pytest.mark.parametrize("damage", ["missing", "no zip", "no index", "no JSON", "a list", "bytes"])
def test_a_damaged_archive_is_refused(source: Checkpoint, archive: Path, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "damaged.zip"
    content = {"no index": None, "no JSON": "{", "a list": "[]"}.get(damage)
    if content is not None:
        _with_index(archive, path, content)
    elif damage == "no index":
        zipfile.ZipFile(path, "w").close()
    elif damage == "no zip":
        path.write_bytes(b"no zip")
    elif damage == "bytes":
        whole = bytearray(archive.read_bytes())
        whole[1000:-4000] = bytes(len(whole) - 5000)
        path.write_bytes(whole)
    with pytest.raises(PackageError, match=r"damaged\.zip cannot be read"):
        net_template(source, "unet", "fp32", archive=path)


def _file(model: ir.Model) -> bytes:
    """As packages store a graph."""
    weights.forget_shapes(model)
    proto: Any = ir.to_proto(model)
    return proto.SerializeToString(deterministic=True)


def assert_same_package(found: Package, wanted: Package) -> None:
    """The same files, to the byte; manifests differ in who made them and in the colours of previews."""
    names = found.manifest.files.keys()
    assert names == wanted.manifest.files.keys()
    assert [name for name in names if found.path(name).read_bytes() != wanted.path(name).read_bytes()] == []
    differing = {"producer", "latent_rgb"}
    told, expected = (vars(package.manifest) for package in (found, wanted))
    assert {name for name in told if told[name] != expected[name]} == differing
    assert found.manifest.latent_rgb == published_latent_rgb(
        Checkpoint.open(wanted.root.parent / "checkpoint")
    )
    assert "torch" in wanted.manifest.producer
    assert "torch" not in found.manifest.producer


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Package:
    """The package that torch traces of a checkpoint, beside it."""
    folder = exported(tmp_path_factory, "turbo-tiny")
    return export_package(
        folder / "checkpoint", folder / "traced", dtype="fp32", verify=False, templates=None
    )


def test_an_export_through_templates_is_the_traced_one(
    archive: Path, traced: Package, tmp_path: Path
) -> None:
    """And is compared with torch as that is."""
    lines: list[str] = []
    compared: list[Comparison] = []
    package = export_package(
        traced.root.parent / "checkpoint",
        tmp_path / "package",
        dtype="fp32",
        templates=archive,
        note=lines.append,
        report=compared.append,
    )
    assert_same_package(package, traced)
    assert lines == []
    assert {item.net for item in compared} >= {"text_encoder", "vae_encoder", "unet", "vae_decoder"}


LEAN = """
import sys
for name in ("torch", "diffusers", "transformers", "onnxscript", "safetensors"):
    sys.modules[name] = None  # an import of it raises ImportError
from pathlib import Path
from latentrt.checkpoints.templates import archive
from latentrt.cli import main
archive.SHIPPED = Path(sys.argv.pop(1))
main()
"""


def lean_export(
    archive: Path, checkpoint: Path, package: Path, *flags: str
) -> subprocess.CompletedProcess[str]:
    """`latentrt export` where none of the libraries of tracing can be imported."""
    options = ["export", str(checkpoint), "-o", str(package), *flags]
    command = [sys.executable, "-W", "error", "-c", LEAN, str(archive), *options]
    return subprocess.run(command, check=False, timeout=300, capture_output=True, text=True)


def test_the_command_exports_without_torch(archive: Path, traced: Package, tmp_path: Path) -> None:
    run = lean_export(archive, traced.root.parent / "checkpoint", tmp_path / "package", "--dtype", "fp32")
    assert run.returncode == 0, run.stderr
    assert str(tmp_path / "package") in run.stdout
    assert_same_package(Package.open(tmp_path / "package"), traced)


def test_the_command_says_what_fits_no_template_and_what_to_install(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    folder = exported(tmp_path_factory, "turbo-tiny")
    run = lean_export(archives.SHIPPED, folder / "checkpoint", tmp_path / "package", "--dtype", "fp32")
    assert run.returncode == BackendError.exit_code
    told = " ".join(run.stderr.split())
    assert "fits no graph that is shipped: " in told
    assert "Tracing it needs torch, diffusers, transformers, onnxscript" in told
    assert not (tmp_path / "package").exists()


@pytest.mark.parametrize(
    ("missing", "options", "words"),
    [
        ("torch", {"templates": None}, "tracing needs torch"),
        ("diffusers", {"verify": True}, "verifying needs diffusers"),
        ("onnxruntime", {"dtype": "fp16"}, "measuring the ranges of fp16 needs onnxruntime"),
        ("onnxscript", {}, "Tracing it needs onnxscript"),  # no template of it ships
    ],
)
def test_a_library_that_an_export_needs(
    source: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    missing: str,
    options: Any,
    words: str,
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(BackendError) as caught:
        export_package(source.root, tmp_path / "package", **{"dtype": "fp32", "verify": False, **options})
    assert words in caught.value.found
    extras = caught.value.expected.removeprefix("latentrt[").removesuffix("]")
    assert install_command(extras) in caught.value.fix
    assert not (tmp_path / "package").exists()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", archives.DTYPES)
@pytest.mark.parametrize("name", RECIPES)
def test_every_export_through_templates_is_the_traced_one(
    name: str, dtype: archives.Dtype, tmp_path: Path
) -> None:
    """With the islands that were measured, weights stored in another type, and a tiny autoencoder."""
    recipe = RECIPES[name]
    make_archive(tmp_path / "templates.zip", {name: architecture_of(recipe)}, dtypes=[dtype])
    stored = torch.float16 if dtype == "fp32" else torch.float32
    checkpoint = make_checkpoint(recipe, tmp_path / "checkpoint", dtype=stored)
    levels = len(recipe.vae["block_out_channels"])
    tiny = make_tiny_vae(tmp_path / "tiny") if levels == len(TINY_VAE["num_encoder_blocks"]) else None
    packages = [
        export_package(
            checkpoint, tmp_path / way, dtype=dtype, verify=False, tiny_vae=tiny, templates=templates
        )
        for way, templates in (("templates", tmp_path / "templates.zip"), ("traced", None))
    ]
    assert_same_package(*packages)


@pytest.mark.slow
@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_with_its_weights_a_net_has_the_same_graph(
    source: Checkpoint, tmp_path: Path, component: str
) -> None:
    """In fp16, before islands, which depend on measured ranges."""
    half = replace(
        source,
        parts={
            name: replace(part, tensors=Checkpoint.open(source.root).parts[name].tensors)
            for name, part in source.parts.items()
            if name != "tiny_vae"
        },
    )
    net = NETS[component].build(half, torch.float16)
    state = net.module.state_dict()
    tensors = {name: state[key].numpy() for key, (name, _) in net.tensors.items()}
    slots = weights.write_weights(
        tmp_path / weights.WEIGHTS, tensors, dict.fromkeys(tensors, ir.DataType.FLOAT16)
    )
    wanted = to_onnx(net)
    weights.attach(wanted, slots)
    passes.clean(wanted)
    made, contract = trace(blank_checkpoint(ARCHITECTURE), component, "fp16")
    assert contract == net.spec
    found = ir.from_proto(ir.to_proto(made))
    weights.attach(found, slots)
    with_shapes: list[Any] = [ir.to_proto(model) for model in (found, wanted)]  # islands look at them
    assert with_shapes[0] == with_shapes[1]


# A class's recipe and component, and its inert fields with other values than the recipe has.
TEXT = {
    "attention_dropout": 0.5,
    "initializer_range": 0.5,
    "initializer_factor": 0.5,
    "bos_token_id": 5,
    "pad_token_id": 5,
}
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "UNet2DConditionModel": (
        "turbo-tiny",
        "unet",
        {
            "sample_size": 24,
            "dropout": 0.5,
            "upcast_attention": True,
            "mid_block_only_cross_attention": True,
            "addition_embed_type_num_heads": 4,
        },
    ),
    "AutoencoderKL": ("turbo-tiny", "vae_encoder", {"sample_size": 24, "force_upcast": False}),
    "AutoencoderTiny": (
        "turbo-tiny",
        "preview_decoder",
        {"force_upcast": True, "latent_magnitude": 5, "latent_shift": 0.1},
    ),
    "CLIPTextModel": ("turbo-tiny", "text_encoder", {**TEXT, "eos_token_id": 2, "projection_dim": 5}),
    "CLIPTextModelWithProjection": ("xl-tiny", "text_encoder_2", TEXT),
    "CLIPVisionModelWithProjection": (
        "unclip-tiny",
        "image_encoder",
        {name: value for name, value in TEXT.items() if "token" not in name},
    ),
    "StableUnCLIPImageNormalizer": ("unclip-tiny", "image_noiser", {}),
}


def _numbered(model: ir.Model) -> bytes:
    """The graph with values numbered in the order of their use: torch also counts what was dropped."""
    kept = {*model.graph.inputs, *model.graph.outputs}
    values = dict.fromkeys(
        value
        for node in model.graph
        for value in (*node.inputs, *node.outputs)
        if value is not None and value not in kept and not weights.is_weight(value)
    )
    for number, value in enumerate(values):
        value.name = f"value {number}"
    return _file(model)


@pytest.mark.slow
@pytest.mark.parametrize("kind", INERT)
def test_inert_fields_change_nothing(kind: str) -> None:
    recipe, component, fields = OTHERS[kind]
    assert fields.keys() == INERT[kind].keys()
    if not fields:
        return
    made, part = architecture_of(RECIPES[recipe]), NETS[component].part
    wanted = _numbered(trace(blank_checkpoint(made), component, "fp32")[0])
    for name, value in fields.items():
        other = replace(made, parts={**made.parts, part: {**made.parts[part], name: value}})
        assert _numbered(trace(blank_checkpoint(other), component, "fp32")[0]) == wanted, name
