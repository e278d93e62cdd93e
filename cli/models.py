"""What commands that open a model share: the options of checkpoints, which packages do not take."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Option

if TYPE_CHECKING:
    from ..runtime.model import CheckpointOptions

Dtype = Annotated[
    Literal["fp16", "fp32"] | None,
    Option(help="A checkpoint's arithmetic. Default: fp32 on a CPU, fp16 on a GPU."),
]
Vae = Annotated[
    Path | None, Option(help="Another autoencoder in place of the checkpoint's: a folder or a file.")
]
TinyVae = Annotated[Path | None, Option(help="A tiny autoencoder (TAESD) for previews: a folder or a file.")]
PredictionType = Annotated[
    Literal["epsilon", "v_prediction"] | None,
    Option(help="What a checkpoint's UNet predicts, if it does not say it."),
]


def options_of(
    dtype: Literal["fp16", "fp32"] | None,
    vae: Path | None,
    tiny_vae: Path | None,
    prediction_type: Literal["epsilon", "v_prediction"] | None,
) -> CheckpointOptions:
    """The options as they were given."""
    from ..runtime.model import CheckpointOptions

    return CheckpointOptions(dtype=dtype, vae=vae, tiny_vae=tiny_vae, prediction_type=prediction_type)


def say(line: str) -> None:
    """Tell the user what was assumed about a checkpoint, or left out."""
    print(line, file=sys.stderr)
