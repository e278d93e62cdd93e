"""Checkpoints opened as they are: nothing is copied, what is made is made once, what is wrong is named."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from latentrt.checkpoints import contents
from latentrt.checkpoints.entries import OPENED
from latentrt.checkpoints.files.component import read_tensors
from latentrt.checkpoints.files.open import Checkpoint
from latentrt.checkpoints.opened import Options, open_checkpoint
from latentrt.engines.backends import BACKENDS
from latentrt.engines.errors import CheckpointError, PackageError, StorageError, UsageError
from latentrt.engines.onnxruntime.backend import ONNXRUNTIME
from latentrt.engines.onnxruntime.nets import OnnxRuntimeNet
from latentrt.engines.onnxruntime.tuning.cpu import lower_for_cpu
from latentrt.engines.package import Package
from latentrt.engines.spec import DTYPES, Array
from latentrt.runtime.prompts.tokenizer import ClipTokenizer
from tests.checkpoints.conftest import write_small

EVERY = BACKENDS["onnxruntime"].reads
SIZES = {
    "B": 2,
    "E": 1,
    "N": 1,
    "P": 1,
    "S": 1,
    "T": 77,
    "H/8": 8,
    "W/8": 8,
    "H": 64,
    "W": 64,
    "h": 8,
    "w": 8,
}


def tokenize(folder: Path, texts: Sequence[str], length: int) -> Array:
    return ClipTokenizer.open(folder).encode(texts, length).ids


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small checkpoint as one file in fp16."""
    return write_small(tmp_path_factory.mktemp("plain") / "small.safetensors")


@pytest.fixture
def model(plain: Path, tmp_path: Path) -> Path:
    """The same, to change or move."""
    return Path(shutil.copy(plain, tmp_path / "small.safetensors"))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "cache"


class Opener:
    """Opens checkpoints with the small templates, and keeps what was told."""

    def __init__(self, archive: Path, store: Path) -> None:
        self.options = Options(dtype="fp32", reads=EVERY, templates=archive)
        self.store = store
        self.notes = list[str]()
        self.stages = list[str]()

    def __call__(self, path: Path, **changed: Any) -> Package:
        self.notes.clear()
        self.stages.clear()
        return open_checkpoint(
            path,
            replace(self.options, **changed),
            tokenize=tokenize,
            store=self.store,
            progress=lambda now: self.stages.append(now.stage),
            note=self.notes.append,
        )

    def entries(self) -> list[Path]:
        folder = self.store / "checkpoints"
        return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


@pytest.fixture
def opener(small_archive: Path, store: Path) -> Opener:
    return Opener(small_archive, store)


def inputs(package: Package, net: str, seed: int = 0) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    return {
        item.name: (random.standard_normal([SIZES.get(str(d), d) for d in item.shape]) * 0.5).astype(
            DTYPES[item.dtype]
        )
        if item.dtype.startswith("float")
        else np.zeros([SIZES.get(str(d), d) for d in item.shape], DTYPES[item.dtype])
        for item in package.manifest.nets[net].spec.inputs
    }


def outputs(package: Package, net: str) -> dict[str, Array]:
    with ONNXRUNTIME.open_net(package, net, threads=1) as opened:
        return opened(**inputs(package, net))


def test_the_file_stays_the_only_copy(model: Path, opener: Opener) -> None:
    before = model.read_bytes()
    package = opener(model)
    assert {place.path for place in package.elsewhere.values()} == {model.resolve()}
    assert not list(opener.store.rglob("*.safetensors"))
    small = sum(path.stat().st_size for path in opener.entries()[0].rglob("*") if path.is_file())
    assert small < 4_000_000, "graphs and the tokenizer"
    assert model.read_bytes() == before
    for net in ("text_encoder", "unet", "vae_decoder", "vae_encoder"):
        assert all(np.isfinite(array).all() for array in outputs(package, net).values())
    package.verify()
    package.check_weights()


def test_the_nets_read_the_files_tensors(model: Path, opener: Opener) -> None:
    """A changed tensor, written by safetensors, changes what the net computes with."""
    first = outputs(opener(model), "vae_decoder")
    tensors = load_file(model)
    bias = "first_stage_model.decoder.conv_out.bias"
    save_file({**tensors, bias: tensors[bias] + 0.25}, model)
    second = outputs(opener(model), "vae_decoder")
    np.testing.assert_allclose(second["mean"] - first["mean"], 0.25, atol=1e-3)


def test_it_is_made_once(model: Path, opener: Opener, tmp_path: Path) -> None:
    first = opener(model)
    assert opener.stages[0] == "check text_encoder"
    times = {path: path.stat().st_mtime_ns for path in first.root.rglob("*.onnx")}
    second = opener(model)
    assert opener.stages == []
    assert (second.root, second.manifest) == (first.root, first.manifest)
    assert {path: path.stat().st_mtime_ns for path in first.root.rglob("*.onnx")} == times
    (tmp_path / "moved").mkdir()
    moved = model.rename(tmp_path / "moved" / model.name)
    third = opener(moved)
    assert (opener.stages, third.root) == ([], first.root)
    assert third.path(third.manifest.nets["unet"].weights[0]) == moved
    assert json.loads((third.root / OPENED).read_text())["path"] == str(moved)
    assert outputs(third, "unet")["prediction"].shape == (2, 4, 8, 8)


def test_names_of_files_decide_nothing_that_is_drawn(model: Path, opener: Opener) -> None:
    first = opener(model)
    second = opener(model.rename(model.with_name("other name.safetensors")))
    assert (first.manifest.name, second.manifest.name) == ("small", "other name")
    assert second.manifest.sha256 == first.manifest.sha256
    assert opener(model.with_name("other name.safetensors"), dtype="fp16").manifest.sha256 != (
        first.manifest.sha256
    )
    for name, array in outputs(second, "vae_decoder").items():
        assert array.shape, name


def test_a_file_that_is_written_to_while_it_is_open(model: Path, opener: Opener) -> None:
    """Nets are opened when they are first called, which may be long after the checkpoint was opened."""
    package = opener(model)
    content = model.read_bytes()
    model.write_bytes(content)
    with pytest.raises(PackageError, match=r"small\.safetensors was written to since .* Open the check"):
        outputs(package, "vae_encoder")
    model.unlink()
    with pytest.raises(PackageError, match=r"small\.safetensors is gone"):
        outputs(package, "vae_encoder")


def test_a_graph_that_is_gone(model: Path, opener: Opener) -> None:
    package = opener(model)
    shutil.rmtree(package.root)
    with pytest.raises(PackageError, match=r"model\.onnx is missing; .* Open it again"):
        outputs(package, "vae_encoder")


def test_what_it_was_opened_with(model: Path, opener: Opener, tmp_path: Path) -> None:
    other = Path(shutil.copy(model, tmp_path / "its vae.safetensors"))
    assert opener(model).opened_with == {}
    found = opener(model, vae=other, prediction_type="v_prediction").opened_with
    assert found["prediction_type"] == "v_prediction"
    assert (found["vae"]["name"], len(found["vae"]["sha256"])) == ("its vae.safetensors", 64)
    assert opener(model, vae=other).opened_with["vae"] == found["vae"]


def test_a_file_that_changed_is_another(model: Path, opener: Opener) -> None:
    first = opener(model)
    write_small(model, model_ema_decay=torch.ones(1))  # the same weights and one tensor more
    second = opener(model)
    assert second.root != first.root
    assert any("not used" in line for line in opener.notes), opener.notes


def test_a_rewritten_file_is_read_again_though_its_size_is_the_same(model: Path, opener: Opener) -> None:
    first = opener(model)
    content = bytearray(model.read_bytes())
    content[-2:] = b"\x00\x00"
    model.write_bytes(content)
    os.utime(model, ns=(0, 10**18))
    assert opener(model).root != first.root


def test_contents_are_remembered_until_the_file_is_written_to(
    model: Path, opener: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = opener(model)

    def never(*_: object) -> str:
        raise AssertionError("the file was hashed again")

    monkeypatch.setattr(contents, "_hash", never)
    assert opener(model).root == first.root
    os.utime(model)
    with pytest.raises(AssertionError, match="hashed again"):
        opener(model)


def test_each_way_of_opening_has_its_own_entry(model: Path, opener: Opener) -> None:
    roots = {
        opener(model).root,
        opener(model, dtype="fp16").root,
        opener(model, prediction_type="v_prediction").root,
    }
    assert len(roots) == 3
    assert len(opener.entries()) == 3


def test_half_precision_has_islands_like_the_exports(model: Path, opener: Opener) -> None:
    package = opener(model, dtype="fp16")
    assert package.manifest.dtype == "fp16"
    assert "measured, once" in opener.notes[0]
    assert [stage.split()[0] for stage in opener.stages[-3:]] == ["make", "measure", "package"]
    assert package.manifest.nets["vae_decoder"].fp32_islands, "its mean is computed in float32"
    assert not list(opener.store.rglob("*.safetensors"))
    half, full = outputs(package, "unet")["prediction"], outputs(opener(model), "unet")["prediction"]
    assert half.dtype == np.float16
    error = np.linalg.norm(half.astype(np.float64) - full) / np.linalg.norm(full)
    assert error < 5e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float64", "float32", "float8_e4m3fn", "float8_e5m2"])
def test_every_stored_type_computes_with_its_own_numbers(tmp_path: Path, opener: Opener, dtype: str) -> None:
    """Against the same numbers written as float32 by safetensors and torch."""
    stored = write_small(tmp_path / "stored.safetensors", dtype=getattr(torch, dtype))
    wide = {name: t.float() if t.is_floating_point() else t for name, t in load_file(stored).items()}
    save_file(wide, tmp_path / "wide.safetensors")
    found, wanted = opener(stored), opener(tmp_path / "wide.safetensors")
    for net in ("text_encoder", "unet", "vae_decoder"):
        for name, array in outputs(wanted, net).items():
            np.testing.assert_allclose(outputs(found, net)[name], array, rtol=1e-4, atol=1e-4)


def test_types_that_a_backend_does_not_read_are_converted_once(tmp_path: Path, opener: Opener) -> None:
    model = write_small(tmp_path / "brain.safetensors", dtype=torch.bfloat16)
    reads = BACKENDS["tensorrt-rtx"].reads
    package = opener(model, reads=reads)
    assert opener.notes[-1].startswith("vae_decoder: weights of the type BF16 are converted to fp32")
    assert package.elsewhere.keys().isdisjoint(package.manifest.files)
    kinds = {t.dtype for path in package.root.rglob("*.safetensors") for t in load_file(path).values()}
    assert kinds == {torch.float32}
    opener(model, reads=reads)
    assert opener.stages == []
    for name, array in outputs(opener(model), "unet").items():
        np.testing.assert_array_equal(outputs(package, "unet")[name], array)


def test_lowered_graphs_find_the_weights_too(model: Path, opener: Opener, tmp_path: Path) -> None:
    package = opener(model)
    wanted = outputs(package, "unet")["prediction"]
    lowered = lower_for_cpu(package, "unet", "winograd", tmp_path)
    assert lowered.kernels
    with OnnxRuntimeNet(package, "unet", threads=1, lowered=lowered) as net:
        np.testing.assert_allclose(net(**inputs(package, "unet"))["prediction"], wanted, atol=1e-4)


# ── what is wrong ───────────────────────────────────────────────────────────────────────────────────────


def test_weights_that_are_not_finite_are_named_and_leave_nothing(tmp_path: Path, opener: Opener) -> None:
    bad = torch.full((4,), torch.nan, dtype=torch.float16)
    model = write_small(tmp_path / "bad.safetensors", **{"model.diffusion_model.out.2.bias": bad})
    with pytest.raises(CheckpointError, match=r"bad\.safetensors.*conv_out\.bias.*NaN or infinite"):
        opener(model)
    assert opener.entries() == []


def test_numbers_beyond_half_precision_are_refused_for_it_alone(tmp_path: Path, opener: Opener) -> None:
    large = torch.full((4,), 1e6)
    model = write_small(tmp_path / "large.safetensors", **{"model.diffusion_model.out.2.bias": large})
    with pytest.raises(CheckpointError, match=r"values up to 1e\+06.*--dtype fp32"):
        opener(model, dtype="fp16")
    opener(model)


def test_another_architecture_is_named_with_the_way_to_export_it(tmp_path: Path, opener: Opener) -> None:
    """`latentrt export` traces what no template fits."""
    wide = torch.zeros(33, dtype=torch.float16)
    name = "first_stage_model.decoder.norm_out.weight"
    model = write_small(tmp_path / "odd.safetensors", **{name: wide})
    with pytest.raises(CheckpointError, match=r"\(33,\).*latentrt export") as caught:
        opener(model)
    assert "norm_out" in str(caught.value)


def test_an_unknown_prediction_type(model: Path, opener: Opener) -> None:
    with pytest.raises(UsageError, match="prediction_type is 'x'"):
        opener(model, prediction_type="x")


def test_a_file_that_cannot_be_read(model: Path, opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(contents, "_hash", broken)
    with pytest.raises(CheckpointError, match=r"cannot be read \(Input/output error\)"):
        opener(model)


def test_a_file_that_is_written_to_meanwhile(
    model: Path, opener: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(path: Path, _: int) -> str:
        os.utime(path)
        return "0" * 64

    monkeypatch.setattr(contents, "_hash", slow)
    with pytest.raises(CheckpointError, match="written to meanwhile"):
        opener(model)


def test_a_damaged_entry_is_made_anew(model: Path, opener: Opener) -> None:
    package = opener(model)
    (package.root / "unet" / "loop.onnx").write_bytes(b"")
    again = opener(model)
    assert opener.stages
    assert f"what was made ready before is damaged, and is made anew: {package.root}" in opener.notes
    assert again.root == package.root
    assert outputs(again, "unet")["prediction"].shape == (2, 4, 8, 8)


def test_a_second_opening_reads_no_graph(model: Path, opener: Opener, small_archive: Path) -> None:
    wanted = opener(model).root
    script = f"""
import sys
sys.modules["onnx_ir"] = sys.modules["onnx"] = None  # an import of it raises ImportError
from pathlib import Path
from latentrt.checkpoints.opened import Options, open_checkpoint
options = Options(dtype="fp32", reads={sorted(EVERY)}, templates=Path({str(small_archive)!r}))
print(open_checkpoint({str(model)!r}, options, tokenize=None, store=Path({str(opener.store)!r})).root)
"""
    run = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == str(wanted)


def test_a_full_disk_leaves_nothing(model: Path, opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("latentrt.checkpoints.writing.write_graphs", full)
    with pytest.raises(StorageError, match="No space left on device"):
        opener(model)
    assert opener.entries() == []
    monkeypatch.undo()
    opener(model)


def test_where_the_cache_cannot_be_written_it_lasts_as_long_as_the_process(
    model: Path, small_archive: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    opener = Opener(small_archive, tmp_path / "file")
    package = opener(model)
    assert any("made ready anew each time" in line for line in opener.notes), opener.notes
    assert outputs(package, "unet")["prediction"].shape == (2, 4, 8, 8)


LEAN = """
import sys
for name in ("torch", "diffusers", "transformers", "onnxscript", "safetensors"):
    sys.modules[name] = None
from dataclasses import replace
from pathlib import Path

import numpy as np

from latentrt.checkpoints import opened
from latentrt.runtime import Pipeline

model, archive, target = sys.argv[1:]
real = opened.open_checkpoint
small = lambda path, options, **told: real(path, replace(options, templates=Path(archive)), **told)
opened.open_checkpoint = small
with Pipeline.open(model, backend="onnxruntime", threads=1) as pipe:
    drawn = pipe("a photo of a fox", seed=1, num_inference_steps=2, height=64, width=64, output_type="np")
np.save(target, drawn.images)
"""


def test_a_lean_process_draws(model: Path, small_archive: Path, tmp_path: Path) -> None:
    """Two processes at once: one makes the entry, the other waits, and both draw the same."""
    environment = {**os.environ, "LATENTRT_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-W", "error", "-c", LEAN, str(model), str(small_archive)]
    running = [
        subprocess.Popen([*command, str(tmp_path / f"{i}.npy")], env=environment, cwd=tmp_path)
        for i in range(2)
    ]
    assert [process.wait(120) for process in running] == [0, 0]
    one, two = (np.load(tmp_path / f"{i}.npy") for i in range(2))
    np.testing.assert_array_equal(one, two)
    assert one.std() > 1
    assert len(list((tmp_path / "cache" / "checkpoints").glob("*/manifest.json"))) == 1


def test_a_folder_opens_like_the_file(model: Path, opener: Opener, tmp_path: Path) -> None:
    """Parts in files of their own, names with spaces and accents, and a config with a number JSON has not."""
    folder = tmp_path / "mon modèle"
    source = Checkpoint.open(model)
    for name, part in source.parts.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(dict(part.config)))
        stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
        tensors = {key: torch.tensor(array) for key, array in read_tensors(part.tensors).items()}
        save_file(tensors, folder / name / f"{stem}.safetensors")
    (folder / "scheduler").mkdir()
    unread = {"comment": [math.nan], "letters": "\ud800"}  # which diffusers reads over, too
    scheduler = {**source.scheduler, "lambda_min_clipped": -math.inf, **unread}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    source.tokenizers["tokenizer"](folder / "tokenizer")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    found, wanted = opener(folder), opener(model)
    copied = opener(Path(shutil.copytree(folder, tmp_path / "copied")))
    assert (copied.root, copied.manifest.name) == (found.root, "copied")
    assert {place.path.parent.parent for place in found.elsewhere.values()} == {folder}
    for net in ("text_encoder", "unet", "vae_decoder", "vae_encoder"):
        for name, array in outputs(wanted, net).items():
            np.testing.assert_array_equal(outputs(found, net)[name], array)


def test_an_archive_of_templates_that_is_missing(model: Path, opener: Opener, tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=r"none\.zip cannot be read"):
        opener(model, templates=tmp_path / "none.zip")


def test_the_advice_to_export_names_the_other_autoencoder(
    model: Path, opener: Opener, tmp_path: Path
) -> None:
    vae = tmp_path / "other.safetensors"
    odd = {"first_stage_model.decoder.norm_out.weight": torch.zeros(33, dtype=torch.float16)}
    write_small(vae, **odd)
    with pytest.raises(CheckpointError) as caught:
        opener(model, vae=vae)
    assert caught.value.fix.endswith(f"latentrt export {model} -o PACKAGE --vae {vae}")
