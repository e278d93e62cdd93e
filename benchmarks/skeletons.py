"""Full-size models without torch.

A skeleton is a package without its weights: manifest, graphs, and the header of every weights file, under
`benchmarks/models/skeletons/` of a checkout (a wheel has the yardstick alone). Filled with random numbers it
has the real model's shapes, so its engines, times and memory are the real model's, and its pictures mean
nothing.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from ..engines.errors import PackageError, UsageError
from ..engines.package import MANIFEST, Manifest, Package, write_manifest
from ..engines.safetensors_format import read_header, write_file
from ..engines.spec import TEXT_ENCODERS
from ..runtime.model import SHIPPED

FOLDER = Path(__file__).resolve().parent / "models" / "skeletons"
_HEADER = ".header.json"
# Numbers drawn once and used over and over: no kernel's time depends on more.
_DRAWN = 1 << 24


def save_skeleton(package: Package, folder: Path) -> None:
    """Write the skeleton of an exported package; tokenizers are left out, as any one serves."""
    manifest = package.manifest
    for name in manifest.files:
        target = folder / name
        if name.startswith("tokenizer"):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".onnx"):
            shutil.copyfile(package.path(name), target)
        else:
            header = read_header(package.path(name), error=PackageError)
            target.with_name(target.name + _HEADER).write_bytes(header.text)
    text = json.dumps(replace(manifest, files={}).to_json(), indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def fill_skeleton(name: str, folder: Path) -> Package:
    """Write the package of a skeleton with random weights: about 1/sqrt(inputs), so that values stay finite.

    Raises UsageError if there is no skeleton of that name, or the folder exists.
    """
    skeleton = FOLDER / name
    if not (skeleton / MANIFEST).is_file() or folder.exists():
        known = ", ".join(sorted(path.parent.name for path in FOLDER.glob(f"*/{MANIFEST}")))
        raise UsageError(
            f"cannot fill the skeleton {name!r} into {folder}",
            expected=f"one of {known}, and a folder that does not exist yet",
            fix="Choose another name or folder.",
        )
    shutil.copytree(skeleton, folder, ignore=shutil.ignore_patterns(f"*{_HEADER}"))
    data = json.loads((skeleton / MANIFEST).read_text(encoding="utf-8"))
    for net, tokenizer in TEXT_ENCODERS.items():
        if net in data["nets"]:
            shutil.copytree(SHIPPED["demo"] / "tokenizer", folder / tokenizer)
    drawn = np.random.default_rng(0).standard_normal(_DRAWN, np.float32)
    for path in sorted(skeleton.rglob(f"*{_HEADER}")):
        target = folder / path.relative_to(skeleton)
        _write_weights(target.with_name(target.name.removesuffix(_HEADER)), path, drawn)
    return write_manifest(folder, Manifest.from_json(data))


def _write_weights(path: Path, header: Path, drawn: np.ndarray[Any, Any]) -> None:
    """The weights file that the skeleton's header describes: ours, so it is written again to the byte."""
    entries: dict[str, dict[str, Any]] = json.loads(header.read_bytes())
    entries.pop("__metadata__", None)

    def content(name: str) -> bytes:
        """Norms near one, biases near zero, the rest by their fan-in."""
        shape, kind = entries[name]["shape"], {"F16": np.float16, "F32": np.float32}[entries[name]["dtype"]]
        size = prod(shape)
        base = 1.0 if len(shape) == 1 and name.endswith("weight") else 0.0
        # 0.58: the deviation of torch's uniform initialisation
        spread = 0.05 if len(shape) < 2 else 0.02 if "embedding" in name else 0.58 * prod(shape[1:]) ** -0.5
        start = crc32(name.encode()) % (_DRAWN // 2)  # all differ: TensorRT stores equal constants once
        values = base + spread * np.resize(drawn[start : start + size], size)
        return values.astype(kind).tobytes()

    write_file(path, {name: (entry["dtype"], entry["shape"]) for name, entry in entries.items()}, content)
