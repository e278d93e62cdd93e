"""Read what a control is: any file or folder of a ControlNet, a T2I-Adapter or an IP-Adapter."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from ...engines.errors import CheckpointError
from ...engines.hub import snapshot
from ..files.component import DIFFUSERS, TensorHeader, read_component, read_headers
from ..files.file_kinds import FileKind, kind_of_tensors, refuse_other_formats
from ..files.folder_kinds import kind_of_folder
from ..files.ldm_names import Tensors, usual_names
from ..files.leftovers import HARMLESS
from ..files.quantised import refuse_markers, refuse_types
from .control_file import CONTROLNET, IP_ADAPTER, T2I_ADAPTER, ControlFile
from .controlnet import read_controlnet
from .ip_adapter import read_ip_adapter
from .t2i_adapter import read_t2i_adapter

_WANTED = "a ControlNet, a T2I-Adapter or an IP-Adapter of Stable Diffusion 1.x, 2.x or XL"
_READERS: Mapping[str, Callable[[Path, Tensors, Mapping[str, Any] | None], ControlFile]] = {
    CONTROLNET: read_controlnet,
    T2I_ADAPTER: read_t2i_adapter,
    IP_ADAPTER: read_ip_adapter,
}
_WITHOUT_FILE = re.compile(r"reference[-_ ]?(only|adain)", re.IGNORECASE)


def read_control(path: str | Path, *, prefer_fp16: bool = False) -> ControlFile:
    """Read a control's names, shapes and config. No tensor is read, and nothing is unpickled.

    Args:
        path: a `.safetensors` file, a folder in diffusers' layout, or a repository in Hugging Face's cache.
        prefer_fp16: take a folder's `.fp16.safetensors` where both are there.

    Raises:
        CheckpointError: it does not exist, is damaged or a pickle, is something else (which is said), or a
            kind of control that cannot be used (named); its weights are quantised; a tensor is missing,
            unknown or of another shape than its class has.
    """
    root = _alone(snapshot(Path(path)))
    if not root.exists():
        _refuse_missing(root)
    if root.is_file():
        refuse_other_formats(root)
        tensors: Mapping[str, TensorHeader] = usual_names(read_headers(root))
        config = None
        kind = kind_of_tensors(tensors)
    else:
        kind = kind_of_folder(root)
        if kind is None:
            raise CheckpointError(f"{root} has no weights", expected=_WANTED, fix="Check the path.")
        _refuse_kind(root, kind)
        part = read_component(root, kind.name, DIFFUSERS, prefer_fp16=prefer_fp16)
        tensors, config = part.tensors, part.config
    _refuse_kind(root, kind)
    refuse_markers(root, tensors)
    tensors = {name: header for name, header in tensors.items() if not HARMLESS.search(name)}
    found = _READERS[kind.name](root, tensors, config)
    refuse_types(root, found.part.tensors)
    return found


def _alone(root: Path) -> Path:
    """The one safetensors file of a folder without a config, such as an IP-Adapter beside its encoder."""
    if not root.is_dir() or (root / "config.json").exists():
        return root
    files = list(root.glob("*.safetensors"))
    return files[0] if len(files) == 1 else root


def _refuse_missing(root: Path) -> NoReturn:
    found, fix = f"{root} does not exist", "Check the path."
    if _WITHOUT_FILE.search(root.name):
        found = f"{root} is no file: reference-only hooks the UNet's own attention, and is not supported"
        fix = "Use an IP-Adapter to draw after a picture."
    raise CheckpointError(found, expected=_WANTED, fix=fix)


def _refuse_kind(root: Path, kind: FileKind) -> None:
    """Raise CheckpointError for what is no control, or none that can be used, saying what it is."""
    if kind.name not in _READERS:
        raise CheckpointError(f"{root} is {kind.what}", expected=_WANTED, fix=kind.advice(root))
