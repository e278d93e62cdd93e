"""`latentrt export-triton`: a model repository for NVIDIA's Triton."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from ..engines.errors import UsageError
from .shown import show, tell


def export_triton(
    model: Annotated[str, Argument(help="What is served, as `latentrt generate -m` takes it.")],
    output: Annotated[Path, Option("--output", "-o", help="The repository; it may have other models.")],
    name: Annotated[str, Option(help="What Triton calls it.")] = "latentrt",
    device: Annotated[str, Option(help="cpu, or cuda: one instance for each GPU.")] = "cpu",
    backend: Annotated[str, Option(help="What executes it there.")] = "auto",
    rows: Annotated[int | None, Option(help="Rows of a call of the UNet. Default: measured.")] = None,
    instances: Annotated[int, Option(help="On a CPU: how often it is opened.")] = 1,
    lora_dir: Annotated[Path | None, Option("--lora-dir", help="A folder of adapters.")] = None,
    nets: Annotated[
        str,
        Option(help="Nets of a package as models of Triton's ONNX Runtime: unet,vae_decoder."),
    ] = "",
    as_json: Annotated[bool, Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a model repository of Triton's, in which one model draws whole pictures.

    With --nets, nets of a package are models instead, for who puts a pipeline together there.
    """
    from ..checkpoints.find import here
    from ..checkpoints.hub.ids import is_hub_id
    from ..engines.package import Package
    from ..hosts.triton.nets import write_nets
    from ..hosts.triton.repository import TritonModel, check_model, write_repository
    from ..runtime.model import SHIPPED

    found = None if model in SHIPPED else here(model)
    if model not in SHIPPED and found is None and not is_hub_id(model):
        raise UsageError(
            f"{model[:200] or 'the model'} is not here",
            expected="a file or folder, a name of `latentrt models`, or a model of a hub",
            fix="Check the path.",
        )
    kind: Any = device
    written = TritonModel(
        model=model if found is None else str(found.resolve()),
        name=name,
        device=kind,
        backend=backend,
        rows=rows,
        count=instances,
        loras=None if lora_dir is None else lora_dir.resolve(),
    )
    if nets:
        check_model(written)
        package = Package.open(SHIPPED.get(model, Path(model)))
        names = [net.strip() for net in nets.split(",")]
        folders = list(map(str, write_nets(package, names, written, output)))
        show(json.dumps({"models": folders}) if as_json else "\n".join(folders))
        return
    folder = write_repository(written, output)
    if as_json:
        print(json.dumps({"model": str(folder)}))
        return
    show(str(folder))
    tell(f"serve it: tritonserver --model-repository {output.resolve()} --disable-auto-complete-config")
    tell("with latentrt in the Python that stands first in PATH there")
