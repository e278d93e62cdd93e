"""Entries of the cache as an opening leaves them, without a checkpoint to open."""

import json
import os
import time
from pathlib import Path
from typing import Any

from latentrt.checkpoints.entries import OPENED, Note, manifest_sha256, write_note
from latentrt.engines.package import MANIFEST, file_record
from latentrt.engines.store.engine_store import EngineStore
from latentrt.runtime.model import SHIPPED

_DAY = 86400  # seconds


def put_entry(
    store: EngineStore, number: int, *, path: str = "", days: float = 0.0, size: int = 1000, **changed: Any
) -> Path:
    """An entry with a file of its own and none of a user's, as if it had been opened `days` ago."""
    store.make()
    folder = store.checkpoints / f"{number:064x}"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "loop.onnx").write_bytes(bytes([number]) * size)
    manifest = json.loads((SHIPPED["demo"] / MANIFEST).read_text(encoding="utf-8"))
    manifest["files"] = {"unet/loop.onnx": vars(file_record(folder / "unet" / "loop.onnx"))}
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    text = {
        "hub": "",
        "vae": "",
        "tiny_vae": "",
        "prediction_type": "",
        "created": "2026-11-29T08:00:00+00:00",
    }
    note = Note(
        **{
            **text,
            "name": Path(path).stem or f"model{number}",
            "family": "sd1",
            "dtype": "fp32",
            "path": path or str(store.root / f"model{number}.safetensors"),
            "files": {},
            "manifest": manifest_sha256(folder),
            **changed,
        }
    )
    write_note(folder, note)
    used = time.time() - days * _DAY
    os.utime(folder / OPENED, (used, used))
    return folder
