"""`latentrt convert`: a pickled checkpoint becomes a safetensors file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from .shown import show


def convert(
    source: Annotated[
        list[Path],
        Argument(help="A .ckpt, .pt, .pth or .bin file that torch.save wrote, or all shards of one."),
    ],
    output: Annotated[
        Path | None,
        Option("--output", "-o", help="The .safetensors file; by default beside the source."),
    ] = None,
    overwrite: Annotated[
        bool, Option("--overwrite", help="Replace an existing file once the new one is complete.")
    ] = False,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write the weights of a pickled checkpoint as safetensors. Nothing that the pickle asks for is run."""
    from ..export.pickles.convert import convert_pickle

    done = convert_pickle(source, output or source[0].with_suffix(".safetensors"), overwrite=overwrite)
    if as_json:
        print(json.dumps({**vars(done), "path": str(done.path)}))
        return
    left_out = f", {done.left_out} entries that are no tensors left out" if done.left_out else ""
    show(f"{done.path}  ({done.tensors} tensors, {done.size / 1e6:.1f} MB{left_out})")
