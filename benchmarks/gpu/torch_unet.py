"""Steps of the GPU check that run torch's own UNet, the opponent, in the same minutes: eager, and compiled.

SD 1.5's UNet with random weights, as `sides/diffusers_pipeline.py` runs it: fp16, channels_last, cuDNN's own
search. Nothing of latentrt takes part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from time import perf_counter
from typing import Any

from ...engines.spec import Array
from ..models.recipes import RECIPES
from ..records import Row
from ..sides.contract import Work, missing_modules
from ..sides.diffusers_pipeline import set_up
from .full_size import seconds_of, timed
from .opener import row_of

DEVICE, UNET = "cuda", RECIPES["sd15"].unet
_RUNS = 20
_TOKENS = 77


def torch_unet(mode: str) -> Iterator[Row]:
    """One call for a guided picture of the UNet's own size; `mode` is torch.compile's, "" for none."""
    reason = missing_modules("torch", "diffusers", *(["triton"] if mode else []))
    if reason is None and not import_module("torch").cuda.is_available():
        reason = "torch sees no CUDA device"
    if reason:
        yield row_of("unet", missing=reason)
        return
    began = perf_counter()
    work = _open(mode)
    figures = {"open_s": perf_counter() - began}
    for name in ("first_s", "second_s", "third_s"):
        figures[name] = seconds_of(work)
    samples, medians = timed(work, _RUNS)
    yield row_of("unet", {**figures, **medians, "compile": mode or "no"}, samples=samples)


def _open(mode: str) -> Work:
    import torch

    kind: Any = import_module("diffusers").UNet2DConditionModel
    with torch.device(DEVICE):  # random numbers are drawn there: a CPU takes ten seconds for them
        unet = kind(**UNET).to(dtype=torch.float16, memory_format=torch.channels_last).eval()
        side, channels = UNET["sample_size"], UNET["in_channels"]
        latent = torch.randn(2, channels, side, side).half().to(memory_format=torch.channels_last)
        context = torch.randn(2, _TOKENS, UNET["cross_attention_dim"]).half()
        timestep = torch.tensor(500)
    set_up([unet], half=True, compiled=mode)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    host_s = 0.0

    def call() -> Mapping[str, Array]:
        nonlocal host_s
        began = perf_counter()
        events[0].record()
        with torch.inference_mode():
            unet(latent, timestep, encoder_hidden_states=context, return_dict=False)
        events[1].record()
        host_s = perf_counter() - began
        torch.cuda.synchronize()
        return {}

    return Work(
        call=call,
        figures=lambda: {"device_s": events[0].elapsed_time(events[1]) / 1000, "host_s": host_s},
    )
