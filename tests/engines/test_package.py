import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import snapshot_download
from safetensors.torch import save_file

from latentrt.engines.errors import PackageError
from latentrt.engines.onnxruntime.backend import ONNXRUNTIME
from latentrt.engines.package import MANIFEST, Elsewhere, Manifest, Package, check_inside, file_record
from latentrt.engines.safetensors_format import first_not_finite
from tests.tiny_package import BIAS, external, write_graph


def edit(package: Package, change: Callable[[dict], object]) -> None:
    """Change the manifest on disk."""
    path = package.root / MANIFEST
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def refused(package: Package, match: str) -> None:
    with pytest.raises(PackageError, match=match) as caught:
        Package.open(package.root)
    assert caught.value.exit_code == 3
    assert caught.value.expected
    assert caught.value.fix


def test_round_trip(package: Package) -> None:
    opened = Package.open(package.root)
    assert opened == package
    assert Manifest.from_json(json.loads(json.dumps(opened.manifest.to_json()))) == opened.manifest
    assert set(opened.manifest.files) == {"unet/loop.onnx", "unet/weights.safetensors"}
    opened.verify()


def test_missing_folder_missing_manifest_and_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="does not exist"):
        Package.open(tmp_path / "nothing")
    with pytest.raises(PackageError, match="holds no package"):
        Package.open(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(PackageError, match=re.escape(f"latentrt export {tmp_path} -o")):
        Package.open(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema": "x"}', '{"schema": 1}', "[" * 200_000])
def test_damaged_manifest(package: Package, text: str) -> None:
    (package.root / MANIFEST).write_text(text)
    refused(package, "damaged")


def test_giant_manifest_is_not_read(package: Package) -> None:
    with (package.root / MANIFEST).open("r+b") as stream:
        stream.truncate(17 * 2**20)
    refused(package, "it has 17825792 bytes")


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["nets"].update(unet=None),
        lambda data: data["nets"]["unet"]["inputs"][0].pop("name"),
        lambda data: data["defaults"].update(height="tall"),
        lambda data: data["defaults"].update(num_inference_steps=0),
        lambda data: data["defaults"].update(guidance_scale=None),
        lambda data: data["defaults"].update(sampler=3),
        lambda data: data["defaults"].update(strength="much"),
        lambda data: data["files"].update({"unet/loop.onnx": 3}),
        lambda data: data.update(scheduler=3),
        lambda data: data.update(dtype="int4"),
        lambda data: data.update(family=3),
        lambda data: data.update(latent_channels="four"),
        lambda data: data.update(size_multiple=0),
        lambda data: data.update(schema=float("inf")),
        lambda data: data.update(max_clip_skip=-1),
        lambda data: data.update(zero_empty_prompt=1),
        lambda data: data.update(time_ids=["crop_right"]),
        lambda data: data.update(time_ids=[["crop_top"]]),
        lambda data: data.update(image_latents=["depth"]),
        lambda data: data.update(image_noise=[]),
        lambda data: data.update(image_processor="CLIPImageProcessor"),
        lambda data: data.update(latent_rgb=[[0.5, 0.5, 0.5]] * 4),
        lambda data: data.update(latent_rgb=[[0.5, 0.5]] * 5),
        lambda data: data.update(latent_rgb=["rgb"] * 5),
        lambda data: data.update(latent_rgb=[[0.5, 0.5, float("nan")]] * 5),
        lambda data: data.update(latent_rgb=5),
        lambda data: data.update(fused=[{"name": "a"}]),
        lambda data: data.update(fused=3),
        lambda data: data["nets"]["unet"].update(graph=""),
        lambda data: data["nets"]["unet"].update(graph=["a"]),
        lambda data: data["nets"]["unet"].update(graph="unet/loop.ort"),
        lambda data: data["nets"]["unet"].update(weights=""),
    ],
)
def test_manifest_with_wrong_fields(package: Package, change: Callable[[dict], object]) -> None:
    edit(package, change)
    refused(package, "damaged")


def test_unknown_tensor_dtype(package: Package) -> None:
    edit(package, lambda data: data["nets"]["unet"]["inputs"][0].update(dtype="float8"))
    refused(package, "'float8'")


def test_newer_schema(package: Package) -> None:
    edit(package, lambda data: data.update(schema=3, nets={"future": {}}))
    refused(package, "schema 3.*at most 2.*Upgrade")


def test_missing_and_truncated_file(package: Package) -> None:
    weights = package.root / "unet" / "weights.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    refused(package, "bytes; expected .* bytes")
    weights.unlink()
    refused(package, "missing")


def test_changed_content_is_found_by_verify(package: Package) -> None:
    weights = package.root / "unet" / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(PackageError, match="sha256"):
        Package.open(package.root).verify()


def test_unlisted_file(package: Package) -> None:
    edit(package, lambda data: data["files"].pop("unet/weights.safetensors"))
    refused(package, "without listing")


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "..", "", "a\\..\\x", "C:x", "a\0b"])
def test_paths_that_leave(name: str) -> None:
    with pytest.raises(PackageError, match="names the path"):
        check_inside(name)


def test_a_manifest_whose_paths_leave(package: Package) -> None:
    edit(package, lambda data: data["files"].update({"../outside": data["files"]["unet/loop.onnx"]}))
    refused(package, r"names the path '\.\./outside'")


def test_link_that_leaves(package: Package, tmp_path: Path) -> None:
    weights = package.root / "unet" / "weights.safetensors"
    outside = tmp_path / "outside"
    weights.rename(outside)
    weights.symlink_to(outside)
    refused(package, "is a link")


def test_a_link_within_the_package_is_refused_too(package: Package) -> None:
    """It would change which weights the graph's relative path names."""
    graph = package.root / "unet" / "loop.onnx"
    (package.root / "other").mkdir()
    graph.rename(package.root / "other" / "loop.onnx")
    graph.symlink_to(package.root / "other" / "loop.onnx")
    refused(package, "a link")


def test_a_package_in_the_hubs_cache(package: Package, tmp_path: Path) -> None:
    """huggingface_hub keeps links by name to files by hash. The advice, run as printed, gives a package."""
    cache = tmp_path / "hub" / "models--some-one--tiny"
    snapshot = cache / "snapshots" / ("ab12" * 10)
    for folder in ("blobs", "refs"):
        (cache / folder).mkdir(parents=True)
    (cache / "refs" / "main").write_text(snapshot.name)
    for path in [path for path in package.root.rglob("*") if path.is_file()]:
        blob = cache / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, blob)
        link = snapshot / path.relative_to(package.root)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    found = snapshot_download("some-one/tiny", cache_dir=tmp_path / "hub", local_files_only=True)
    assert Path(found) == snapshot
    for root in (snapshot, cache):
        with pytest.raises(PackageError, match=f"{snapshot}.* is a link") as error:
            Package.open(root)
        *command, target = shlex.split(error.value.fix.partition(": ")[2])
        assert (command, target) == (["cp", "-rL", str(snapshot)], "PACKAGE")
    subprocess.run([*command, tmp_path / "copy"], check=True)
    assert Package.open(tmp_path / "copy").manifest == package.manifest


def test_unlisted_tokenizer_file(package: Package) -> None:
    (package.root / "tokenizer").mkdir()
    (package.root / "tokenizer" / "vocab.json").write_text("{}")
    refused(package, "'tokenizer/vocab.json' without listing")


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("model.ckpt", r"latentrt convert .*model.ckpt -o .*model.safetensors && latentrt export"),
        ("model.safetensors", r"Make one: latentrt export .*model.safetensors -o PACKAGE"),
    ],
)
def test_a_file_is_no_package_and_says_how_to_make_one(tmp_path: Path, name: str, fix: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(PackageError, match=fix):
        Package.open(tmp_path / name)


@pytest.mark.parametrize("name", [MANIFEST, "unet/weights.safetensors", "unet/loop.onnx"])
def test_git_lfs_pointers_are_named(package: Package, name: str) -> None:
    (package.root / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n")
    refused(package, f"{re.escape(name)} is a git-lfs pointer")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, "BF16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(package: Package, dtype: Any, bad: float) -> None:
    """As numpy and torch say; integers with the same bits are numbers."""
    weights = package.root / "unet" / "weights.safetensors"
    values = torch.full((5000,), torch.finfo(torch.bfloat16).max, dtype=torch.float64)
    kind = torch.bfloat16 if dtype == "BF16" else torch.from_numpy(np.zeros(1, dtype)).dtype
    values = values.clamp(max=torch.finfo(kind).max).to(kind)
    whole = torch.full((3,), -1, dtype=torch.int64)
    save_file({"a": values, "ids": whole}, weights)
    package.check_weights()
    assert first_not_finite(weights) is None
    values[4321] = bad
    save_file({"a": values, "ids": whole}, weights)
    assert not torch.isfinite(values).all()
    with pytest.raises(PackageError, match="the tensor 'a' has values that are NaN or infinite"):
        package.check_weights()


# ── weights elsewhere ───────────────────────────────────────────────────────────────────────────────────


def elsewhere(package: Package, folder: Path, name: str = "my model.safetensors") -> Package:
    """The tiny package again, its weights moved to another folder under another name."""
    folder.mkdir(exist_ok=True)
    (weights,) = package.manifest.nets["unet"].weights
    place = folder / name
    package.path(weights).rename(place)
    size = place.stat().st_size
    write_graph(package.path("unet/loop.onnx"), external(name, size - 16, 16))
    graph = file_record(package.path("unet/loop.onnx"))
    edit(package, lambda data: data["files"].update({"unet/loop.onnx": vars(graph)}))
    where = Elsewhere(path=place, mtime_ns=place.stat().st_mtime_ns)
    return Package.open(package.root, elsewhere={weights: where})


def test_weights_may_be_elsewhere(package: Package, tmp_path: Path) -> None:
    found = elsewhere(package, tmp_path / "models")
    assert found.path("unet/weights.safetensors") == tmp_path / "models" / "my model.safetensors"
    assert found.weights_folder("unet") == tmp_path / "models"
    with ONNXRUNTIME.open_net(found, "unet") as net:
        np.testing.assert_array_equal(net(x=np.zeros((1, 4), np.float32))["y"], [BIAS])
    found.verify()
    found.check_weights()


def test_a_manifest_alone_cannot_lead_elsewhere(package: Package, tmp_path: Path) -> None:
    found = elsewhere(package, tmp_path / "models")
    with pytest.raises(PackageError, match="is missing"):
        Package.open(found.root)


def test_a_file_elsewhere_that_changed_is_noticed(package: Package, tmp_path: Path) -> None:
    found = elsewhere(package, tmp_path / "models")
    path = found.path("unet/weights.safetensors")
    known = dict(found.elsewhere)
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(0, 10**18))
    for check in (found.verify, lambda: Package.open(found.root, elsewhere=known)):
        with pytest.raises(PackageError, match="was written to since"):
            check()
    path.unlink()
    with pytest.raises(PackageError, match="is gone"):
        found.verify()


def test_a_graph_may_not_use_more_than_its_files_elsewhere(package: Package, tmp_path: Path) -> None:
    found = elsewhere(package, tmp_path / "models")
    for location, offset in (("weights.safetensors", 0), ("my model.safetensors", 10**6)):
        write_graph(found.path("unet/loop.onnx"), external(location, offset, 16))
        graph = file_record(found.path("unet/loop.onnx"))
        edit(found, lambda data, graph=graph: data["files"].update({"unet/loop.onnx": vars(graph)}))
        with pytest.raises(PackageError, match="takes weights from"):
            Package.open(found.root, elsewhere=found.elsewhere)
