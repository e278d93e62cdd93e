"""Pictures with adapters against diffusers, whose weights have the sum that LyCORIS' formulas give.

Random weights answer to everything: a layer that is left out, a wrong strength or a stale invariant shows in
every pixel. Files are kohya's and LyCORIS', written here; `test_another_strength_is_another_picture` is the
negative control.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from lycoris.functional import locon, loha, lokr
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from latentrt.export import export_package
from latentrt.runtime import Pipeline
from tests.parity_pair import BAR, Pair, blob, drawn, exported, ours, photo, psnr

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*__array.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]

MODELS = [pytest.param("tiny1", marks=pytest.mark.slow), "tiny2", "xl-tiny"]
RANK, ALPHA = 3, 2.0
SEEN = 40.0  # dB: a picture that is as far from another is another one
Tensors = dict[str, torch.Tensor]
Made = tuple[Tensors, torch.Tensor]  # what a file has of a module, and its weight's delta


def noise(*shape: int, std: float = 1.0, seed: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, std, shape).astype(np.float32))


def low_rank(shape: tuple[int, ...], seed: int) -> Made:
    made, read, *kernel = shape
    down = noise(RANK, read, *kernel, std=(read * int(np.prod(kernel))) ** -0.5, seed=[seed, 0])
    up = noise(made, RANK, *(1 for _ in kernel), std=0.6, seed=[seed, 1])
    parts = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(ALPHA)}
    return parts, locon._diff_weight(
        down, up, None, ALPHA / RANK
    )  # its torch form; pyright: ignore[reportPrivateUsage]


def hadamard(shape: tuple[int, ...], seed: int) -> Made:
    made, read = shape[0], int(np.prod(shape[1:]))
    downs = [noise(RANK, read, std=read**-0.5, seed=[seed, n]) for n in (0, 1)]
    ups = [noise(made, RANK, std=3.0, seed=[seed, n]) for n in (2, 3)]
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    parts = dict(zip(names, (ups[0], downs[0], ups[1], downs[1]), strict=True))
    delta = loha.make_weight(downs[0], ups[0], downs[1], ups[1], torch.tensor(ALPHA / RANK))
    return {**parts, "alpha": torch.tensor(ALPHA)}, delta.reshape(shape)


def kronecker(shape: tuple[int, ...], seed: int) -> Made:
    made, read, *kernel = shape
    factors = (2 if made % 2 == 0 else 1, 2 if read % 2 == 0 else 1)
    first = noise(*factors, seed=[seed, 0])
    second = noise(made // factors[0], read // factors[1], *kernel, std=0.3 * read**-0.5, seed=[seed, 1])
    parts = {"lokr_w1": first, "lokr_w2": second, "alpha": torch.tensor(1e10)}
    delta = lokr.make_kron(first, second, 1.0)
    return parts, delta.reshape(shape)


def full(shape: tuple[int, ...], seed: int) -> Made:
    delta = noise(*shape, std=0.5 * int(np.prod(shape[1:])) ** -0.5, seed=[seed])
    return {"diff": delta}, delta


KINDS: Mapping[str, Callable[[tuple[int, ...], int], Made]] = {
    "lora": low_rank,
    "loha": hadamard,
    "lokr": kronecker,
    "full": full,
}
# Where each lands: what is hoisted out of the loop, what stays, what changes prompts.
PLACES = {
    "attention": ("unet", ".attn"),
    "keys and values": ("unet", "attn2.to_"),
    "convolutions": ("unet", "conv"),
    "time": ("unet", "time_emb"),
    "size": ("unet", "add_embedding"),
    "text": ("text_encoder", "_proj"),
    "text 2": ("text_encoder_2", "mlp"),
    "projection": ("text_encoder_2", "text_projection"),
}
PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}


def modules(pair: Pair, component: str, where: str) -> dict[str, torch.nn.Module]:
    net = getattr(pair.reference(pair.kind), component, None)
    found = net.named_modules() if net is not None else ()
    return {
        n: m for n, m in found if where in f".{n}" and getattr(m, "weight", torch.zeros(1)).ndim in (2, 4)
    }


class Adapter:
    """A file, and what LyCORIS makes of it."""

    def __init__(self, pair: Pair, path: Path, kind: str, *places: str, seed: int = 0) -> None:
        self.name, tensors, two = path.stem, Tensors(), pair.folder_name.startswith("xl")
        self.deltas: list[tuple[str, torch.nn.Module, torch.Tensor]] = []
        for place in places:
            component, where = PLACES[place]
            prefix = "lora_te1_" if two and component == "text_encoder" else PREFIXES[component]
            for index, (name, module) in enumerate(modules(pair, component, where).items()):
                parts, delta = KINDS[kind](tuple(module.weight.shape), 1000 * seed + index)
                key = prefix + name.replace(".", "_")
                tensors |= {f"{key}.{part}": value.contiguous() for part, value in parts.items()}
                self.deltas.append((component, module, delta))
        assert self.deltas
        save_file(tensors, path)
        pair.ours.load_lora_weights(path)


@contextmanager
def added(*weighted: tuple[Adapter, Any]) -> Iterator[None]:
    """The reference's weights with these deltas, for as long as the block runs."""
    before: list[tuple[torch.nn.Module, torch.Tensor]] = []
    with torch.no_grad():
        for adapter, strength in weighted:
            for component, module, delta in adapter.deltas:
                share = strength.get(component, 1.0) if isinstance(strength, dict) else strength
                before.append((module, module.weight.clone()))
                module.weight += share * delta
        yield
        for module, weight in reversed(before):
            module.weight.copy_(weight)


class AdaptedPair(Pair):
    def __init__(self, folder: Path, backend: str = "auto") -> None:
        super().__init__(folder, backend)
        self.folder_name = folder.name
        self.kind = "StableDiffusionXLPipeline" if "xl" in folder.name else "StableDiffusionPipeline"

    def differs(
        self,
        loras: list[Any],
        *weighted: tuple[Adapter, Any],
        kind: str = "",
        pipe: Pipeline | None = None,
        **more: Any,
    ) -> float:
        """dB between ours (`pipe`'s) and diffusers' picture; both must be others than without adapters."""
        same = {"prompt": "a red circle", "num_inference_steps": 3, "guidance_scale": 5.0, **more}
        size = {} if "image" in more else {"height": 64, "width": 64}
        plain = ours(self.ours, [3], loras=[], **same, **size)
        found = ours(pipe or self.ours, [3], loras=loras, **same, **size)
        with added(*weighted):
            # The same modules: another class of diffusers is given them, not a copy.
            base = self.reference(self.kind)
            theirs = getattr(diffusers, kind)(**base.components, **_unsafe(kind)) if kind else base
            theirs.set_progress_bar_config(disable=True)
            if "mask_image" in more:  # whose size diffusers does not take from the picture
                size = {"height": 64, "width": 64}
            wanted = drawn(theirs, [3], **same, **size)
        if "mask_image" in more:  # outside of which diffusers puts nothing back
            inside = np.asarray(more["mask_image"])[..., None] >= 128
            wanted = np.where(inside, wanted, np.asarray(more["image"]))
        assert psnr(wanted, plain) < SEEN, "the adapter is not seen"
        return psnr(wanted, found)


def _unsafe(kind: str) -> dict[str, Any]:
    return {} if "XL" in kind else {"requires_safety_checker": False}


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdaptedPair]:
    made = AdaptedPair(exported(tmp_path_factory, request.param))
    yield made
    made.ours.close()


@pytest.fixture(autouse=True)
def _nothing_stays(pair: AdaptedPair) -> Iterator[None]:
    yield
    pair.ours.unload_lora_weights()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(pair: AdaptedPair, kind: str, tmp_path: Path) -> None:
    adapter = Adapter(pair, tmp_path / "all.safetensors", kind, "attention", "convolutions", "time", "text")
    assert pair.differs([("all", 0.8)], (adapter, 0.8)) >= BAR


@pytest.mark.parametrize("place", PLACES)
def test_every_place(pair: AdaptedPair, place: str, tmp_path: Path) -> None:
    """Also what is read once a step ("time", "size": T9), and what projects the pooled embedding (T11)."""
    if not modules(pair, *PLACES[place]):
        pytest.skip("this model has none")
    adapter = Adapter(pair, tmp_path / "some.safetensors", "lora", place)
    assert pair.differs([("some", 1.5)], (adapter, 1.5)) >= BAR


def test_four_at_once_one_of_them_negative(pair: AdaptedPair, tmp_path: Path) -> None:
    strengths = (0.5, -0.4, 0.3, 1.2)
    adapters = [
        Adapter(pair, tmp_path / f"{kind}.safetensors", kind, "attention", "text", seed=seed)
        for seed, kind in enumerate(KINDS)
    ]
    loras = [(adapter.name, strength) for adapter, strength in zip(adapters, strengths, strict=True)]
    assert pair.differs(loras, *zip(adapters, strengths, strict=True)) >= BAR


def test_a_strength_for_each_component(pair: AdaptedPair, tmp_path: Path) -> None:
    adapter = Adapter(pair, tmp_path / "both.safetensors", "lora", "attention", "text")
    strength = {"unet": 0.4, "text_encoder": 1.3}
    assert pair.differs([("both", strength)], (adapter, strength)) >= BAR


@pytest.mark.slow  # it traces every net once more
def test_fused_at_export(pair: AdaptedPair, tmp_path: Path) -> None:
    """A package with two of them in its weights, drawn with in place of the pair's own."""
    kinds = {"lora": ("attention", "text"), "loha": ("convolutions", "time")}
    strengths = (0.8, {"unet": -0.5})
    adapters = [Adapter(pair, tmp_path / f"{kind}.safetensors", kind, *kinds[kind]) for kind in kinds]
    weighted = list(zip(adapters, strengths, strict=True))
    files = [(tmp_path / f"{adapter.name}.safetensors", strength) for adapter, strength in weighted]
    export_package(pair.checkpoint, tmp_path / "fused", dtype="fp32", verify=False, loras=files)
    with Pipeline.open(tmp_path / "fused") as pipe:
        assert pair.differs([], *weighted, pipe=pipe) >= BAR


def test_another_strength_is_another_picture(pair: AdaptedPair, tmp_path: Path) -> None:
    adapter = Adapter(pair, tmp_path / "one.safetensors", "lora", "attention")
    assert pair.differs([("one", 0.7)], (adapter, 0.8)) < BAR


def test_pictures_to_start_from(pair: AdaptedPair, tmp_path: Path) -> None:
    adapter = Adapter(pair, tmp_path / "one.safetensors", "lora", "attention", "time", "text")
    family = pair.kind.removesuffix("Pipeline")
    start = {"image": photo(64, 64), "strength": 0.7, "num_inference_steps": 5}
    loras, weighted = [("one", 0.9)], (adapter, 0.9)
    assert pair.differs(loras, weighted, kind=f"{family}Img2ImgPipeline", **start) >= BAR
    start["mask_image"] = blob(64, 64)
    assert pair.differs(loras, weighted, kind=f"{family}InpaintPipeline", **start) >= BAR


def test_peft_itself(pair: AdaptedPair, tmp_path: Path) -> None:
    """Its own layers at work, and a file as diffusers writes it: alphas of rank, weights and magnitudes."""
    unet = pair.reference(pair.kind).unet
    targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "time_emb_proj"]
    for use_dora in (False, True):
        torch.manual_seed(5)
        unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets, use_dora=use_dora), "peft")
        try:
            with torch.no_grad():
                for name, weight in unet.named_parameters():
                    if "lora_B" in name:
                        weight.normal_(std=0.3)
            state = get_peft_model_state_dict(unet, adapter_name="peft")
            path = tmp_path / f"peft-{use_dora}.safetensors"
            save_file({f"unet.{name}": value.contiguous() for name, value in state.items()}, path)
            pair.ours.load_lora_weights(path)
            assert pair.differs([path.stem]) >= BAR
        finally:
            unet.unload_lora()


def test_sets_follow_each_other(pair: AdaptedPair, tmp_path: Path) -> None:
    """What was drawn before leaves nothing behind (T23, T24): A, B, none, A again, to the byte."""
    pipe: Pipeline = pair.ours
    Adapter(pair, tmp_path / "a.safetensors", "lora", "attention", "text")
    Adapter(pair, tmp_path / "b.safetensors", "lokr", "convolutions", "time", seed=1)
    same = {"prompt": "a ring", "num_inference_steps": 2, "height": 64, "width": 64}
    plain, a, b, none, again = (
        ours(pipe, [1], loras=loras, **same) for loras in ([], ["a"], ["b"], [], ["a"])
    )
    np.testing.assert_array_equal(plain, none)
    np.testing.assert_array_equal(a, again)
    assert psnr(a, plain) < SEEN
    assert psnr(b, plain) < SEEN
    fresh = Pipeline.open(pipe.package.root)
    with fresh:
        fresh.load_lora_weights(tmp_path / "b.safetensors")
        np.testing.assert_array_equal(b, ours(fresh, [1], loras=["b"], **same))
