"""Writes a model repository of Triton's: a folder that the server reads at its start.

::

    REPOSITORY/NAME/config.pbtxt      what it takes, gives, and draws with
    REPOSITORY/NAME/1/model.py        a few lines, which call `served.Model`

Source: Triton's user guide, "Model Configuration" and "Model Repository", release 24.10.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...engines.backends import BACKENDS
from ...engines.errors import StorageError, UsageError

Kind = Literal["cpu", "cuda"]
# Name -> type of Triton's, shape without a batch, and whether it must be sent.
INPUTS: Mapping[str, tuple[str, str, bool]] = {
    "prompt": ("TYPE_STRING", "[ 1 ]", True),
    "negative_prompt": ("TYPE_STRING", "[ 1 ]", False),
    "fields": ("TYPE_STRING", "[ 1 ]", False),  # JSON: fields of a job of the server's own
    "image": ("TYPE_UINT8", "[ -1, -1, -1 ]", False),
    "mask_image": ("TYPE_UINT8", "[ -1, -1 ]", False),
}
OUTPUTS: Mapping[str, tuple[str, str]] = {
    "event": ("TYPE_STRING", "[ 1 ]"),  # JSON: what happened, with a picture's file as base64
    "image": ("TYPE_UINT8", "[ -1, -1, 3 ]"),  # of a finished picture, else of no pixels
}
PARAMETERS = ("model", "device", "backend", "rows", "loras")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_BACKENDS = ("auto", *BACKENDS)
KINDS: Mapping[Kind, str] = {"cpu": "KIND_CPU", "cuda": "KIND_GPU"}

_PROGRAM = '''"""Draws for Triton; written by `latentrt export-triton`, for a Python that has latentrt."""

import triton_python_backend_utils
from latentrt.hosts.triton.served import Model


class TritonPythonModel:
    def initialize(self, args):
        self.model = Model(args, triton_python_backend_utils)

    def execute(self, requests):
        self.model.take(requests)

    def finalize(self):
        self.model.end()
'''


@dataclass(frozen=True, kw_only=True)
class TritonModel:
    """What is written.

    Attributes:
        model: a checkpoint or package as `Pipeline.open` takes it, where the server can read it.
        name: of the model in Triton.
        device: where it draws.
        backend: what executes it; "tensorrt" and "tensorrt-rtx" need engines that were built there.
        rows: of a call of the UNet; None is measured at the start.
        loras: a folder of adapters.
        count: instances, each of which opens the model: one for each GPU, or part of a machine.
    """

    model: str
    name: str = "latentrt"
    device: Kind = "cpu"
    backend: str = "auto"
    rows: int | None = None
    loras: Path | None = None
    count: int = 1


def write_repository(model: TritonModel, out: Path) -> Path:
    """Write the model's folder into a repository.

    Args:
        model: what is to be served.
        out: the repository, which may have other models.

    Returns:
        The model's folder.

    Raises:
        UsageError: a name that Triton would not take, or one that the repository has; what no server could
            start with.
        StorageError: the folder cannot be written.
    """
    folder = out / check_name(model.name, out)
    check_model(model)
    try:
        (folder / "1").mkdir(parents=True)
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be written ({error.strerror})",
            expected="a folder for models",
            fix="Choose another one: -o FOLDER",
        ) from error
    (folder / "config.pbtxt").write_text(config_of(model), encoding="utf-8")
    (folder / "1" / "model.py").write_text(_PROGRAM, encoding="utf-8")
    return folder


def check_name(name: str, out: Path) -> str:
    """The name. Raises UsageError for one that Triton would not take, or that the repository has."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"the name {name!r}",
            expected="letters, digits, . _ and -",
            fix="Change it: --name latentrt",
        )
    if (out / name).exists():
        raise UsageError(
            f"{out / name} is there already",
            expected="a name of its own",
            fix="Remove it, or choose another --name",
        )
    return name


def check_model(model: TritonModel) -> None:
    """Raise UsageError for what no server could start with."""
    for name, value, names in (("device", model.device, KINDS), ("backend", model.backend, _BACKENDS)):
        if value not in names:
            raise UsageError(
                f"{name} is {value!r:.80}", expected=f"one of {', '.join(names)}", fix=f"Change --{name}"
            )
    for option, count in (("instances", model.count), ("rows", 1 if model.rows is None else model.rows)):
        if count < 1:
            raise UsageError(f"{option} is {count}", expected="1 or more", fix=f"Change --{option}")
    if not model.model.strip():
        raise UsageError("the model's name is empty", expected="a model", fix="Pass one: demo")
    if model.loras is not None and not model.loras.is_dir():
        raise UsageError(
            f"{model.loras} is no folder", expected="a folder of adapters", fix="Check the path."
        )


def config_of(model: TritonModel) -> str:
    """`config.pbtxt`, the text form of Triton's protobuf `ModelConfig`."""
    told = {
        "model": model.model,
        "device": model.device,
        "backend": model.backend,
        "rows": "" if model.rows is None else str(model.rows),
        "loras": "" if model.loras is None else str(model.loras),
    }
    inputs = [
        f"{{ name: {quoted(name)} data_type: {kind} dims: {dims}{'' if needed else ' optional: true'} }}"
        for name, (kind, dims, needed) in INPUTS.items()
    ]
    outputs = [
        f"{{ name: {quoted(name)} data_type: {kind} dims: {dims} }}" for name, (kind, dims) in OUTPUTS.items()
    ]
    parameters = [
        f"parameters {{ key: {quoted(name)} value: {{ string_value: {quoted(value)} }} }}"
        for name, value in told.items()
        if value
    ]
    return "\n".join(
        [
            "# Written by `latentrt export-triton`.",
            f"name: {quoted(model.name)}",
            'backend: "python"',
            "max_batch_size: 0  # requests are put together by the steps of their pictures",
            "model_transaction_policy { decoupled: true }  # previews come before the picture",
            "input [",
            *(f"  {text}," for text in inputs[:-1]),
            f"  {inputs[-1]}",
            "]",
            "output [",
            *(f"  {text}," for text in outputs[:-1]),
            f"  {outputs[-1]}",
            "]",
            f"instance_group [ {{ count: {model.count} kind: {KINDS[model.device]} }} ]",
            *parameters,
            "",
        ]
    )


def quoted(text: str) -> str:
    """As the text form of protobuf has it, which is JSON's for what stands here."""
    return json.dumps(text)
