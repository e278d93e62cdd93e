"""Writes nets of a package as models of Triton's own ONNX Runtime backend, for who puts a pipeline together.

::

    REPOSITORY/NAME-unet/config.pbtxt        its boundary (docs/design.md has what the inputs mean)
    REPOSITORY/NAME-unet/1/model.onnx        the package's graph
    REPOSITORY/NAME-unet/1/weights.safetensors

Source: Triton's user guide, "Model Configuration"; `onnxruntime_backend`, README, release 24.10.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from ...engines.errors import StorageError, UsageError, command
from ...engines.package import NetFile, Package
from ...engines.spec import TensorSpec
from .repository import KINDS, TritonModel, check_name, quoted

_TYPES: Mapping[str, str] = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "uint8": "TYPE_UINT8",
}


def write_nets(package: Package, nets: Iterable[str], model: TritonModel, out: Path) -> list[Path]:
    """Write nets into a repository, each as a model of its own.

    Args:
        package: whose nets; each has a copy of its weights.
        nets: of its manifest.
        model: its `name` is the beginning of theirs, `device` and `count` are those of their instances.
        out: the repository, which may have other models.

    Returns:
        The models' folders.

    Raises:
        UsageError: a name that Triton would not take, or that is taken; a checkpoint that was not exported.
        PackageError: the package has no such net.
        StorageError: the folder cannot be written.
    """
    if package.elsewhere:
        raise UsageError(
            f"{package.manifest.name} is a checkpoint, whose weights are in the files it came in",
            expected="a package, whose nets have files of their own",
            fix="Export it first: latentrt export CHECKPOINT -o PACKAGE",
        )
    wanted = {check_name(f"{model.name}-{net}", out): package.manifest.net(net) for net in nets}
    for name, file in wanted.items():
        try:
            _write(package, file, out / name, config_of_net(name, file, model))
        except OSError as error:
            raise StorageError(
                f"{out / name} cannot be written ({error.strerror})",
                expected="a folder with room for the weights",
                fix=f"Remove what is there ({command('rm', '-r', out / name)}), or choose another: -o FOLDER",
            ) from error
    return [out / name for name in wanted]


def _write(package: Package, file: NetFile, folder: Path, config: str) -> None:
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(config, encoding="utf-8")
    shutil.copyfile(package.path(file.graph), folder / "1" / "model.onnx")
    for name in file.weights:  # the graph names them as they lie beside it
        # No link: libraries of ONNX refuse weights that have another name as well (onnx 1.23).
        shutil.copyfile(package.path(name), folder / "1" / Path(name).name)


def config_of_net(name: str, file: NetFile, model: TritonModel) -> str:
    """`config.pbtxt` of one net. Sizes that a request chooses are -1; batches are part of the shapes."""
    return "\n".join(
        [
            "# Written by `latentrt export-triton --nets`.",
            f"name: {quoted(name)}",
            'platform: "onnxruntime_onnx"',
            "max_batch_size: 0",
            *_tensors("input", file.spec.inputs),
            *_tensors("output", file.spec.outputs),
            f"instance_group [ {{ count: {model.count} kind: {KINDS[model.device]} }} ]",
            "",
        ]
    )


def _tensors(kind: str, tensors: Iterable[TensorSpec]) -> Iterable[str]:
    for tensor in tensors:
        dims = ", ".join(str(size if isinstance(size, int) else -1) for size in tensor.shape)
        described = f"name: {quoted(tensor.name)} data_type: {_TYPES[tensor.dtype]} dims: [ {dims} ]"
        yield f"{kind} [ {{ {described} }} ]"
