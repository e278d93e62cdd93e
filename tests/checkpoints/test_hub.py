"""Models of a hub: the real client against a hub on loopback that speaks its protocol and keeps a log."""

import errno
import hashlib
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from filelock import FileLock
from huggingface_hub import constants, file_download, hf_hub_download, try_to_load_from_cache

from latentrt.checkpoints.files.open import Checkpoint
from latentrt.checkpoints.find import locate
from latentrt.checkpoints.hub import download as module
from latentrt.checkpoints.hub.download import DownloadProgress
from latentrt.checkpoints.hub.ids import HubModel, is_hub_id, parse
from latentrt.checkpoints.hub.needed import Needed, needed
from latentrt.engines.errors import (
    CheckpointError,
    DownloadError,
    LatentrtError,
    ModelError,
    PackageError,
    StorageError,
    UsageError,
)
from latentrt.engines.package import Package
from tests.checkpoints.hub_server import Hub, Repository

STEM = "diffusion_pytorch_model"
SECRET = "hf_averysecrettoken"
NAME = "some-one/tiny"


def as_json(**values: Any) -> bytes:
    return json.dumps(values).encode()


def weights(seed: str, size: int = 1000) -> bytes:
    return (hashlib.sha256(seed.encode()).digest() * (size // 32 + 1))[:size]


def pipeline_files(
    name: str = "StableDiffusionPipeline", variants: tuple[str, ...] = ("", ".fp16")
) -> dict[str, bytes]:
    """A repository as people publish it: every format of the weights, and parts that are not used."""
    index = {
        "_class_name": name,
        "scheduler": ["diffusers", "PNDMScheduler"],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    files = {
        ".gitattributes": b"*.safetensors filter=lfs",
        "README.md": b"# tiny",
        "v1-5-pruned.ckpt": b"pickle",
        "v1-5-pruned.safetensors": weights("whole"),
        "model_index.json": as_json(**index),
        "scheduler/scheduler_config.json": as_json(_class_name="PNDMScheduler"),
        "tokenizer/vocab.json": as_json(a=1),
        "tokenizer/merges.txt": b"#version: 0.2",
        "tokenizer/tokenizer_config.json": b"{}",
        "tokenizer/special_tokens_map.json": b"{}",
        "feature_extractor/preprocessor_config.json": b"{}",
    }
    stems = {"text_encoder": "model", "unet": STEM, "vae": STEM, "safety_checker": "model"}
    for part, stem in stems.items():
        files[f"{part}/config.json"] = as_json(part=part)
        for variant in variants:
            files[f"{part}/{stem}{variant}.safetensors"] = weights(
                part + variant, 2_621_440 if part == "unet" else 900
            )
            files[f"{part}/{stem}{variant}.bin"] = b"pickle"
    files[f"unet/{STEM}.onnx"] = files[f"unet/{STEM}.msgpack"] = b"other"
    return files


SMALL = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json",
    "tokenizer/special_tokens_map.json",
    "text_encoder/config.json",
    "unet/config.json",
    "vae/config.json",
}
HALF = {
    f"unet/{STEM}.fp16.safetensors",
    f"vae/{STEM}.fp16.safetensors",
    "text_encoder/model.fp16.safetensors",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub, and the client as it would be if it had been started with its address and an empty HF_HOME."""
    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    for place in (constants, file_download):  # releases before 1.0 have a copy of it in the second
        monkeypatch.setattr(place, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**16)
    monkeypatch.setattr(module, "_WAITS", (0.0, 0.0))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.close()


@pytest.fixture
def tiny(hub: Hub) -> Repository:
    hub.repositories[NAME] = Repository(pipeline_files())
    return hub.repositories[NAME]


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def refused(kind: type[LatentrtError], model: str, *words: str) -> LatentrtError:
    with pytest.raises(kind) as error:
        locate(model)
    assert type(error.value) is kind
    for word in words:
        assert word in str(error.value)
    assert SECRET not in str(error.value)
    return error.value


# What is an id


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", HubModel(repository="org/name")),
        (
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
            HubModel(repository="stable-diffusion-v1-5/stable-diffusion-v1-5"),
        ),
        ("org/name@fp16", HubModel(repository="org/name", revision="fp16")),
        ("org/name@refs/pr/3", HubModel(repository="org/name", revision="refs/pr/3")),
        ("org/na.me/a b.safetensors", HubModel(repository="org/na.me", file="a b.safetensors")),
        (
            "org/name/vae/x.safetensors@v1",
            HubModel(repository="org/name", file="vae/x.safetensors", revision="v1"),
        ),
        ("https://huggingface.co/org/name", HubModel(repository="org/name")),
        ("https://hf.co/org/name/", HubModel(repository="org/name")),
        ("https://huggingface.co/org/name/tree/fp16", HubModel(repository="org/name", revision="fp16")),
        (
            "https://huggingface.co/org/name/resolve/refs%2Fpr%2F1/x.safetensors?download=true",
            HubModel(repository="org/name", revision="refs/pr/1", file="x.safetensors"),
        ),
        ("https://huggingface.co/org/name/blob/main/x.ckpt", HubModel(repository="org/name", file="x.ckpt")),
    ],
)
def test_what_names_a_model_of_a_hub(text: str, expected: HubModel) -> None:
    assert is_hub_id(text)
    assert parse(text) == expected
    assert parse(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    ["demo", "./org/name", "../org/name", "/org/name", "~/name", "org/name/", "org/name/folder", "org\\name",
     "C:\\models\\x", "C:/models/x", "org/name.safetensors", "models/x.ckpt", "org--x/name", "org/na..me",
     "-org/name", "org/name@", "org/name@../x", "org/name/../x.safetensors", "", "org/" + "n" * 300,
     "https://civitai.com/models/1", "https://huggingface.co/datasets/org/name", "https://huggingface.co/org"],
)  # fmt: skip
def test_what_is_no_model_of_a_hub(text: str) -> None:
    assert not is_hub_id(text)


@pytest.mark.parametrize("text", ["org/name", "org/name@fp16", "org/name/x.safetensors"])
def test_what_exists_here_is_a_path(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub
) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(text)
    Path(text).mkdir(parents=True)
    assert not is_hub_id(text)
    assert locate(text) == Path(text)
    assert hub.asked == []


def test_a_file_in_a_folder_that_exists_is_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub
) -> None:
    """A misspelt file of one's own is not looked for elsewhere, where its name would be told."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    refused(CheckpointError, "models/sd/dream.safetensors", "models/sd/dream.safetensors does not exist")
    assert hub.asked == []


def test_a_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "x.safetensors").touch()
    assert locate("~/x.safetensors") == tmp_path / "x.safetensors"


@pytest.mark.parametrize("text", ["nothing", "./no/thing", "x" * 300, "a\0b"])
def test_what_is_neither(text: str, hub: Hub) -> None:
    refused(CheckpointError, text, "does not exist (looked for at", "ORG/NAME")
    assert hub.asked == []


def test_addresses_of_others_are_refused(hub: Hub) -> None:
    refused(UsageError, "https://civitai.com/api/download/models/1", "not the page of a model")
    assert hub.asked == []


# Which files


def chosen(files: dict[str, bytes], model: str = NAME) -> Needed:
    found = parse(model)
    assert found is not None
    return needed(found, list(files), lambda name: json.loads(files[name]))


def test_of_all_formats_the_half_of_safetensors() -> None:
    found = chosen(pipeline_files())
    assert set(found.files) == SMALL | HALF
    assert found.opens == ""
    is_weights = [name.endswith(".safetensors") for name in found.files]
    assert is_weights == sorted(is_weights), "whoever is interrupted lacks weights"


def test_without_a_half_the_whole() -> None:
    files = pipeline_files()
    del files[f"vae/{STEM}.fp16.safetensors"]
    assert set(chosen(files).files) == SMALL | HALF - {f"vae/{STEM}.fp16.safetensors"} | {
        f"vae/{STEM}.safetensors"
    }


def test_a_lone_variant_is_taken() -> None:
    files = pipeline_files(variants=(".non_ema",))
    assert f"unet/{STEM}.non_ema.safetensors" in chosen(files).files
    files[f"unet/{STEM}.ema_only.safetensors"] = b""
    with pytest.raises(CheckpointError, match=r"ema_only.* and .*non_ema"):
        chosen(files)


@pytest.mark.parametrize(
    ("index", "shard"),
    [
        (f"{STEM}.safetensors.index.fp16.json", STEM + "-0000{}-of-00002.fp16.safetensors"),
        (f"{STEM}.fp16.safetensors.index.json", STEM + ".fp16-0000{}-of-00002.safetensors"),
        (f"{STEM}.safetensors.index.json", STEM + "-0000{}-of-00002.safetensors"),
    ],
)
def test_shards(index: str, shard: str) -> None:
    files = pipeline_files()
    for variant in ("", ".fp16"):
        del files[f"unet/{STEM}{variant}.safetensors"]
    shards = [shard.format(number) for number in (1, 2)]
    files[f"unet/{index}"] = as_json(weight_map={"a": shards[0], "b": shards[1]})
    files |= {f"unet/{name}": b"" for name in shards}
    unet = {name for name in chosen(files).files if name.startswith("unet/")}
    assert unet == {"unet/config.json", f"unet/{index}", *(f"unet/{name}" for name in shards)}
    del files[f"unet/{shards[1]}"]
    with pytest.raises(CheckpointError, match=f"has no unet/{shards[1]}"):
        chosen(files)


def test_what_the_index_leaves_out_is_left_out() -> None:
    files = pipeline_files("StableDiffusionXLImg2ImgPipeline")
    index = json.loads(files["model_index.json"])
    index |= {"text_encoder": [None, None], "tokenizer": [None, None]}
    files["model_index.json"] = as_json(**index)
    for name in [name for name in files if name.startswith(("text_encoder/", "tokenizer/"))]:
        folder, _, file = name.partition("/")
        files[f"{folder}_2/{file}"] = files[name]
    found = chosen(files).files
    assert {name.partition("/")[0] for name in found} == {
        "model_index.json", "scheduler", "tokenizer_2", "text_encoder_2", "unet", "vae"
    }  # fmt: skip


def test_a_part_alone_is_opened_as_a_folder() -> None:
    """An autoencoder, such as stabilityai/sd-vae-ft-mse."""
    files = {f"{STEM}.safetensors": b"", f"{STEM}.bin": b"", "config.json": b"{}", "README.md": b""}
    assert chosen(files) == Needed(files=("config.json", f"{STEM}.safetensors"))


def test_one_file() -> None:
    files = {"README.md": b"", "dream.safetensors": b"", "vae/x.safetensors": b""}
    assert chosen(files) == Needed(files=("dream.safetensors",), opens="dream.safetensors")
    files["other.safetensors"] = b""
    with pytest.raises(CheckpointError, match=r"Say which one: some-one/tiny/dream.safetensors@v2$"):
        chosen(files, f"{NAME}@v2")
    assert chosen(files, f"{NAME}/vae/x.safetensors").opens == "vae/x.safetensors"
    with pytest.raises(CheckpointError, match=r"has no file none.safetensors; expected one of dream"):
        chosen(files, f"{NAME}/none.safetensors")
    with pytest.raises(CheckpointError, match=r"README.md, which holds no weights"):
        chosen(files, f"https://huggingface.co/{NAME}/blob/main/README.md")
    with pytest.raises(CheckpointError, match=r"with \.safetensors files\. Use another"):
        chosen({"README.md": b""}, f"{NAME}/none.safetensors")


def test_only_pickles() -> None:
    files = {name: data for name, data in pipeline_files().items() if not name.endswith(".safetensors")}
    with pytest.raises(CheckpointError) as error:
        chosen(files, f"{NAME}@v2")
    assert all(f"{part}/{STEM}.bin" in error.value.found for part in ("unet", "vae"))
    fetch = "Convert each: hf download some-one/tiny --revision v2 --local-dir tiny"
    assert error.value.fix.startswith(f"{fetch} && latentrt convert tiny/")
    files["v1-5-pruned.safetensors"] = b""
    with pytest.raises(CheckpointError, match=f"whole model: {NAME}/v1-5-pruned.safetensors$"):
        chosen(files)
    for model in (NAME, f"{NAME}/a.ckpt"):
        with pytest.raises(
            CheckpointError, match=r"Convert it: .* latentrt convert tiny/a.ckpt -o tiny/a.safetensors$"
        ):
            chosen({"a.ckpt": b""}, model)


def test_other_layouts_and_families() -> None:
    with pytest.raises(CheckpointError, match=r"neither model_index.json nor .* only config.json, flux.gguf"):
        chosen({"config.json": b"{}", "flux.gguf": b""})
    with pytest.raises(CheckpointError, match="at its top, nothing"):
        chosen({})
    with pytest.raises(CheckpointError, match="some-one/tiny holds Flux"):
        chosen({"model_index.json": as_json(_class_name="FluxPipeline")})


@pytest.mark.parametrize(
    "name", ["unet/config.json", f"unet/{STEM}", "scheduler/scheduler_config.json", "tokenizer/merges.txt"]
)
def test_a_file_that_is_missing_there(name: str) -> None:
    files = {key: data for key, data in pipeline_files().items() if not key.startswith(name)}
    with pytest.raises(CheckpointError, match=f"has no {name}"):
        chosen(files)


def test_a_package_is_what_its_manifest_lists() -> None:
    manifest = as_json(files={"unet/weights.safetensors": {}, "unet/loop.onnx": {}})
    files = {
        "README.md": b"",
        "manifest.json": manifest,
        "unet/loop.onnx": b"",
        "unet/weights.safetensors": b"",
    }
    found = chosen(files)
    assert found.files == ("manifest.json", "unet/loop.onnx", "unet/weights.safetensors")
    assert found.without_links
    del files["unet/loop.onnx"]
    with pytest.raises(PackageError, match=r"has no unet/loop.onnx"):
        chosen(files)
    with pytest.raises(PackageError, match=r"the package names the path '\.\./x'"):
        chosen({"manifest.json": as_json(files={"../x": {}})})
    with pytest.raises(PackageError, match="lists no files"):
        chosen({"manifest.json": as_json(name="a web application")})


# Fetching


def test_only_what_is_needed_is_fetched_and_once(hub: Hub, tiny: Repository, logged: list[str]) -> None:
    told: list[DownloadProgress] = []
    folder = locate(NAME, progress=told.append)
    assert names_in(folder) == SMALL | HALF
    assert all((folder / name).read_bytes() == tiny.files[name] for name in SMALL | HALF)
    total = sum(len(tiny.files[name]) for name in SMALL | HALF)
    # The index is read before anything can be counted.
    assert {(one.total) for one in told} == {total}
    counts = [one.done for one in told]
    assert counts == sorted(counts)
    assert counts[-1] == total
    of_unet = {one.done for one in told if one.file == f"unet/{STEM}.fp16.safetensors"}
    assert len(of_unet) > 10, "a bar that moves while a large file is on its way"
    assert any("11 of 12 files, 2.6 MB" in line and hub.url in line for line in logged)
    # the client's own look at its cache
    assert try_to_load_from_cache(NAME, f"unet/{STEM}.fp16.safetensors") == str(
        folder / f"unet/{STEM}.fp16.safetensors"
    )
    hub.asked.clear()
    told.clear()
    assert locate(NAME, progress=told.append) == folder
    assert [(one.method, one.path) for one in hub.asked] == [("GET", f"/api/models/{NAME}/revision/main")]
    assert told == []


def test_a_checkpoint_of_diffusers_opens(hub: Hub, tmp_path: Path) -> None:
    from tests.recipes import RECIPES, make_checkpoint

    source = make_checkpoint(RECIPES["tiny1"], tmp_path / "tiny1")
    hub.repositories[NAME] = Repository({name: (source / name).read_bytes() for name in names_in(source)})
    found, expected = Checkpoint.open(locate(NAME)), Checkpoint.open(source)
    assert found.name == "tiny"
    assert found.unet.tensors.keys() == expected.unet.tensors.keys()
    assert found.unet.config == expected.unet.config


def test_a_revision(hub: Hub, tiny: Repository) -> None:
    tiny.revisions = ("main", "refs/pr/3")
    first = locate(f"{NAME}@refs/pr/3")
    assert (
        Path(hf_hub_download(NAME, "model_index.json", revision="refs/pr/3", local_files_only=True)).parent
        == first
    )
    hub.asked.clear()
    assert locate(f"{NAME}@{tiny.commit}") == first
    assert hub.asked == [], "a commit does not change"


def test_a_file_and_a_part_of_a_repository(hub: Hub, tiny: Repository) -> None:
    found = locate(f"{hub.url}/{NAME}/blob/main/v1-5-pruned.safetensors")
    assert found.read_bytes() == tiny.files["v1-5-pruned.safetensors"]
    assert names_in(found.parent) == {found.name}
    with pytest.raises(ModelError):
        module._cached(HubModel(repository=NAME, revision="v9"), found.parents[2])  # pyright: ignore[reportPrivateUsage]


@pytest.fixture(autouse=True)
def _endpoint_of_pages(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.url)


def test_a_new_commit_is_fetched(hub: Hub, tiny: Repository) -> None:
    first = locate(NAME)
    tiny.commit = "beef" * 10
    tiny.files["vae/config.json"] = as_json(part="vae", changed=True)
    hub.asked.clear()
    second = locate(NAME)
    assert second.name == "beef" * 10
    assert first != second
    assert [path for path in hub.paths("GET") if "resolve" not in path] == [
        f"/api/models/{NAME}/revision/main"
    ]
    assert not any(one.host == "cdn" for one in hub.asked), "the weights are the same"


def test_a_whole_set_that_is_there_is_used(hub: Hub, tiny: Repository) -> None:
    """Never both: someone has fetched the fp32 weights with diffusers."""
    for name in SMALL | {name.replace(".fp16", "") for name in HALF}:
        hf_hub_download(NAME, name)
    hub.asked.clear()
    folder = locate(NAME)
    assert names_in(folder) == SMALL | {name.replace(".fp16", "") for name in HALF}
    assert hub.paths("HEAD") == []


def test_what_is_half_there_is_completed(hub: Hub, tiny: Repository) -> None:
    for name in ("model_index.json", f"unet/{STEM}.safetensors"):
        hf_hub_download(NAME, name)
    assert names_in(locate(NAME)) >= HALF


@pytest.mark.parametrize("online", [True, False])
def test_without_a_connection_the_cache_is_used(
    hub: Hub, tiny: Repository, logged: list[str], monkeypatch: pytest.MonkeyPatch, online: bool
) -> None:
    folder = locate(NAME)
    logged.clear()
    hub.asked.clear()
    if online:
        hub.faults["revision/main"] = [503] * 3
    else:
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert locate(NAME) == folder
    reason = (
        "answered with status 503"
        if online
        else "cannot be reached, or stopped answering (Connection refused)"
    )
    assert reason in logged[-1]
    assert logged[-1].endswith(f"{NAME} is used as it was last fetched")
    (folder / f"vae/{STEM}.fp16.safetensors").unlink()
    hub.faults["revision/main"] = [503] * 3
    refused(DownloadError, NAME, reason, f"has no vae/{STEM}.safetensors")
    hub.faults["revision/v2"] = [503] * 3
    refused(DownloadError, f"{NAME}@v2", "nothing of some-one/tiny@v2 is in")


# Interruptions


def test_an_overloaded_hub_is_asked_again(hub: Hub, tiny: Repository) -> None:
    hub.faults = {
        "revision/main": [500, 429],
        "vae/config.json": [503],
        f"unet/{STEM}.fp16.safetensors": [500],
    }
    assert names_in(locate(NAME)) == SMALL | HALF


def test_a_connection_that_is_cut_is_resumed(hub: Hub, tiny: Repository) -> None:
    unet = f"unet/{STEM}.fp16.safetensors"
    hub.faults[tiny.etag(unet)] = ["cut"]
    folder = locate(NAME)
    assert (folder / unet).read_bytes() == tiny.files[unet]
    begins = [one.headers.get("range") for one in hub.asked if one.host == "cdn"]
    assert begins[0] is None
    assert begins[1:]
    assert all(begin and begin != "bytes=0-" for begin in begins[1:])


class StoppedError(BaseException):
    """As a signal stops the command."""


def stop_at(size: int) -> Callable[[DownloadProgress], None]:
    def tell(progress: DownloadProgress) -> None:
        if progress.done >= size:
            raise StoppedError

    return tell


def test_a_run_that_is_stopped_is_resumed_by_the_next(hub: Hub, tiny: Repository) -> None:
    unet = f"unet/{STEM}.fp16.safetensors"
    with pytest.raises(StoppedError):
        locate(NAME, progress=stop_at(1_000_000))
    assert not huggingface_hub.utils.are_progress_bars_disabled()
    hub.asked.clear()
    told: list[DownloadProgress] = []
    folder = locate(NAME, progress=told.append)
    assert (folder / unet).read_bytes() == tiny.files[unet]
    (begin,) = (one.headers["range"] for one in hub.asked if one.host == "cdn")
    assert int(begin.removeprefix("bytes=").rstrip("-")) > 900_000
    first = next(one for one in told if one.file == unet)
    assert first.done > 900_000, "what was there is not shown as to be done"
    assert list(folder.parents[1].glob("blobs/*.incomplete")) == []


@pytest.mark.parametrize("size", [1_500_000, 5_000_000])
def test_what_does_not_fit_what_was_there_is_fetched_anew(hub: Hub, tiny: Repository, size: int) -> None:
    """A file that a killed process left, of other bytes or too long."""
    unet = f"unet/{STEM}.fp16.safetensors"
    blobs = Path(constants.HF_HUB_CACHE) / "models--some-one--tiny" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{tiny.etag(unet)}.incomplete").write_bytes(bytes(size))
    assert (locate(NAME) / unet).read_bytes() == tiny.files[unet]


def test_another_process_is_waited_for(hub: Hub, tiny: Repository, logged: list[str]) -> None:
    """Its file is then there, and not fetched again. The lock is the client's own."""
    unet = f"unet/{STEM}.fp16.safetensors"
    root = Path(constants.HF_HUB_CACHE) / "models--some-one--tiny"
    lock = Path(constants.HF_HUB_CACHE) / ".locks" / root.name / f"{tiny.etag(unet)}.lock"
    lock.parent.mkdir(parents=True)

    def other() -> None:
        with FileLock(lock):
            holds.set()
            leave()

    def leave() -> None:
        while not any("waiting for another process" in line for line in logged):
            time.sleep(0.01)
        (root / "blobs" / tiny.etag(unet)).write_bytes(tiny.files[unet])

    holds = threading.Event()
    thread = threading.Thread(target=other)
    thread.start()
    assert holds.wait(10)
    folder = locate(NAME)
    thread.join()
    assert (folder / unet).read_bytes() == tiny.files[unet]
    assert not any(one.host == "cdn" for one in hub.asked)


# Refusals


def test_gated(hub: Hub, tiny: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.gated, tiny.token = True, SECRET
    page = f"Accept it at {hub.url}/{NAME} and log in: hf auth login"
    refused(DownloadError, NAME, "is gated", page)
    monkeypatch.setenv("HF_TOKEN", "hf_ofsomeoneelse")
    error = refused(DownloadError, NAME, "is gated", page)
    assert "hf_ofsomeoneelse" not in str(error)
    assert error.__suppress_context__
    assert error.__cause__ is None
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert names_in(locate(NAME)) == SMALL | HALF
    assert {one.headers.get("authorization") for one in hub.asked if one.host == "cdn"} == {None}


def test_a_repository_or_revision_that_is_missing(
    hub: Hub, tiny: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(DownloadError, "no/where", "no/where is neither a path here nor a model at", hub.url)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    refused(DownloadError, "no/where", "neither a path here nor a model")
    refused(DownloadError, f"{NAME}@v9", "has no revision 'v9'", f"{hub.url}/{NAME}/tree/main")


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_is_refused(
    hub: Hub, tiny: Repository, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    hub.faults["revision/main"] = [status]
    refused(DownloadError, NAME, f"refuses access to {NAME} (status {status})", "hf auth login")


@pytest.mark.parametrize("token", [f"{SECRET}é", f"{SECRET}\x01{SECRET}"])
def test_a_token_that_cannot_be_sent(
    hub: Hub, tiny: Repository, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    refused(DownloadError, NAME, "characters that no token has")
    assert hub.asked == []


def test_a_file_that_the_hub_lost(hub: Hub, tiny: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = dict(tiny.files)
    gone = listed.pop("vae/config.json")
    tiny.files = listed

    class Listed(dict[str, bytes]):
        def items(self) -> Any:
            return [*super().items(), ("vae/config.json", gone)]

    tiny.files = Listed(listed)
    monkeypatch.setattr(
        Repository,
        "etag",
        lambda self, name, etag=Repository.etag: etag(self, name) if name in self.files else "",
    )
    refused(DownloadError, NAME, "has lost a file")


def test_too_many_requests(hub: Hub, tiny: Repository) -> None:
    hub.faults["revision/main"] = [429] * 3
    refused(DownloadError, NAME, "answered with status 429", "Wait for some minutes")


def test_an_endpoint_that_is_no_address(tmp_path: Path) -> None:
    _, text = run(NAME, HF_HOME=str(tmp_path), HF_ENDPOINT="banana")
    assert "what HF_ENDPOINT says is no address: it cannot be reached" in text


def test_what_is_no_hub(hub: Hub) -> None:
    hub.page = b"<html>Log in to this network</html>"
    refused(DownloadError, NAME, "something else than a hub does", "HF_ENDPOINT")
    hub.page = as_json(id=NAME)
    refused(DownloadError, NAME, "something else than a hub does (ValueError)")
    hub.page = as_json(error=0)
    refused(DownloadError, NAME, "something else than a hub does (ValueError)")


def test_mistakes_here_are_not_taken_for_the_hubs(
    hub: Hub, tiny: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistaken(*words: Any) -> None:
        raise RuntimeError("a mistake")

    monkeypatch.setattr(module, "_write_blob", mistaken)
    with pytest.raises(RuntimeError, match="a mistake"):
        locate(NAME)


def test_a_password_in_an_address_is_not_shown(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", f"http://me:{SECRET}@127.0.0.1:9")
    refused(DownloadError, NAME, "http://127.0.0.1:9 cannot be reached")


def test_a_full_disk(hub: Hub, tiny: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.FileIO):
        def write(self, data: Any, /) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(module.io, "FileIO", Full)
        refused(StorageError, NAME, "cannot be written: No space left on device", "HF_HOME")
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
        refused(StorageError, NAME, "needs 0.00 GB in", "HF_HOME")
    assert names_in(locate(NAME)) == SMALL | HALF


def test_a_cache_that_cannot_be_written(
    hub: Hub, tiny: Repository, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    refused(
        StorageError, NAME, f"cannot be written to {tmp_path / 'file' / 'hub'}: Not a directory", "HF_HOME"
    )


def test_a_package_is_opened_without_links(hub: Hub) -> None:
    from latentrt.runtime.model import SHIPPED

    source = Path(SHIPPED["demo"])
    hub.repositories[NAME] = Repository(
        {"README.md": b"", **{name: (source / name).read_bytes() for name in names_in(source)}}
    )
    folder = locate(NAME)
    assert Package.open(folder).manifest == Package.open(source).manifest
    hub.asked.clear()
    assert locate(NAME) == folder
    assert len(hub.asked) == 1
    blob = next(path for path in folder.parents[1].glob("blobs/*") if path.samefile(folder / "manifest.json"))
    assert blob.stat().st_nlink == 2, "no byte is there twice"


# The client's settings, each in a process that begins with them

SCRIPT = """
import json, sys
from latentrt.checkpoints.find import locate
from latentrt.engines.errors import LatentrtError
assert "huggingface_hub" not in sys.modules
try:
    print(json.dumps(str(locate(sys.argv[1]))))
except LatentrtError as error:
    print(json.dumps([type(error).__name__, str(error)]))
if len(sys.argv) > 2:
    assert "huggingface_hub" not in sys.modules
"""


def run(model: str | Path, *words: str, **settings: str) -> Any:
    mine = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    command = [sys.executable, "-W", "error", "-c", SCRIPT, str(model), *words]
    done = subprocess.run(
        command, env={**mine, **settings}, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stderr == "", "no bar of the client's"
    return json.loads(done.stdout)


def test_the_clients_settings_are_honoured(hub: Hub, tiny: Repository, tmp_path: Path) -> None:
    home, settings = tmp_path / "a home", {"HF_ENDPOINT": hub.url}
    tiny.token = SECRET
    kind, text = run(NAME, HF_HOME=str(home), **settings)
    assert (kind, "neither a path here nor a model" in text) == ("DownloadError", True)
    kind, text = run(NAME, HF_HOME=str(home), HF_HUB_OFFLINE="1", **settings)
    assert (kind, "HF_HUB_OFFLINE is set" in text) == ("DownloadError", True)
    folder = Path(run(NAME, HF_HOME=str(home), HF_TOKEN=SECRET, **settings))
    assert folder == home / "hub" / "models--some-one--tiny" / "snapshots" / tiny.commit
    agents = {one.headers["user-agent"] for one in hub.asked}
    assert all("latentrt/" in agent and "torch" not in agent for agent in agents)
    assert {one.path.split("/")[1] for one in hub.asked if one.host == "hub"} == {"api", "some-one"}
    hub.asked.clear()
    assert run(NAME, HF_HOME=str(home), HF_HUB_OFFLINE="1", **settings) == str(folder)
    assert hub.asked == []


def test_a_local_path_needs_no_client(hub: Hub, tmp_path: Path) -> None:
    assert run(tmp_path, "without", HF_ENDPOINT=hub.url) == str(tmp_path)
    assert hub.asked == []
