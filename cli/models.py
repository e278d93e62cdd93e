"""What commands that open a model share: the options of checkpoints, which packages do not take."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Option

from ..runtime.request.parameters import LORAS
from .shown import tell

MODEL = (
    "A checkpoint (file, folder, ORG/NAME of a hub, or its name in `latentrt models`), a package, or `demo`."
)
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
FewSteps = Annotated[
    str | None,
    Option(
        metavar="KIND",
        help="The few-step LoRA among these whose sampler and steps are the defaults: lcm, tcd, dmd2, turbo,"
        " hyper-N, lightning-N. Default: what a file says of itself.",
    ),
]

LoraLenient = Annotated[
    bool, Option("--lora-lenient", help="Go on where the model has no weight for some keys of an adapter.")
]


def lora_files(flag: str, text: str) -> Any:
    """An option for files of adapters with their strengths, spelled as generate's `--lora`."""
    metavar = str(LORAS.metavar).replace("NAME", "FILE", 1)
    return Option(flag, help=f"{text} May be given again.", parser=LORAS.read, metavar=metavar)


_OPTIONS: dict[str, Any] = {
    "dtype": Dtype,
    "vae": Vae,
    "tiny_vae": TinyVae,
    "prediction_type": PredictionType,
    "fused": Annotated[
        list[Any] | None,
        lora_files("--fuse-lora", "An adapter's file that becomes part of a checkpoint's weights."),
    ],
    "few_steps": FewSteps,
}


def with_checkpoint_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that takes `checkpoint` (a `CheckpointOptions`) an option for each of its fields."""

    @wraps(command)
    def with_options(**given: Any) -> None:
        from ..runtime.model import CheckpointOptions

        fields = {name: given.pop(name) for name in _OPTIONS}
        command(**given, checkpoint=CheckpointOptions(**fields))

    signature = inspect.signature(command, eval_str=True)
    own = [item for name, item in signature.parameters.items() if name != "checkpoint"]
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in _OPTIONS.items()
    ]
    parameters = [item for item in own if item.kind is not item.KEYWORD_ONLY]
    parameters += [*options, *(item for item in own if item.kind is item.KEYWORD_ONLY)]
    setattr(with_options, "__signature__", signature.replace(parameters=parameters))  # noqa: B010
    return with_options


def say(line: str) -> None:
    """Tell the user what was assumed about a checkpoint, or left out."""
    tell(line)
