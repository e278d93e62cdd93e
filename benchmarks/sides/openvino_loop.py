"""The package's graphs in OpenVINO on the CPU, set as for one request; as they are, or in NNCF's int8.

float32 is set: where a processor has bfloat16 (AMX, AVX512-BF16) that is the default, which is another
arithmetic than everyone else's in the same table. Sides that are approximate anyway have the default. Shapes
are fixed before compiling, which OpenVINO's own guide to Stable Diffusion advises, so that a net is compiled
when a case asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np

from ...engines.device import Shapes
from ...engines.package import Manifest, Package
from ...engines.processors import multiplies_bfloat16
from ...engines.spec import Array
from ..case import Case
from .contract import OpenSide, Task, missing_modules, open_whole_package
from .plain_loop import Net, pictures_of, plain_side

_DEVICE = "CPU"
_ROUNDED = "unet_whole"  # by NNCF: what takes the time, as in OpenVINO's own guides
# Whose inputs NNCF measures ranges on. Small pictures, for it keeps in memory what it measures.
_PROMPTS = (
    "a photograph of an astronaut riding a horse",
    "a small green heart on a pink background, oil on canvas",
    "an old city by the sea at dawn, sharp focus",
)
_PIXELS, _STEPS = 256, 2


def available(task: Task) -> str | None:
    """None if it can run here, else the reason."""
    return missing_modules("openvino")


def open_side(task: Task) -> OpenSide:
    """The package, to be compiled case by case. Raises NotAvailableError, PackageError."""
    nets = _Nets(package=open_whole_package(task), threads=task.threads)
    return plain_side("openvino", nets.package, nets.open, nets.versions)


class Bf16:
    """The same in what is OpenVINO's own choice where a processor has bfloat16, a side of its own."""

    @staticmethod
    def available(task: Task) -> str | None:
        """None if it can run here, else the reason."""
        return missing_modules("openvino") or (
            None if multiplies_bfloat16() else "this processor does not multiply bfloat16"
        )

    @staticmethod
    def open_side(task: Task) -> OpenSide:
        """The package, to be compiled case by case. Raises NotAvailableError, PackageError."""
        nets = _Nets(package=open_whole_package(task), threads=task.threads, precision=None)
        return plain_side("openvino-bf16", nets.package, nets.open, nets.versions)


class Nncf:
    """The same with the UNet in int8, a side of its own; what is left in OpenVINO's own precision.

    It is rounded as OpenVINO's guide to latent consistency models does it (openvino_notebooks,
    latent-consistency-models-image-generation): `nncf.quantize` with `ModelType.TRANSFORMER`, without bias
    correction, on inputs of pictures that the same graphs draw.
    """

    @staticmethod
    def available(task: Task) -> str | None:
        """None if it can run here, else the reason."""
        return missing_modules("openvino", "nncf")

    @classmethod
    def open_side(cls, task: Task) -> OpenSide:
        """The package with its UNet rounded. Raises NotAvailableError, PackageError."""
        import nncf

        nets = _Nets(package=open_whole_package(task), threads=task.threads, precision=None)
        nets.models[_ROUNDED] = cls._rounded(nets)
        rounded = {"nncf": str(nncf.__version__), "rounded": _ROUNDED}
        return plain_side("openvino-nncf", nets.package, nets.open, {**nets.versions, **rounded})

    @classmethod
    def _rounded(cls, nets: _Nets) -> Any:
        import nncf

        seen: list[Mapping[str, Array]] = []

        def open_watched(name: str, shapes: Shapes) -> Net:
            net = nets.open(name, shapes)
            return partial(_watched, net, seen) if name == _ROUNDED else net

        list(pictures_of(nets.package, open_watched, _cases(nets.package.manifest)))
        tools: Any = nncf
        return tools.quantize(
            nets.read(_ROUNDED),
            tools.Dataset(seen),
            subset_size=len(seen),
            model_type=tools.ModelType.TRANSFORMER,
            advanced_parameters=tools.AdvancedQuantizationParameters(disable_bias_correction=True),
        )


def _cases(manifest: Manifest) -> Iterator[Case]:
    """What is drawn to measure ranges."""
    size = {name: min(getattr(manifest.defaults, name), _PIXELS) for name in ("width", "height")}
    for seed, prompt in enumerate(_PROMPTS):
        yield Case.of(manifest, **size, steps=_STEPS, seed=seed, prompt=prompt)


def _watched(net: Net, seen: list[Mapping[str, Array]], feeds: Mapping[str, Array]) -> Mapping[str, Array]:
    seen.append({name: np.array(value) for name, value in feeds.items()})
    return net(feeds)


@dataclass(kw_only=True)
class _Nets:
    """A package's graphs, read and compiled.

    Attributes:
        package: the model.
        threads: of the CPU; None is every processor.
        precision: of the arithmetic, as OpenVINO writes it; None is its own choice.
        models: read already, by net, in place of the package's.
    """

    package: Package
    threads: int | None
    precision: str | None = "f32"
    models: dict[str, Any] = field(default_factory=dict[str, Any])

    @cached_property
    def _core(self) -> Any:
        import openvino

        return openvino.Core()

    @property
    def _settings(self) -> dict[str, Any]:
        threads = {"INFERENCE_NUM_THREADS": self.threads} if self.threads else {}
        precision = {"INFERENCE_PRECISION_HINT": self.precision} if self.precision else {}
        return {"PERFORMANCE_HINT": "LATENCY", **precision, **threads}

    @property
    def versions(self) -> dict[str, str]:
        """What it runs on, and how."""
        import openvino

        return {
            "openvino": str(openvino.__version__),
            "device": f"{_DEVICE}: {self._core.get_property(_DEVICE, 'FULL_DEVICE_NAME')}",
            "shapes": "static",
            **{name: str(value) for name, value in self._settings.items()},
        }

    def read(self, name: str) -> Any:
        """A net's graph, of any shapes."""
        return self._core.read_model(str(self.package.path(self.package.manifest.nets[name].graph)))

    def open(self, name: str, shapes: Shapes) -> Net:
        """A net compiled for these shapes."""
        model = self.models[name].clone() if name in self.models else self.read(name)
        model.reshape(dict(shapes))
        compiled = self._core.compile_model(model, _DEVICE, self._settings)
        outputs = [output.name for output in self.package.manifest.nets[name].spec.outputs]
        return partial(_run, compiled, outputs)


def _run(compiled: Any, outputs: list[str], feeds: Mapping[str, Array]) -> dict[str, Array]:
    """By the one request of a compiled net; inputs are read where they lie, outputs are copies."""
    results = compiled(dict(feeds), share_inputs=True)
    return {name: results[name] for name in outputs}
