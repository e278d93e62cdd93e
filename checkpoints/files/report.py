"""What a file or folder is, said before it is opened: for `latentrt inspect`, and for whoever asks first.

Only JSON, headers and first bytes are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ...engines.errors import DAMAGED_WEIGHTS, CheckpointError, command
from ...engines.hub import snapshot
from ...engines.safetensors_format import ITEM_SIZES, first_not_finite, read_header
from ...engines.spec import TEXT_ENCODERS
from .component import Component, TensorHeader, read_headers, read_json
from .file_kinds import (
    FAMILIES,
    FAMILY_OF_CONTEXT,
    MADE_FOR,
    READS_INPUT,
    base_of,
    kind_of_bytes,
    kind_of_tensors,
)
from .folder_kinds import kind_of_folder, tensors_in
from .ldm_names import Tensors, usual_names
from .open import Checkpoint, refuse_without_index
from .single_file import family_of, open_single_file, parts_of

# Families that no ControlNet is made for.
_UNCONTROLLED = ("sdxl-refiner", "unclip")


@dataclass(frozen=True, kw_only=True)
class PartReport:
    """One part of a checkpoint: tensors, their bytes, and how many are stored in each type ("F16")."""

    tensors: int
    size: int
    types: Mapping[str, int]

    @classmethod
    def of(cls, tensors: Iterable[TensorHeader]) -> PartReport:
        """The report of these tensors."""
        types: dict[str, int] = {}
        size = count = 0
        for tensor in tensors:
            elements = 1
            for extent in tensor.shape:
                elements *= extent
            types[tensor.dtype] = types.get(tensor.dtype, 0) + 1
            size += elements * ITEM_SIZES[tensor.dtype]
            count += 1
        return cls(tensors=count, size=size, types=dict(sorted(types.items())))


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a file or folder is.

    Attributes:
        path: of the file or folder.
        kind: "checkpoint", "lora", "controlnet", "ip-adapter", "t2i-adapter", "unusable-control",
            "embedding", "vae", "tiny-vae", "unet", "text-encoder", "image-encoder", "pickle", "gguf",
            "page", "empty", "damaged", "other", ….
        what: the same for people, with an article.
        family: "sd1", "sd2", "sdxl", "sdxl-refiner", "lcm" or "unclip" of a checkpoint; of an adapter, a
            control or a part the family that it is made for, also "flux", "sd3". None where nothing says it.
        opens: whether it can be opened as a model.
        problem: why it cannot.
        expected: what would have been opened, where there is a problem.
        todo: what to do with it.
        size: in bytes; of a folder's weights.
        tensors: how many there are.
        types: how many tensors are stored in each type.
        parts: a checkpoint's parts that are there.
        missing: those that are not.
        predicts: "epsilon", "v_prediction" or "sample".
        predicts_by: what says so.
        zero_terminal_snr: whether the noise schedule ends without signal.
        channels: of the UNet's input: 4, or 9 for inpainting.
        adapters: the adapters that fit: "lora" and "controlnet" -> the family they must be made for,
            "embedding" -> the widths of its vectors by text encoder.
        notes: what else a user should know.
    """

    path: Path
    kind: str
    what: str
    family: str | None = None
    opens: bool = False
    problem: str = ""
    expected: str = ""
    todo: str
    size: int = 0
    tensors: int = 0
    types: Mapping[str, int] = field(default_factory=dict[str, int])
    parts: Mapping[str, PartReport] = field(default_factory=dict[str, PartReport])
    missing: tuple[str, ...] = ()
    predicts: str | None = None
    predicts_by: str | None = None
    zero_terminal_snr: bool = False
    channels: int | None = None
    adapters: Mapping[str, Any] = field(default_factory=dict[str, Any])
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As `latentrt inspect --json` prints it."""
        return {**asdict(self), "path": str(self.path)}


def report(path: str | Path, check: Callable[[Checkpoint], None] | None = None) -> Report:
    """Say what a file or folder is.

    Args:
        path: any file; a folder in diffusers' layout, of one part, or a repository in Hugging Face's cache.
        check: raises CheckpointError for a checkpoint that was read, and cannot be opened all the same.

    Raises:
        CheckpointError: it does not exist.
    """
    root = snapshot(Path(path))
    if not root.exists():
        raise CheckpointError(
            f"{root} does not exist",
            expected="a file or folder",
            fix="Check the path; names are not downloaded.",
        )
    try:
        return _report_file(root, check) if root.is_file() else _report_folder(root, check)
    except CheckpointError as error:  # no tensor could be described
        size = root.stat().st_size if root.is_file() else 0
        what = f"a damaged or unknown {'file' if root.is_file() else 'folder'}"
        return Report(path=root, kind="damaged", what=what, **_refusal(error), size=size)


def _refusal(error: CheckpointError) -> dict[str, Any]:
    """Why something cannot be opened, by the names of `Report`'s attributes."""
    return {"problem": error.found, "expected": error.expected, "todo": error.fix}


def check_weights(path: Path) -> None:
    """Read every weight of a file, a checkpoint's folder, or a folder of one part.

    Raises:
        CheckpointError: a file cannot be read, or a tensor is not finite: the first one.
    """
    root = snapshot(path)
    if root.is_file():
        files = {root}
    elif (root / "model_index.json").is_file():
        parts = Checkpoint.open(root).parts.values()
        files = {tensor.file for part in parts for tensor in part.tensors.values()}
    else:
        files = {tensor.file for tensor in tensors_in(root)}
    for file in sorted(files):
        if tensor := first_not_finite(file):
            raise CheckpointError(
                f"{file}: the tensor {tensor!r:.200} has values that are NaN or infinite",
                expected="finite weights",
                fix=DAMAGED_WEIGHTS,
            )


def _report_file(path: Path, check: Callable[[Checkpoint], None] | None) -> Report:
    size = path.stat().st_size
    if kind := kind_of_bytes(path):
        return Report(path=path, kind=kind.name, what=kind.what, todo=kind.advice(path), size=size)
    stored, metadata = read_headers(path), read_header(path).metadata
    tensors = usual_names(stored)
    kind, counted = kind_of_tensors(tensors), PartReport.of(stored.values())
    if kind.name == "checkpoint":
        found = _report_checkpoint(path, stored, tensors, check)
        return replace(found, size=size, tensors=counted.tensors, types=counted.types)
    base = base_of(tensors, metadata) if kind.name in MADE_FOR else None
    return Report(
        path=path,
        kind=kind.name,
        what=f"{kind.what} for {FAMILIES[base]}" if base else kind.what,
        family=base,
        todo=kind.advice(path),
        size=size,
        tensors=counted.tensors,
        types=counted.types,
        notes=_adapter_notes(tensors) if kind.name == "lora" else (),
    )


def _adapter_notes(tensors: Mapping[str, TensorHeader]) -> tuple[str, ...]:
    """The ranks of a LoRA, and whether it also scales directions."""
    downs = [t.shape[0] for name, t in tensors.items() if READS_INPUT.search(name) and len(t.shape) > 1]
    low, high = min(downs, default=0), max(downs, default=0)
    notes = [f"rank {low}" if low == high else f"ranks {low} to {high}"] if downs else []
    if any(name.endswith("dora_scale") or ".lora_magnitude_vector" in name for name in tensors):
        notes.append("with magnitudes (DoRA)")
    return tuple(notes)


def _report_checkpoint(
    path: Path, stored: Tensors, tensors: Tensors, check: Callable[[Checkpoint], None] | None
) -> Report:
    """The report of a file with a UNet; without its size."""
    parts: dict[str, PartReport] = {}
    missing: list[str] = []
    for name, (_, found) in parts_of(tensors).items():
        names = dict.fromkeys(tensor.name for tensor in found.values())  # fused projections count once
        if names:
            parts[name] = PartReport.of(stored[name] for name in names)
        else:
            missing.append(name)
    family = family_of(tensors)
    try:
        source = Checkpoint.open(path)
        family, answer = source.family, _checked(source, check)
    except CheckpointError as error:
        answer = _refusal(error)
    kind, what = "checkpoint", f"a checkpoint of {FAMILIES[family]}, in one file"
    if set(parts) == {"unet"}:
        kind, what = "unet", f"a UNet alone of {FAMILIES[family]}"
    facts: dict[str, Any] = {}
    with suppress(CheckpointError):  # the problem is known already
        opened = open_single_file(path, without_vae=True)
        facts = _facts(family, opened.components, opened.scheduler, opened.notes)
        facts["predicts_by"] = opened.predicts_by
    return Report(
        path=path,
        kind=kind,
        what=what,
        family=family,
        opens="problem" not in answer,
        parts=parts,
        missing=tuple(missing),
        **answer,
        **facts,
    )


def _draw_with(path: Path) -> str:
    return f"Draw with it: {command('latentrt', 'generate', 'PROMPT', '-m', path)}"


def _checked(source: Checkpoint, check: Callable[[Checkpoint], None] | None) -> dict[str, Any]:
    """What to do with a checkpoint that was read, and what keeps it from being opened, if anything does."""
    try:
        if check is not None:
            check(source)
    except CheckpointError as error:
        return _refusal(error)
    return {"todo": _draw_with(source.root)}


def _facts(
    family: str, parts: Mapping[str, Component], scheduler: Mapping[str, Any], notes: tuple[str, ...]
) -> dict[str, Any]:
    """What configs say, by the names of `Report`'s attributes."""
    unet = parts["unet"].config
    base = FAMILY_OF_CONTEXT.get(int(unet.get("cross_attention_dim", 0)), family)
    base = family if family in FAMILY_OF_CONTEXT.values() else base
    encoders = {name: parts[name].config.get("hidden_size") for name in TEXT_ENCODERS if name in parts}
    controls = {} if family in _UNCONTROLLED else {"controlnet": base}
    return {
        "predicts": scheduler.get("prediction_type", "epsilon"),
        "zero_terminal_snr": bool(scheduler.get("rescale_betas_zero_snr", False)),
        "channels": unet.get("in_channels", 4),
        "adapters": {"lora": base, **controls, "embedding": encoders},
        "notes": notes,
    }


def _report_folder(root: Path, check: Callable[[Checkpoint], None] | None) -> Report:
    if not (root / "model_index.json").is_file():
        return _report_part(root)
    try:
        opened = Checkpoint.open(root)
    except CheckpointError as error:
        what = f"a diffusers folder ({read_json(root / 'model_index.json').get('_class_name')})"
        return Report(path=root, kind="checkpoint", what=what, **_refusal(error))
    answer = _checked(opened, check)
    parts = {name: PartReport.of(part.tensors.values()) for name, part in opened.parts.items()}
    counted = PartReport.of(tensor for part in opened.parts.values() for tensor in part.tensors.values())
    return Report(
        path=root,
        kind="checkpoint",
        what=f"a checkpoint of {FAMILIES[opened.family]}, a diffusers folder",
        family=opened.family,
        opens="problem" not in answer,
        size=counted.size,
        tensors=counted.tensors,
        types=counted.types,
        parts=parts,
        predicts_by=opened.predicts_by,
        **answer,
        **_facts(opened.family, opened.parts, opened.scheduler, opened.notes),
    )


def _report_part(root: Path) -> Report:
    """A folder that is no pipeline's: of one part, of a PEFT adapter, or of files."""
    kind = kind_of_folder(root)
    if kind is None:
        refuse_without_index(root)
    counted = PartReport.of(tensors_in(root))
    return Report(
        path=root,
        kind=kind.name,
        what=kind.what,
        todo=kind.advice(root),
        size=counted.size,
        tensors=counted.tensors,
        types=counted.types,
    )
