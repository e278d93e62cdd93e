"""The table of backends: everything that is known of each by name.

A backend's module is imported when somebody loads the backend, not before; nor does this module import
anything, because the command line and the engine store need no more than names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class BackendRow:
    """One row of the table of backends.

    Attributes:
        name: as users write it, and as the keys of engines have it.
        extra: of latentrt, which installs the backend's libraries.
        implementation: the module below this folder that holds the backend, and its name there.
        on_device: whether it is a `DeviceBackend`; else it is a `HostBackend`.
        builds: what `latentrt build` makes for it. Without engines that cover a request nothing runs; layouts
            are measured choices that only make it faster. What builds nothing runs where it is named, or was
            measured to be the fastest (`contest/`).
        approximate: whether it computes more coarsely than the bars of exact packages allow. Then it runs
            where it is named; of packages in fewer bits, also where it was measured to be the fastest.
        tuner: the module below this folder whose `tune_package` measures layouts; "" where engines are built.
        reads: safetensors' names of the types that weights may be stored in, whatever a graph computes with.
    """

    name: str
    extra: str
    implementation: tuple[str, str]
    on_device: bool
    builds: Literal["engines", "layouts", "nothing"]
    approximate: bool = False
    tuner: str = ""
    reads: frozenset[str] = frozenset(("F16", "F32"))

    @property
    def install(self) -> str:
        """The command that installs the backend's libraries."""
        from .installed import install_command

        return install_command(self.extra)

    def load(self) -> Any:
        """The backend (`backend.HostBackend` or `backend.DeviceBackend`); imports its module."""
        module, name = self.implementation
        return getattr(import_module(f".{module}", __package__), name)

    def tune_package(self) -> Callable[..., Any]:
        """The function that measures the layouts of a package's nets; imports its module."""
        return import_module(f".{self.tuner}", __package__).tune_package


# ONNX Runtime's CPU provider and OpenVINO convert every type as they load a graph, whoever runs it then.
_EVERY_FLOAT = frozenset(("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"))

# The best first.
BACKENDS: Mapping[str, BackendRow] = {
    row.name: row
    for row in (
        BackendRow(
            name="onnxruntime-cuda",
            extra="cuda",
            implementation=("onnxruntime.cuda_backend", "ONNXRUNTIME_CUDA"),
            on_device=True,
            builds="layouts",
            tuner="onnxruntime.tuning.cuda",
            reads=_EVERY_FLOAT,
        ),
        BackendRow(
            name="onnxruntime",
            extra="cpu",
            implementation=("onnxruntime.backend", "ONNXRUNTIME"),
            on_device=False,
            builds="layouts",
            tuner="onnxruntime.tuning.cpu",
            reads=_EVERY_FLOAT,
        ),
        BackendRow(
            name="openvino",
            extra="openvino",
            implementation=("openvino.backend", "OPENVINO"),
            on_device=False,
            builds="nothing",
            reads=_EVERY_FLOAT,
        ),
        BackendRow(
            name="openvino-bf16",
            extra="openvino",
            implementation=("openvino.backend", "OPENVINO_BF16"),
            on_device=False,
            builds="nothing",
            approximate=True,
            reads=_EVERY_FLOAT,
        ),
        BackendRow(  # before TensorRT, because pip alone installs it and it builds without a GPU
            name="tensorrt-rtx",
            extra="tensorrt-rtx",
            implementation=("tensorrt.backend", "TENSORRT_RTX"),
            on_device=True,
            builds="engines",
        ),
        BackendRow(
            name="tensorrt",
            extra="tensorrt",
            implementation=("tensorrt.backend", "TENSORRT"),
            on_device=True,
            builds="engines",
        ),
    )
}
