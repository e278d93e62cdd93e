"""The package: the folder that `latentrt export` writes and everything else reads.

::

    manifest.json                 this module's dataclasses as JSON, and the size and sha256 of every file
    tokenizer/, tokenizer_2/      the checkpoint's own
    <component>/*.onnx            graphs without weights
    <component>/weights.safetensors   under the checkpoint's tensor names; the graphs' external data

A package may come from a stranger: every path in it is checked before any parser opens the file.

A checkpoint that is opened as it is (`checkpoints/opened.py`) is a package too, in the cache, whose weights
files are elsewhere: they are the user's own. Only the code that made it says where; a manifest cannot.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from math import isfinite
from pathlib import Path, PurePosixPath
from typing import Any, cast

from .errors import PackageError, command
from .external_data import check_external_data
from .hub import snapshot
from .installed import upgrade_command
from .lfs import refuse_pointer
from .safetensors_format import first_not_finite
from .spec import NETS, TEXT_ENCODERS, VECTORS, Array, NetSpec

SCHEMA = 2  # 1 had no pictures to start from, and only Stable Diffusion 1.x and 2.x
MANIFEST = "manifest.json"
# What a UNet may see in the vector `time_ids` (SDXL, sections 2.2 and 2.3 of arXiv 2307.01952).
TIME_IDS = (
    "original_height",
    "original_width",
    "crop_top",
    "crop_left",
    "target_height",
    "target_width",
    "aesthetic_score",
)
# What may stand behind the latent: 1 channel of mask (1 is repainted), the latent of the picture without it.
IMAGE_LATENTS = ("mask", "masked_image")
_SINCE_2 = (
    "max_clip_skip",
    "zero_empty_prompt",
    "time_ids",
    "image_latents",
    "image_noise",
    "image_processor",
    "latent_rgb",
    "fused",
    "control",
    "identity",
    "quantised",
)
_EXPORT_AGAIN = "Export the checkpoint again: latentrt export CHECKPOINT -o PACKAGE"
_MANIFEST_LIMIT = 16 * 2**20  # bytes; SD 1.5's manifest has 60 kB


def _require(ok: bool, what: str) -> None:
    if not ok:
        raise ValueError(f"{what} is out of range or of the wrong type")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


@dataclass(frozen=True, kw_only=True)
class NetFile:
    """Where one net lies in the package, and its boundary.

    Attributes:
        graph: the file of its graph.
        weights: the files with its tensors: one in a package that was exported, none for a net without
            weights. All lie in one folder.
        spec: its inputs and outputs.
        fp32_islands: the nodes of an fp16 graph that compute in float32.
    """

    graph: str
    weights: tuple[str, ...]
    spec: NetSpec
    fp32_islands: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise ValueError for names no net could have; another suffix would choose another parser."""
        _require(isinstance(self.graph, str) and self.graph.endswith(".onnx"), "graph")
        _require(all(isinstance(name, str) and bool(name) for name in self.weights), "weights")

    def to_json(self) -> dict[str, Any]:
        """As the manifest stores it."""
        several = list(self.weights) if self.weights[1:] else None
        weights = several or next(iter(self.weights), None)
        data = {"graph": self.graph, "weights": weights, "fp32_islands": list(self.fp32_islands)}
        return {**data, **self.spec.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> NetFile:
        """The reverse of `to_json`."""
        weights = data["weights"]
        return cls(
            graph=data["graph"],
            weights=() if weights is None else (weights,) if isinstance(weights, str) else tuple(weights),
            spec=NetSpec.from_json(data),
            fp32_islands=tuple(data["fp32_islands"]),
        )


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a request gets when it does not say. `sampler=None` is the checkpoint's own scheduler."""

    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    sampler: str | None = None
    height: int = 512
    width: int = 512
    strength: float = 0.8

    def __post_init__(self) -> None:
        """Raise ValueError for values no request could have."""
        for name in ("num_inference_steps", "height", "width"):
            _require(_is_count(getattr(self, name)), f"defaults.{name}")
        for name in ("guidance_scale", "strength"):
            value = getattr(self, name)
            _require(isinstance(value, (int, float)) and isfinite(value), f"defaults.{name}")
        _require(isinstance(self.sampler, (str, type(None))), "defaults.sampler")


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Size in bytes and sha256 (hex) of one file of the package."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Elsewhere:
    """A weights file that is not in the package's folder, as it was when its content was looked at.

    Attributes:
        path: the file itself, no link.
        mtime_ns: when it was last written, as `os.stat` has it.
    """

    path: Path
    mtime_ns: int


@dataclass(frozen=True, kw_only=True)
class FusedAdapter:
    """A LoRA or one of its relatives that is part of a package's weights.

    Attributes:
        name: its file's name without the ending.
        sha256: of the file's content.
        short_hash: AUTOMATIC1111's, of 12 digits.
        strength: as it was given: a number, or a mapping as diffusers' `set_adapters` takes it.
        applied: how many keys of the file are used.
        total: how many there are.
    """

    name: str
    sha256: str
    short_hash: str
    strength: float | Mapping[str, Any]
    applied: int
    total: int

    def __post_init__(self) -> None:
        """Raise ValueError for what no adapter could have."""
        for name in ("name", "sha256", "short_hash"):
            _require(isinstance(getattr(self, name), str), f"fused.{name}")
        _require(isinstance(self.strength, (int, float, Mapping)), "fused.strength")
        for name in ("applied", "total"):
            _require(isinstance(getattr(self, name), int), f"fused.{name}")


# A weight as it is stored, in the checkpoint's layout (out, in, …) -> float32 of the same shape.
Change = Callable[[Array], Array]
_NO_CHANGES: Mapping[str, Change] = {}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a package says of itself.

    What differs between families stands here and in the nets' contracts; no code looks at the family's name.

    Attributes:
        family: for people: sd1, sd2, sdxl, sdxl-refiner, …
        dtype: the arithmetic of the graphs, fp16 or fp32.
        scheduler: the checkpoint's `scheduler_config.json`.
        latent_scale: pixels per latent cell.
        size_multiple: heights and widths must be multiples of it.
        max_clip_skip: how many of the text encoders' last layers a request may leave out.
        zero_empty_prompt: a negative prompt that is not given is a context of zeros (diffusers'
            `force_zeros_for_empty_prompt`).
        time_ids: what the columns of the vector `time_ids` are, of TIME_IDS.
        image_latents: what stands behind the latent in the UNet's input, of IMAGE_LATENTS.
        image_noise: the `scheduler_config.json` of unCLIP's noise on picture embeddings.
        image_processor: the `preprocessor_config.json` of the image encoder.
        latent_rgb: (C + 1, 3): the linear map from a latent to shades 0 ... 1, its offset last; for previews.
        fused: the adapters that are part of the weights, in the order in which they were applied.
        control: of a package of controls: "kind", and how its picture and outputs are treated.
        identity: of a checkpoint that was opened as it is, what it draws with (sha256, hex), whatever its
            files are called; "" for a package that was exported.
        quantised: of a package whose UNet is rounded: its "format", the "capability" of the oldest NVIDIA
            GPUs for it, what was "rounded" and "left_out", and the "relative_l2" to what it was made of.
    """

    name: str
    family: str
    dtype: str
    latent_channels: int
    context_width: int
    scheduler: Mapping[str, Any]
    nets: Mapping[str, NetFile]
    defaults: Defaults = field(default_factory=Defaults)
    latent_scale: int = 8
    max_tokens: int = 77
    size_multiple: int = 8
    max_clip_skip: int = 0
    zero_empty_prompt: bool = False
    time_ids: tuple[str, ...] = ()
    image_latents: tuple[str, ...] = ()
    image_noise: Mapping[str, Any] | None = None
    image_processor: Mapping[str, Any] | None = None
    latent_rgb: tuple[tuple[float, ...], ...] = ()
    fused: tuple[FusedAdapter, ...] = ()
    control: Mapping[str, Any] = field(default_factory=dict[str, Any])
    producer: str = ""
    identity: str = ""
    quantised: Mapping[str, Any] = field(default_factory=dict[str, Any])
    files: Mapping[str, FileRecord] = field(default_factory=dict[str, FileRecord])
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        """Raise ValueError for values no package could have."""
        for name in ("latent_channels", "latent_scale", "max_tokens", "size_multiple"):
            _require(_is_count(getattr(self, name)), name)
        reads_no_text = bool(self.control) and self.context_width == 0
        _require(reads_no_text or _is_count(self.context_width), "context_width")
        _require(isinstance(self.scheduler, Mapping), "scheduler")
        _require(self.dtype in ("fp16", "fp32"), "dtype")
        for name in ("name", "family", "producer"):
            _require(isinstance(getattr(self, name), str), name)
        _require(isinstance(self.max_clip_skip, int) and self.max_clip_skip >= 0, "max_clip_skip")
        _require(isinstance(self.zero_empty_prompt, bool), "zero_empty_prompt")
        _require(isinstance(self.identity, str), "identity")
        rounded = self.quantised
        _require(isinstance(rounded, Mapping) and (not rounded or "format" in rounded), "quantised")
        _require(set(self.time_ids) <= set(TIME_IDS), "time_ids")
        _require(set(self.image_latents) <= set(IMAGE_LATENTS), "image_latents")
        for name in ("image_noise", "image_processor"):
            _require(isinstance(getattr(self, name), (Mapping, type(None))), name)
        _require(self.max_clip_skip < 1000, "max_clip_skip")
        self._check_conditions()
        rows = {len(row) for row in self.latent_rgb}
        _require(not rows or (rows == {3} and len(self.latent_rgb) == self.latent_channels + 1), "latent_rgb")
        _require(all(isfinite(value) for row in self.latent_rgb for value in row), "latent_rgb")

    def _check_conditions(self) -> None:
        """Raise ValueError unless the manifest's conditions of the UNet are those that its nets take."""
        time = self.nets["unet_time"].spec.inputs if "unet_time" in self.nets else ()
        vectors = {item.name: item.shape for item in time if item.name in VECTORS}
        for name, shape in vectors.items():
            _require(len(shape) == 2 and isinstance(shape[1], int), f"the vector {name}")
        if "time_ids" in vectors:
            _require(vectors["time_ids"][1] == len(self.time_ids), "time_ids")
        encoders = [self.nets[name].spec.outputs for name in TEXT_ENCODERS if name in self.nets]
        if "text_embeds" in vectors and encoders:
            pooled = any(item.name == "pooled" for outputs in encoders for item in outputs)
            _require(pooled, "the pooled embedding of the text")
        if "unet" in self.nets:
            taken = any(item.name == "image_latents" for item in self.nets["unet"].spec.inputs)
            _require(taken == bool(self.image_latents), "image_latents")

    def net(self, name: str) -> NetFile:
        """A net of the package. Raises PackageError if it has none of that name."""
        if name not in self.nets:
            use = NETS[name].use if name in NETS else "unknown to this release"
            raise PackageError(
                f"the package {self.name!r} has no net {name!r} ({use})",
                expected=f"one of {', '.join(self.nets)}",
                fix=_EXPORT_AGAIN,
            )
        return self.nets[name]

    @property
    def vectors(self) -> Mapping[str, int]:
        """Name (`spec.VECTORS`) and width of what joins the UNet's time embedding; none for most models."""
        nets = (self.nets[name] for name in ("unet_time", "controlnet_time") if name in self.nets)
        inputs = (item for net in nets for item in net.spec.inputs)
        return {item.name: cast(int, item.shape[1]) for item in inputs if item.name in VECTORS}

    @cached_property
    def sha256(self) -> str:
        """What tells this package from any other that draws something else: all but its name and producer.

        The graphs of an opened checkpoint name its files, so there it is `identity`.
        """
        if self.identity:
            return self.identity
        data = {key: value for key, value in self.to_json().items() if key not in ("name", "producer")}
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """As `manifest.json` stores it."""
        plain = {item.name: getattr(self, item.name) for item in fields(self)}
        # Left out where they say nothing: the sha256 of such packages stays what pictures' records have.
        for name in ("identity", "fused", "control", "quantised"):
            if not plain[name]:
                del plain[name]
        return {
            **plain,
            "scheduler": dict(self.scheduler),
            "defaults": vars(self.defaults),
            "nets": {name: net.to_json() for name, net in self.nets.items()},
            "files": {name: vars(record) for name, record in self.files.items()},
            **({"fused": self.fused_records()} if self.fused else {}),
        }

    def fused_records(self) -> list[dict[str, Any]]:
        """`fused` as JSON, for the manifest and for pictures' records."""
        return [dict(vars(one)) for one in self.fused]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Manifest:
        """The reverse of `to_json`. Raises KeyError, TypeError or ValueError for other data."""
        new = {item.name for item in fields(cls) if item.name in _SINCE_2 and item.name not in data}
        values: dict[str, Any] = {item.name: data[item.name] for item in fields(cls) if item.name not in new}
        values |= {name: tuple(values[name]) for name in ("time_ids", "image_latents") if name in values}
        values["latent_rgb"] = tuple(tuple(row) for row in values.get("latent_rgb", ()))
        values["fused"] = tuple(FusedAdapter(**one) for one in values.get("fused", ()))
        values["defaults"] = Defaults(**data["defaults"])
        values["nets"] = {name: NetFile.from_json(net) for name, net in data["nets"].items()}
        values["files"] = {name: FileRecord(**record) for name, record in data["files"].items()}
        return cls(**values)


def _nothing() -> None: ...


@dataclass(frozen=True, kw_only=True)
class Package:
    """An opened package: a folder whose manifest, sizes and paths have been checked.

    Attributes:
        root: the folder.
        manifest: what it says of itself.
        elsewhere: the weights files, by their names in the manifest, that are not in the folder.
        changes: by part of the checkpoint ("unet") and name of the weight, what nets that are opened compute
            with in place of it.
        opened_with: what a user gave to open a checkpoint, for records: "dtype", "prediction_type", and "vae"
            and "tiny_vae" as {"name", "sha256"}.
    """

    root: Path
    manifest: Manifest
    elsewhere: Mapping[str, Elsewhere] = field(default_factory=dict[str, Elsewhere])
    changes: Mapping[str, Mapping[str, Change]] = field(
        default_factory=dict[str, "Mapping[str, Change]"], compare=False
    )
    opened_with: Mapping[str, Any] = field(default_factory=dict[str, Any], compare=False)
    _let_go: Callable[[], None] = field(default=_nothing, compare=False, repr=False)

    @classmethod
    def open(cls, root: str | Path, *, elsewhere: Mapping[str, Elsewhere] | None = None) -> Package:
        """Read and check a package; the weights themselves are not read.

        Args:
            root: the folder.
            elsewhere: for a package that was made here: where its weights files are.

        Raises:
            PackageError: no package there; a damaged or newer manifest; a file that is missing,
                truncated or outside the package; a graph whose external data leaves the package.
        """
        root = snapshot(Path(root))
        manifest = _read_manifest(root)
        package = cls(root=root, manifest=manifest, elsewhere=elsewhere or {})
        for name, record in manifest.files.items():
            if name in package.elsewhere:
                package._check_elsewhere(name)
            else:
                package._check_file(name, record)
        used = {name for net in manifest.nets.values() for name in (net.graph, *net.weights)}
        used |= {
            path.relative_to(root).as_posix() for path in root.glob("tokenizer*/**/*") if not path.is_dir()
        }
        if unlisted := sorted(used - set(manifest.files)):
            raise PackageError(
                f"{root / MANIFEST} uses {unlisted[0]!r} without listing its size and sha256",
                expected="every file of a net and of the tokenizer under `files`",
                fix=_EXPORT_AGAIN,
            )
        for name, net in manifest.nets.items():
            check_external_data(root / net.graph, package._locations(name))
        return package

    def changes_of(self, net: str) -> Mapping[str, Change]:
        """The changes of the part of the checkpoint that a net is of, which may not read all of it."""
        return self.changes.get(NETS[net].part, _NO_CHANGES) if net in NETS else _NO_CHANGES

    def path(self, name: str) -> Path:
        """The absolute path of a file of the package, by its name in the manifest.

        Whoever opens a net asks for it, which may be long after the package was opened.

        Raises:
            PackageError: the file is gone, or, if it is not in the folder, was written to, since then.
        """
        if name in self.elsewhere:
            self._check_elsewhere(name)
            return self.elsewhere[name].path
        path = (self.root / name).resolve()
        if not path.is_file():
            raise PackageError(
                f"{path} is missing",
                expected="the file that was there when it was opened",
                fix="Open it again.",
            )
        return path

    def close(self) -> None:
        """Let the folder of an opened checkpoint be removed from the cache. May be called twice."""
        self._let_go()

    def weights_folder(self, net: str) -> Path:
        """The folder that a net's graph names its weights files relative to: their own, or a common one."""
        file = self.manifest.nets[net]
        return common_folder(self.path(name) for name in file.weights or (file.graph,))

    def _locations(self, net: str) -> dict[str, int]:
        """What a net's graph may call each of its weights files, and the file's size in bytes."""
        file, folder = self.manifest.nets[net], self.weights_folder(net)
        beside = PurePosixPath(file.graph).parent
        return {
            self.path(name).relative_to(folder).as_posix(): self.manifest.files[name].size
            for name in file.weights
            if name in self.elsewhere or PurePosixPath(name).parent == beside
        }

    def verify(self, names: Iterable[str] | None = None) -> None:
        """Hash these files, or every one. Raises PackageError for the first whose content has changed.

        A file elsewhere was hashed when the package was made; it counts as the same until it is written to.
        """
        for name in self.manifest.files if names is None else names:
            if name in self.elsewhere:
                self._check_elsewhere(name)
                continue
            record, found = self.manifest.files[name], file_record(self.path(name))
            if found != record:
                raise PackageError(
                    f"{self.root / name} has sha256 {found.sha256[:12]}…",
                    expected=f"{record.sha256[:12]}… as the manifest says",
                    fix=_EXPORT_AGAIN,
                )

    def check_weights(self) -> None:
        """Read every weight. Raises PackageError for the first tensor that is not finite.

        Files elsewhere are left out: what a net reads of them was looked at when the package was made.
        """
        used = {name: None for net in self.manifest.nets.values() for name in net.weights}
        for name in (name for name in used if name not in self.elsewhere):
            if tensor := first_not_finite(self.path(name), error=PackageError):
                raise PackageError(
                    f"{self.root / name}: the tensor {tensor!r:.80} has values that are NaN or infinite",
                    expected="finite weights",
                    fix="Export another copy of the checkpoint; this one's weights are damaged.",
                )

    def _check_elsewhere(self, name: str) -> None:
        """Raise PackageError unless a file elsewhere is as it was."""
        known, record = self.elsewhere[name], self.manifest.files.get(name)
        try:
            found = known.path.stat()
        except OSError as error:
            raise PackageError(
                f"{known.path} is gone ({error.strerror})",
                expected="the file that the checkpoint was opened from",
                fix="Put it back, or open the checkpoint where it is now.",
            ) from error
        size = found.st_size if record is None else record.size  # no net reads a file without a record
        if (found.st_size, found.st_mtime_ns) != (size, known.mtime_ns):
            raise PackageError(
                f"{known.path} was written to since the checkpoint was opened",
                expected="a file nobody writes to",
                fix="Open the checkpoint again.",
            )

    def _check_file(self, name: str, record: FileRecord) -> None:
        check_inside(name)
        path = self.root / name
        if not path.is_file():
            raise PackageError(
                f"{path} is missing", expected=f"a file of {record.size} bytes", fix=_EXPORT_AGAIN
            )
        # A link, even within the package, would change what a graph's relative paths mean, and not every
        # release of ONNX Runtime follows one. Hugging Face's cache consists of them.
        if path.resolve() != self.root.resolve() / name:
            raise PackageError(
                f"{path} is a link",
                expected="a package of files, as `latentrt export` writes them",
                fix=f"Copy what the links lead to: {command('cp', '-rL', self.root, 'PACKAGE')}",
            )
        if path.stat().st_size != record.size:
            refuse_pointer(path, PackageError)
            raise PackageError(
                f"{path} has {path.stat().st_size} bytes",
                expected=f"{record.size} bytes (an interrupted copy?)",
                fix="Copy the package again, or export it again: latentrt export CHECKPOINT -o PACKAGE",
            )


def common_folder(files: Iterable[Path]) -> Path:
    """The deepest folder that has all of these files in it."""
    return Path(os.path.commonpath([path.parent for path in files]))


def check_inside(name: str) -> None:
    """Raise PackageError unless `name` is a plain relative path that stays where it is."""
    path = PurePosixPath(name)
    if (
        path.is_absolute()
        or ".." in path.parts
        or "\\" in name
        or ":" in name
        or "\0" in name
        or not path.parts
    ):
        raise PackageError(
            f"the package names the path {name!r}",
            expected="a relative path inside the package",
            fix="Do not use this package: it was not written by latentrt.",
        )


def file_record(path: Path) -> FileRecord:
    """Size and sha256 of a file, read once."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return FileRecord(size=path.stat().st_size, sha256=digest.hexdigest())


def write_manifest(
    root: Path,
    manifest: Manifest,
    *,
    elsewhere: Mapping[str, Elsewhere] | None = None,
) -> Package:
    """Record every file under `root` in the manifest, write it last, and open the result.

    The manifest's `files` has the records of those elsewhere already.
    """
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    files = {**manifest.files, **{name: file_record(root / name) for name in names if name != MANIFEST}}
    complete = replace(manifest, files=files)
    text = json.dumps(complete.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
    (root / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return Package.open(root, elsewhere=elsewhere)


def _read_manifest(root: Path) -> Manifest:
    path = root / MANIFEST
    if root.is_file():
        made = root if root.suffix == ".safetensors" else root.with_suffix(".safetensors")
        export = command("latentrt", "export", made, "-o", "PACKAGE")
        convert = command("latentrt", "convert", root, "-o", made)
        raise PackageError(
            f"{root} is a file",
            expected="a folder that `latentrt export` wrote",
            fix=f"Make one: {export if made == root else f'{convert} && {export}'}",
        )
    if not path.is_file():
        looks = "a diffusers checkpoint" if (root / "model_index.json").is_file() else "no package"
        raise PackageError(
            f"{root} holds {looks}: there is no {MANIFEST}" if root.exists() else f"{root} does not exist",
            expected="a folder that `latentrt export` wrote, or the name of the shipped model, `demo`",
            fix=f"Make one: {command('latentrt', 'export', root, '-o', 'PACKAGE')}"
            if looks[0] == "a"
            else _EXPORT_AGAIN,
        )
    refuse_pointer(path, PackageError)
    try:
        if path.stat().st_size > _MANIFEST_LIMIT:
            raise ValueError(f"it has {path.stat().st_size} bytes")
        data = json.loads(path.read_text(encoding="utf-8"))
        schema = int(data["schema"])
        if schema <= SCHEMA:
            return Manifest.from_json(cast(dict[str, Any], data))
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise PackageError(
            f"{path} is damaged ({type(error).__name__}: {error})",
            expected=f"a package manifest of schema {SCHEMA}",
            fix=_EXPORT_AGAIN,
        ) from error
    raise PackageError(
        f"{path} has schema {schema}",
        expected=f"at most {SCHEMA}, the newest this release reads",
        fix=f"Upgrade: {upgrade_command()}",
    )
