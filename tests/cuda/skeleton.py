"""A skeleton's package with weights of zeros that take no room on the disk: nothing computes with them."""

from __future__ import annotations

import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path

from latentrt.benchmarks import skeletons
from latentrt.engines.package import MANIFEST, FileRecord, Manifest, Package, file_record
from latentrt.engines.spec import TEXT_ENCODERS
from latentrt.runtime.model import SHIPPED

_HEADER = ".header.json"


def zero_package(name: str, folder: Path) -> Package:
    """The package of `benchmarks/models/skeletons/NAME`, written into a new folder."""
    skeleton = skeletons.FOLDER / name
    shutil.copytree(skeleton, folder, ignore=shutil.ignore_patterns(f"*{_HEADER}"))
    manifest = Manifest.from_json(json.loads((skeleton / MANIFEST).read_text(encoding="utf-8")))
    for net, tokenizer in TEXT_ENCODERS.items():
        if net in manifest.nets:
            shutil.copytree(SHIPPED["demo"] / "tokenizer", folder / tokenizer)
    records: dict[str, FileRecord] = {}
    for header in skeleton.rglob(f"*{_HEADER}"):
        target = folder / header.relative_to(skeleton).with_name(header.name.removesuffix(_HEADER))
        size = _write_zeros(target, header.read_bytes())
        # Nobody hashes gigabytes of zeros: it is verified only on request.
        records[target.relative_to(folder).as_posix()] = FileRecord(size=size, sha256="0" * 64)
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder).as_posix()
        if path.is_file() and place != MANIFEST and place not in records:
            records[place] = file_record(path)
    text = json.dumps(replace(manifest, files=records).to_json())
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    return Package.open(folder)


def _write_zeros(path: Path, header: bytes) -> int:
    entries = json.loads(header)
    end = max(entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__")
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        stream.truncate(8 + len(header) + end)
    return 8 + len(header) + end
