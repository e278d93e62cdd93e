"""ControlNets that are stored as a change of a checkpoint's UNet, against diffusers with the sum in torch."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from latentrt import CheckpointError, Control, NumericError, Pipeline
from latentrt.checkpoints import opened
from latentrt.checkpoints.files.tokenizers import write_clip_tokenizer
from latentrt.engines.package import MANIFEST
from latentrt.export.architectures import Architecture
from tests.checkpoints.conftest import SMALL, small_modules, write_lora, write_small
from tests.checkpoints.controls.control_files import to_cldm
from tests.checkpoints.controls.test_with_base import control_lora
from tests.export.ldm_files import PUBLISHED, Tensors
from tests.parity_pair import BAR, drawn, ours, photo, psnr
from tests.traced_graphs import make_archive

SIZE = {"height": 48, "width": 64}
FAST: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 5.0, **SIZE}
HINT = photo(48, 64)
KINDS = ("difference", "lora_controlnet")


def whole_net(unet: Any) -> Any:
    """A ControlNet near the UNet, in float32; its own layers are random."""
    torch.manual_seed(1)
    net: Any = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 12)).float()
    with torch.no_grad():
        for weight in net.parameters():
            weight += torch.randn_like(weight) * (0.02 if weight.any() else 0.2)
    return net.eval()


def changes_of(kind: str, net: Any, unet: Any) -> Tensors:
    """What a file of the kind has, and the ControlNet that it makes with the UNet, which `net` becomes."""
    wanted = net.state_dict()
    base = {name: tensor.float() for name, tensor in unet.state_dict().items()}
    if kind == "difference":
        tensors = {name: value - base[name] if name in base else value for name, value in wanted.items()}
        net.load_state_dict({name: v + base[name] if name in base else v for name, v in tensors.items()})
    else:
        tensors, _ = control_lora(wanted)
        low = {name: 0.05 * value for name, value in tensors.items() if name.endswith(".up")}
        tensors |= low
        made = dict(wanted)
        for name in wanted:
            stem = name.removesuffix(".weight")
            if f"{stem}.up" in tensors:
                change = tensors[f"{stem}.up"].flatten(1) @ tensors[f"{stem}.down"].flatten(1)
                made[name] = base[name] + change.reshape(base[name].shape)
            elif name not in tensors:
                made[name] = base[name]
        net.load_state_dict(made)
    return to_cldm(tensors, net.config) | {kind: torch.zeros(1)}


class Completed:
    """A checkpoint that is opened as it is, ControlNets of both kinds, and diffusers' pipelines with them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.modules = folder, {name: net.float() for name, net in small_modules().items()}
        self.base = write_small(folder / "base.safetensors")
        self.nets: dict[str, Any] = {kind: whole_net(self.modules["unet"]) for kind in KINDS}
        for kind, net in self.nets.items():
            tensors = changes_of(kind, net, self.modules["unet"])
            save_file({n: t.detach().clone().contiguous() for n, t in tensors.items()}, self.file(kind))
        parts = {name: dict(net.config) for name, net in self.modules.items() if name != "text_encoder"}
        configs = {"small": {**parts, "text_encoder": SMALL.text_encoder or {}}}
        configs["control"] = {"controlnet": dict(self.nets[KINDS[0]].config)}
        self.archive = folder / "templates.zip"
        architectures = {name: Architecture(parts=found) for name, found in configs.items()}
        make_archive(self.archive, architectures, dtypes=["fp32"])
        write_clip_tokenizer(folder / "tokenizer", "<|endoftext|>")

    def file(self, kind: str) -> Path:
        return self.folder / f"{kind}.safetensors"

    def reference(self, kind: str) -> Any:
        pipe: Any = diffusers.StableDiffusionControlNetPipeline(
            **self.modules,
            tokenizer=CLIPTokenizer.from_pretrained(self.folder / "tokenizer"),
            controlnet=self.nets[kind],
            scheduler=diffusers.PNDMScheduler.from_config(PUBLISHED["sd1"]),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe


@pytest.fixture(scope="module")
def completed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Completed]:
    made = Completed(tmp_path_factory.mktemp("completed"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opened, "Options", partial(opened.Options, templates=made.archive))
        patch.setenv("LATENTRT_CACHE", str(made.folder / "cache"))
        yield made


@pytest.fixture(scope="module")
def pipe(completed: Completed) -> Iterator[Pipeline]:
    with Pipeline.open(completed.base) as found:
        yield found


@pytest.mark.filterwarnings("ignore:.*__array.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_a_change_of_the_checkpoint(kind: str, completed: Completed, pipe: Pipeline) -> None:
    """A pipeline of a checkpoint needs nothing else; a LoRA that is loaded is in the UNet and not in it."""
    wanted = drawn(completed.reference(kind), [3], prompt="a ring", image=HINT, **FAST)
    name = pipe.load_control(completed.file(kind))
    control = Control(model=name, image=HINT)
    found = ours(pipe, [3], prompt="a ring", controls=[control], **FAST)
    assert psnr(wanted, found) >= BAR
    assert psnr(wanted, ours(pipe, [3], prompt="a ring", **FAST)) < 40

    lora = write_lora(completed.folder / f"{kind}-lora.safetensors", completed.base, {"unet": "attn"})
    adapter = pipe.load_lora_weights(lora)
    pipe.set_adapters(adapter, 0.5)
    again = pipe.load_control(completed.file(kind), "again")
    both = ours(pipe, [3], prompt="a ring", controls=[control], **FAST)
    assert not np.array_equal(both, found), "the UNet has it"
    assert np.array_equal(
        both, ours(pipe, [3], prompt="a ring", controls=[Control(model=again, image=HINT)], **FAST)
    )
    pipe.unload_lora_weights()
    pipe.unload_controls(again)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_computed_is_in_the_cache_once(kind: str, completed: Completed, pipe: Pipeline) -> None:
    """The ControlNet's own weights, each the sum rounded once; its picture's stay in the user's file."""
    name = pipe.load_control(completed.file(kind), f"kept {kind}")
    package = pipe.controls._loaded[name].package  # pyright: ignore[reportPrivateUsage]
    kept = load_file(package.root / "controlnet" / "weights.safetensors")
    wanted = {
        key: tensor
        for key, tensor in completed.nets[kind].state_dict().items()
        if not key.startswith("controlnet_cond_embedding.")
    }
    assert kept.keys() == wanted.keys()
    for key, tensor in kept.items():
        torch.testing.assert_close(tensor.float(), wanted[key], rtol=1e-3, atol=1e-5)
    hint = package.manifest.nets["controlnet_hint"].weights
    assert [package.path(one) for one in hint] == [completed.file(kind)]
    before = (package.root / MANIFEST).stat().st_mtime_ns
    pipe.unload_controls(name)
    pipe.load_control(completed.file(kind), name)
    assert (package.root / MANIFEST).stat().st_mtime_ns == before


def test_another_checkpoint_makes_another(completed: Completed, tmp_path: Path) -> None:
    """The same file beside a checkpoint of other weights is another ControlNet."""
    out = torch.zeros_like(completed.modules["unet"].conv_in.weight).half()
    other = write_small(
        tmp_path / "base.safetensors", **{"model.diffusion_model.input_blocks.0.0.weight": out}
    )
    identities: list[str] = []
    for base in (completed.base, other):
        with Pipeline.open(base) as found:
            name = found.load_control(completed.file("difference"))
            opened_control = found.controls._loaded[name]  # pyright: ignore[reportPrivateUsage]
            identities.append(opened_control.package.manifest.sha256)
    assert len(set(identities)) == 2


def test_a_package_has_no_checkpoint(completed: Completed) -> None:
    with (
        Pipeline.open("demo") as demo,
        pytest.raises(CheckpointError, match=r"is a ControlNet \(difference\) .*a package that was exported"),
    ):
        demo.load_control(completed.file("difference"))


def test_sums_beyond_half_precision_are_refused(completed: Completed, pipe: Pipeline, tmp_path: Path) -> None:
    tensors = load_file(completed.file("difference"))
    tensors["input_blocks.0.0.weight"][0, 0, 0, 0] = 1e5
    save_file(tensors, tmp_path / "large.safetensors")
    with pytest.raises(NumericError, match=r"together make a weight conv_in.weight of 1000"):
        pipe.load_control(tmp_path / "large.safetensors")
