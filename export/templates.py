"""Make the archive of graph templates: `python -m latentrt.export.templates -o FILE`.

Every net of every architecture is traced as an export traces it, on shapes alone, up to the passes that need
no weights. `checkpoints/templates/` reads what is written here.
"""

from __future__ import annotations

import argparse
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import onnx_ir as ir

from ..checkpoints.controls.control_file import KINDS, VISION, ControlFile
from ..checkpoints.files.component import Component
from ..checkpoints.files.open import Checkpoint
from ..checkpoints.files.source import Source
from ..checkpoints.graphs import weights
from ..checkpoints.precision.calibration import components
from ..checkpoints.templates.archive import DTYPES, SHIPPED, Dtype, Graph, Template, write_archive
from ..checkpoints.templates.keys import Defaults, net_key, tensors_digest
from .architectures import ARCHITECTURES, Architecture
from .nets.build import NETS
from .nets.torch_net import SHAPES_ALONE
from .traced import trace

_PRODUCERS = ("torch", "diffusers", "transformers", "onnxscript", "onnx-ir")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A net to trace: of an architecture, for all that have the same key."""

    name: str
    architecture: Architecture
    component: str
    key: Mapping[str, Any]


def make_archive(
    path: Path,
    architectures: Mapping[str, Architecture] = ARCHITECTURES,
    *,
    dtypes: Sequence[Dtype] = DTYPES,
    processes: int = 1,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Trace the nets of `architectures` and write them.

    Args:
        path: the file to write.
        architectures: by names for people; of nets that several have, the first gives its name.
        dtypes: the types to make them in.
        processes: how many nets are traced at once. One takes about 1.2 GB.
        progress: called with a line for each template that is done.
    """
    defaults = class_defaults()
    jobs = tuple(_jobs(architectures, defaults))
    context = get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        make = partial(trace_template, dtypes=dtypes)
        made: Iterable[Template] = map(make, jobs) if processes == 1 else pool.map(make, jobs)
        templates: list[Template] = []
        for job, template in zip(jobs, made, strict=True):
            templates.append(template)
            if progress is not None:
                progress(f"{len(templates)} of {len(jobs)}: {job.component} of {job.name}")
    producer = ", ".join(f"{name} {version(name)}" for name in _PRODUCERS)
    write_archive(path, templates, defaults=defaults, producer=producer)


def _jobs(architectures: Mapping[str, Architecture], defaults: Defaults) -> Iterator[Job]:
    """Each net once, of those with one key and one config: two may have one key and other tensors."""
    seen: list[tuple[Mapping[str, Any], Mapping[str, Any]]] = []
    for name, architecture in architectures.items():
        source = blank_checkpoint(architecture)
        for component in components(source):
            key = net_key(source, component, defaults)
            told = key, architecture.parts[NETS[component].part]
            if told not in seen:
                seen.append(told)
                yield Job(name=name, architecture=architecture, component=component, key=key)


def trace_template(job: Job, dtypes: Sequence[Dtype]) -> Template:
    """Trace a net in each of these types."""
    graphs: dict[str, Graph] = {}
    digests: set[str] = set()
    for dtype in dtypes:
        model, contract = trace(blank_checkpoint(job.architecture), job.component, dtype)
        digests.add(tensors_digest(weights.weight_shapes(model)))
        proto: Any = cast(Any, ir).to_proto(model)
        graphs[dtype] = Graph(content=proto.SerializeToString(deterministic=True), spec=contract)
    (digest,) = digests
    return Template(name=job.name, key=job.key, tensors=digest, graphs=graphs)


def blank_checkpoint(architecture: Architecture) -> Source:
    """A checkpoint or a control without tensors: what the nets' makers take."""
    parts = {
        name: Component(name=name, folder=SHAPES_ALONE, config=config, tensors={})
        for name, config in architecture.parts.items()
    }
    if found := [name for name in KINDS if name in parts]:
        (kind,) = found
        return ControlFile(
            root=SHAPES_ALONE,
            kind=kind,
            family="",
            what="",
            part=parts[kind],
            encoder=parts.get(VISION),
            image_features=architecture.image_features,
        )
    configs: dict[str, Mapping[str, Any]] = {"scheduler": {}}
    if architecture.feature_extractor is not None:
        configs["feature_extractor"] = architecture.feature_extractor
    return Checkpoint(root=SHAPES_ALONE, parts=parts, tokenizers={}, configs=configs, defaults={})


def class_defaults() -> dict[str, dict[str, Any]]:
    """What a part's class takes, and what stands where its config is silent, by the names of `keys`."""
    from diffusers.models.adapter import T2IAdapter
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
    from diffusers.models.controlnets.controlnet import ControlNetModel
    from diffusers.models.controlnets.controlnet_union import ControlNetUnionModel
    from diffusers.models.embeddings import (
        ImageProjection,
        IPAdapterFullImageProjection,
        IPAdapterPlusImageProjection,
    )
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
        StableUnCLIPImageNormalizer,
    )
    from transformers import CLIPTextConfig, CLIPVisionConfig, PretrainedConfig

    kinds = (
        UNet2DConditionModel,
        AutoencoderKL,
        AutoencoderTiny,
        StableUnCLIPImageNormalizer,
        ControlNetModel,
        T2IAdapter,
        ImageProjection,
        IPAdapterFullImageProjection,
        IPAdapterPlusImageProjection,
        ControlNetUnionModel,
    )
    defaults: dict[str, dict[str, Any]] = {}
    for kind in kinds:
        parameters = inspect.signature(cast(Any, kind).__init__).parameters
        defaults[kind.__name__] = {name: item.default for name, item in parameters.items() if name != "self"}
    every = PretrainedConfig().to_dict()  # which no net of CLIP reads
    text, vision = (
        {name: value for name, value in config.to_dict().items() if name not in (*every, "model_type")}
        for config in (CLIPTextConfig(), CLIPVisionConfig())
    )
    return defaults | {
        "CLIPTextModel": text,
        "CLIPTextModelWithProjection": text,
        "CLIPVisionModelWithProjection": vision,
    }


def main(arguments: list[str] | None = None) -> None:
    """Write the archive that ships, or another one."""
    parser = argparse.ArgumentParser(prog="python -m latentrt.export.templates", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=SHIPPED, help="the file to write")
    parser.add_argument("--processes", type=int, default=1, help="nets to trace at once, of 1.2 GB each")
    parsed = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    make_archive(parsed.output, processes=parsed.processes, progress=logging.getLogger("latentrt").info)


if __name__ == "__main__":
    main()
