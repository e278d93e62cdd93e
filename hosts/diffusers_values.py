"""Arguments and answers of diffusers' calls, and what they are here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from ..engines.errors import UsageError
from ..runtime.request.parameters import PARAMETERS, nearest
from ..runtime.sampling.config import SCHEDULER_CLASSES

if TYPE_CHECKING:
    import torch

    from ..runtime.sampling.config import SamplerConfig
    from ..runtime.sampling.table import Table

# Theirs by the same name, and what is theirs alone.
_SAME = frozenset(PARAMETERS) - {"seed", "rng", "sampler", "output_type"}
OWN = frozenset(
    {
        *("generator", "output_type", "return_dict", "callback_on_step_end"),
        *("callback_on_step_end_tensor_inputs", "cross_attention_kwargs"),
    }
)
# Of a call: what nothing here is like.
_FOREIGN = frozenset({"prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "ip_adapter_image"})
_SEED_LIMIT = 2**63 - 1


def refuse_foreign(arguments: Mapping[str, Any]) -> None:
    """Raise UsageError for what no pipeline here has."""
    for name in arguments:
        if name in _SAME or name in OWN:
            continue
        near = None if name in _FOREIGN else nearest(name, (*_SAME, *OWN))
        raise UsageError(
            f"the argument {name!r}",
            expected=f"{near!r}" if near else "one that this runtime has a counterpart of",
            fix=f"Write {near}=…" if near else f"Leave {name} out.",
        )
    inputs = list(arguments.get("callback_on_step_end_tensor_inputs", ["latents"]))
    if inputs != ["latents"]:
        raise UsageError(
            f"callback_on_step_end_tensor_inputs is {inputs!r:.80}",
            expected="['latents']",
            fix="Leave it out.",
        )
    extra = set(arguments.get("cross_attention_kwargs", {})) - {"scale"}
    if extra:
        raise UsageError(
            f"cross_attention_kwargs with {', '.join(sorted(map(str, extra)))}",
            expected="scale, of adapters",
            fix="Leave the rest out.",
        )


def picture_of(given: Any) -> Any:
    """As `Pipeline` takes it: the only one of a list; a tensor (3, H, W) of 0 to 1 as an array."""
    several: Sequence[Any] = cast("Sequence[Any]", given) if isinstance(given, (list, tuple)) else (given,)
    one: Any = several[0] if len(several) == 1 else cast(Any, given)
    if not hasattr(one, "detach"):
        return one
    pixels: Any = one.detach().cpu().float().numpy()
    pixels = pixels[0] if pixels.ndim == 4 and len(pixels) == 1 else pixels
    return pixels.transpose(1, 2, 0) if pixels.ndim == 3 else pixels  # (H, W, 3), or (H, W) of a mask


def scale_after(index: int, table: Table, sampler: SamplerConfig) -> float:
    """From a latent here, after a row, to diffusers': its k-samplers add noise to a signal that stays."""
    if SCHEDULER_CLASSES[sampler.scheduler].levels != "k":
        return 1.0
    return float([*table.alpha_bar, table.last_alpha_bar][index + 1]) ** -0.5


def strength_of_loras(own: Mapping[str, Any], active: Sequence[str]) -> dict[str, Any]:
    """diffusers' scale of all adapters, for one call."""
    scale = own.get("cross_attention_kwargs", {}).get("scale")
    return {} if scale is None else {"loras": [(name, scale) for name in active]}


def dtype_name(dtype: Any) -> str:
    """torch.float16 and "fp16" alike."""
    name = str(dtype).removeprefix("torch.")
    return {"float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32"}.get(name, name)


def is_fresh(generator: torch.Generator) -> bool:
    """Whether nobody has drawn from it since it had its seed."""
    import torch

    same = torch.Generator(device=generator.device).manual_seed(generator.initial_seed())
    return torch.equal(generator.get_state(), same.get_state())


def latents_of(generators: Sequence[torch.Generator], shape: tuple[int, ...]) -> Any:
    """(N, C, H/8, W/8) float32: noise as diffusers draws it, each generator's in one draw."""
    import torch

    drawn = [torch.randn(shape, generator=one, device=one.device).cpu() for one in generators]
    return torch.cat(drawn).numpy()


def seeds_of(generators: Sequence[torch.Generator], count: int) -> list[int]:
    """One a picture, each of the next generator. They stay as they are: diffusers draws no seeds."""
    import torch

    copies = [torch.Generator(device=one.device).set_state(one.get_state()) for one in generators]
    drawn = (copies[index % len(copies)] for index in range(count))
    return [int(torch.randint(_SEED_LIMIT, (1,), generator=one, device=one.device)) for one in drawn]


def as_tensors(images: Any, wanted: str) -> Any:
    """What diffusers has for "pt" (N, 3, H, W) and "latent" (N, C, H/8, W/8): tensors."""
    if wanted not in ("pt", "latent"):
        return images
    import torch

    return cast(Any, torch).from_numpy(images if wanted == "latent" else images.transpose(0, 3, 1, 2).copy())
