"""ComfyUI's nodes by its published contract: the workflows that ship, run by an executor of the tests' own.

Contract: ComfyUI's `nodes.py` and `execution.py` (v0.3.64): INPUT_TYPES, RETURN_TYPES, FUNCTION,
VALIDATE_INPUTS; IMAGE is (B, H, W, 3) float32 from 0 to 1, MASK (B, H, W), LATENT {"samples":
(B, 4, H/8, W/8)} at the VAE's scale.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from latentrt import Control, Pipeline, UsageError
from latentrt.runtime.model import ADAPTERS, CONTROLS
from tests.parity_pair import photo
from tests.serve.live import live, open_demo

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "integrations" / "comfyui"
PROMPT = "a red circle on a blue background"
FAST: dict[str, Any] = {
    "positive": PROMPT,
    "negative": "",
    "seed": 7,
    "steps": 4,
    "cfg": 7.0,
    "sampler": "euler",
}


class InterruptedHereError(Exception):
    """What ComfyUI raises where its user interrupts."""


class Comfy:
    """What of ComfyUI the nodes import."""

    def __init__(self) -> None:
        self.progress: list[tuple[int, int]] = []
        self.interrupt_at: int | None = None
        self.at_first_step: Callable[[], None] | None = None
        self.files = {
            "checkpoints": {},
            "loras": {path.name: path for path in ADAPTERS["demo"].glob("*.safetensors")},
            "controlnet": {"edges": CONTROLS["demo"] / "edges"},
        }

    def modules(self) -> dict[str, Any]:
        def check() -> None:
            if self.at_first_step is not None:
                self.at_first_step()
            if self.interrupt_at == len(self.progress):
                raise InterruptedHereError

        bar = lambda total: SimpleNamespace(  # noqa: E731
            update_absolute=lambda value, most=None: self.progress.append((value, most or total))
        )
        paths = SimpleNamespace(
            get_filename_list=lambda kind: list(self.files[kind]),
            get_full_path=lambda kind, name: (
                str(self.files[kind][name]) if name in self.files[kind] else None
            ),
        )
        management = SimpleNamespace(throw_exception_if_processing_interrupted=check)
        utils = SimpleNamespace(ProgressBar=bar)
        return {
            "folder_paths": paths,
            "comfy": SimpleNamespace(utils=utils, model_management=management),
            "comfy.utils": utils,
            "comfy.model_management": management,
        }


@pytest.fixture
def comfy(monkeypatch: pytest.MonkeyPatch) -> Comfy:
    made = Comfy()
    for name, module in made.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    return made


@pytest.fixture(scope="module")
def package() -> Iterator[ModuleType]:
    """The folder as ComfyUI imports it."""
    name = "latentrt_of_comfyui"
    spec = importlib.util.spec_from_file_location(
        name, FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    yield module
    for one in sys.modules[f"{name}.nodes"]._open.values():
        one.pipe.close()


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with open_demo() as opened:
        yield opened


# ── ComfyUI's own nodes, and its executor ──────────────────────────────────────────────────────────


class EmptyLatentImage:
    RETURN_TYPES, FUNCTION = ("LATENT",), "generate"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        whole = ("INT", {"min": 1, "max": 16384})
        return {"required": {"width": whole, "height": whole, "batch_size": whole}}

    def generate(self, width: int, height: int, batch_size: int) -> Any:
        return ({"samples": torch.zeros((batch_size, 4, height // 8, width // 8))},)


class _Save:
    RETURN_TYPES, FUNCTION, OUTPUT_NODE = (), "save", True

    def save(self, **given: Any) -> Any:
        return {"saved": given}


class SaveImage(_Save):
    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {"images": ("IMAGE",), "filename_prefix": ("STRING", {})}}


class SaveLatent(_Save):
    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {"samples": ("LATENT",)}}


OWN = {"EmptyLatentImage": EmptyLatentImage, "SaveImage": SaveImage, "SaveLatent": SaveLatent}


def check_value(name: str, declared: Any, value: Any) -> None:
    """What `execution.validate_inputs` checks of a widget's value."""
    kind, options = declared[0], (declared[1] if len(declared) > 1 else {})
    if isinstance(kind, list):
        assert value in kind, f"{name}: {value!r} is none of {kind}"
        return
    {"INT": int, "FLOAT": float, "STRING": str}[kind](value)
    assert kind == "STRING" or options.get("min", value) <= value <= options.get("max", value), name


def execute(workflow: Mapping[str, Any], nodes: Mapping[str, Any]) -> dict[str, Any]:
    """What the output nodes were given, by their numbers."""
    results: dict[str, Any] = {}

    def outputs_of(number: str) -> Any:
        if number not in results:
            told = workflow[number]
            kind = nodes[told["class_type"]]
            declared = kind.INPUT_TYPES()
            known = {**declared["required"], **declared.get("optional", {})}
            assert set(declared["required"]) <= set(told["inputs"]) <= set(known)
            given: dict[str, Any] = {}
            for name, value in told["inputs"].items():
                if isinstance(value, list):
                    source = nodes[workflow[value[0]]["class_type"]]
                    assert source.RETURN_TYPES[value[1]] == known[name][0], "types of a link"
                    given[name] = outputs_of(value[0])[value[1]]
                else:
                    check_value(name, known[name], value)
                    given[name] = value
            results[number] = getattr(kind(), kind.FUNCTION)(**given)
        return results[number]

    ends = [
        number
        for number, told in workflow.items()
        if getattr(nodes[told["class_type"]], "OUTPUT_NODE", False)
    ]
    return {number: outputs_of(number)["saved"] for number in ends}


def shipped(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / "workflows" / f"{name}.json").read_text())


# ── the contract ───────────────────────────────────────────────────────────────────────────────────


def test_every_node_keeps_the_contract(package: ModuleType, comfy: Comfy) -> None:
    nodes = package.NODE_CLASS_MAPPINGS
    assert set(nodes) == set(package.NODE_DISPLAY_NAME_MAPPINGS)
    for name, kind in nodes.items():
        assert name.startswith("Latentrt"), "names are global"
        assert callable(getattr(kind, kind.FUNCTION))
        assert len(kind.RETURN_NAMES) == len(kind.RETURN_TYPES)
        for group, inputs in kind.INPUT_TYPES().items():
            assert group in ("required", "optional")
            for one, declared in inputs.items():
                assert isinstance(declared, tuple)
                assert isinstance(declared[0], (str, list)), one
                if len(declared) > 1 and "default" in declared[1]:
                    check_value(one, declared, declared[1]["default"])


def test_the_registry_has_what_it_wants() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    found = tomllib.loads((FOLDER / "pyproject.toml").read_text())
    assert "comfyui" not in found["project"]["name"].lower().removesuffix("-comfyui")
    assert found["tool"]["comfy"]["PublisherId"]
    assert found["project"]["license"]


# ── the workflows that ship ────────────────────────────────────────────────────────────────────────


def test_a_picture_by_a_workflow(package: ModuleType, comfy: Comfy, pipe: Pipeline) -> None:
    nodes = {**OWN, **package.NODE_CLASS_MAPPINGS}
    (saved,) = execute(shipped("text_to_image"), nodes).values()
    images = saved["images"]
    assert (images.shape, images.dtype) == ((2, 128, 128, 3), torch.float32)
    name = pipe.load_lora_weights(ADAPTERS["demo"] / "striped.safetensors")
    wanted = pipe(
        "a striped red circle on a blue background",
        seed=7,
        num_images_per_prompt=2,
        num_inference_steps=8,
        guidance_scale=7.0,
        sampler="dpmpp_2m",
        loras=[(name, 0.8)],
        output_type="np",
    ).images
    np.testing.assert_array_equal((images.numpy() * 255).round().astype(np.uint8), wanted)
    assert comfy.progress[-1] == (8, 8)


def test_latents_by_a_workflow_are_at_the_vaes_scale(
    package: ModuleType, comfy: Comfy, pipe: Pipeline
) -> None:
    """What comes out is decoded by diffusers' VAE, as ComfyUI's own node would."""
    nodes = {**OWN, **package.NODE_CLASS_MAPPINGS}
    workflow = shipped("latents")
    first = {number: one for number, one in workflow.items() if number != "4"}
    first["5"] = {**first["5"], "inputs": {"samples": ["3", 0]}}
    (drawn,) = execute(first, nodes).values()
    (redrawn,) = execute(workflow, nodes).values()
    vae = AutoencoderKL.from_pretrained(ROOT / "demo" / "checkpoint" / "vae")

    def decoded(samples: Any) -> np.ndarray:
        with torch.no_grad():
            pixels = vae.decode(samples["samples"]).sample[0].permute(1, 2, 0)
        return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().numpy().astype(int)

    parameters = {"num_inference_steps": 8, "guidance_scale": 7.0, "output_type": "np"}
    wanted = pipe(PROMPT, seed=7, sampler="dpmpp_2m", **parameters).images[0]
    assert np.abs(decoded(drawn["samples"]) - wanted).max() <= 2
    latent = pipe(PROMPT, seed=7, sampler="dpmpp_2m", **{**parameters, "output_type": "latent"}).images
    again = pipe(
        "a green star on a blue background", seed=8, sampler="euler", image=latent, strength=0.6, **parameters
    ).images[0]
    assert np.abs(decoded(redrawn["samples"]) - again).max() <= 2


# ── the nodes by themselves ────────────────────────────────────────────────────────────────────────


def model(package: ModuleType, **more: Any) -> Any:
    (made,) = package.NODE_CLASS_MAPPINGS["LatentrtModel"]().choose("demo", device="cpu", **more)
    return made


def image_of(pixels: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(pixels, np.float32)[None] / 255)


def test_a_control_a_picture_and_a_mask(package: ModuleType, comfy: Comfy, pipe: Pipeline) -> None:
    start = np.asarray(photo(64, 64))
    edges = np.zeros((64, 64, 3), np.uint8)
    edges[20:44, 20:44] = 255
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 255
    (steered,) = package.NODE_CLASS_MAPPINGS["LatentrtControl"]().add(
        model(package), "edges", image_of(edges), 0.7, 0.0, 0.9, "canny"
    )
    found, told = package.NODE_CLASS_MAPPINGS["LatentrtPicture"]().draw(
        steered, width=64, height=64, count=1, image=image_of(start),
        mask=torch.from_numpy(mask[None] / np.float32(255)), strength=0.8, **FAST,
    )  # fmt: skip
    pipe.load_control(CONTROLS["demo"] / "edges", "edges")
    control = Control(model="edges", image=edges, strength=0.7, end=0.9, preparation="canny")
    wanted = pipe(
        PROMPT, seed=7, num_inference_steps=4, guidance_scale=7.0, sampler="euler", width=64, height=64,
        image=start, mask_image=mask, strength=0.8, controls=[control], output_type="np",
    )  # fmt: skip
    np.testing.assert_array_equal((found.numpy() * 255).round().astype(np.uint8), wanted.images)
    assert "Steps: 4" in told


def test_who_interrupts_ends_it_within_a_step(package: ModuleType, comfy: Comfy) -> None:
    comfy.interrupt_at = 2
    with pytest.raises(InterruptedHereError):
        package.NODE_CLASS_MAPPINGS["LatentrtPicture"]().draw(
            model(package), width=64, height=64, count=1, **{**FAST, "steps": 50}
        )
    assert [value for value, _ in comfy.progress] == [1, 2]


def test_a_server_draws_the_same(package: ModuleType, comfy: Comfy, pipe: Pipeline) -> None:
    draw: Callable[..., Any] = package.NODE_CLASS_MAPPINGS["LatentrtPicture"]().draw
    pipe.load_lora_weights(ADAPTERS["demo"] / "striped.safetensors")
    with live(pipe) as at:
        (far,) = package.NODE_CLASS_MAPPINGS["LatentrtServer"]().choose(at.url, "demo")
        (far,) = package.NODE_CLASS_MAPPINGS["LatentrtLora"]().add(far, "striped.safetensors", 0.5)
        (near,) = package.NODE_CLASS_MAPPINGS["LatentrtLora"]().add(
            model(package), "striped.safetensors", 0.5
        )
        size = {"width": 64, "height": 64, "count": 2, "image": image_of(photo(64, 64)), "strength": 0.6}
        (one, told), (other, _) = draw(far, **size, **FAST), draw(near, **size, **FAST)
        assert torch.equal(one, other)
        assert "Steps: 4" in told
        with pytest.raises(ValueError, match=r"the server says: .*width"):
            draw(far, **{**size, "width": 60}, **FAST)
        with pytest.raises(UsageError, match=r"a server draws whole pictures.*latentrt picture"):
            package.NODE_CLASS_MAPPINGS["LatentrtSampler"]().sample(far, latent={}, denoise=1.0, **FAST)


@pytest.mark.parametrize(
    "address",
    [
        "http://example.org",
        "https://127.0.0.1:7860",
        "http://127.0.0.1.evil.example",
        "file:///etc/passwd",
        "",
    ],
)
def test_other_addresses_are_refused(package: ModuleType, comfy: Comfy, address: str) -> None:
    kind = package.NODE_CLASS_MAPPINGS["LatentrtServer"]
    assert isinstance(kind.VALIDATE_INPUTS(address), str)
    with pytest.raises(ValueError, match=r"is no http://127\.0\.0\.1:PORT"):
        kind().choose(address)
    assert kind.VALIDATE_INPUTS("http://127.0.0.1:7860") is True


def test_latents_and_pictures_that_nothing_is_drawn_of(package: ModuleType, comfy: Comfy) -> None:
    sample = package.NODE_CLASS_MAPPINGS["LatentrtSampler"]().sample
    latent = {"samples": torch.zeros((1, 4, 8, 8))}
    with pytest.raises(UsageError, match=r"a latent with a noise mask.*Use the node `latentrt picture`"):
        sample(model(package), latent={**latent, "noise_mask": torch.ones((1, 64, 64))}, denoise=1.0, **FAST)
    with pytest.raises(UsageError, match="a latent of 16 channels; expected 4"):
        sample(model(package), latent={"samples": torch.zeros((1, 16, 8, 8))}, denoise=1.0, **FAST)
    assert sample(model(package), latent=latent, denoise=0.0, **FAST) == (latent,)
    two = torch.zeros((2, 64, 64, 3))
    with pytest.raises(UsageError, match="2 pictures to start from"):
        package.NODE_CLASS_MAPPINGS["LatentrtPicture"]().draw(
            model(package), width=64, height=64, count=1, image=two, **FAST
        )


def test_a_batch_of_latents_has_a_seed_each(package: ModuleType, comfy: Comfy) -> None:
    sample = package.NODE_CLASS_MAPPINGS["LatentrtSampler"]().sample
    (both,) = sample(model(package), latent={"samples": torch.zeros((2, 4, 8, 8))}, denoise=1.0, **FAST)
    (second,) = sample(
        model(package), latent={"samples": torch.zeros((1, 4, 8, 8))}, denoise=1.0, **{**FAST, "seed": 8}
    )
    assert torch.equal(both["samples"][1:], second["samples"])


def test_files_of_one_name_in_two_folders_are_two(package: ModuleType, comfy: Comfy, tmp_path: Path) -> None:
    first, second = sorted(ADAPTERS["demo"].glob("*.safetensors"))[:2]
    drawn: list[Any] = []
    for folder, source in (("a", first), ("b", second)):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "style.safetensors"
        path.write_bytes(source.read_bytes())
        comfy.files["loras"][f"{folder}/style.safetensors"] = path
        (styled,) = package.NODE_CLASS_MAPPINGS["LatentrtLora"]().add(
            model(package), f"{folder}/style.safetensors", 1.0
        )
        drawn.append(
            package.NODE_CLASS_MAPPINGS["LatentrtPicture"]().draw(
                styled, width=64, height=64, count=1, **FAST
            )
        )
    assert not torch.equal(drawn[0][0], drawn[1][0])


def test_a_model_that_draws_is_not_closed_for_another(
    package: ModuleType, comfy: Comfy, pipe: Pipeline, tmp_path: Path
) -> None:
    """While one draws, its callback opens more models than there is room for, in another thread."""
    nodes = sys.modules[f"{package.__name__}.nodes"]
    others = [tmp_path / str(number) for number in range(nodes.OPEN_MODELS + 1)]
    for path in others:
        path.symlink_to(ROOT / "demo" / "package")

    def draw(path: Path) -> Any:
        one = nodes.Model(path=str(path), device="cpu")
        return package.NODE_CLASS_MAPPINGS["LatentrtPicture"]().draw(
            one, width=64, height=64, count=1, **FAST
        )[0]

    def meanwhile() -> None:
        comfy.at_first_step, told = None, list(nodes._open)
        assert (str(others[0]), "cpu") in told
        with ThreadPoolExecutor(1) as thread:
            drawn.extend(thread.map(draw, others[1:]))

    drawn: list[Any] = []
    comfy.at_first_step = meanwhile
    first = draw(others[0])
    wanted = pipe(
        PROMPT, seed=7, num_inference_steps=4, guidance_scale=7.0, sampler="euler", width=64, height=64,
        output_type="np",
    ).images  # fmt: skip
    assert len(drawn) == nodes.OPEN_MODELS
    for found in (first, *drawn):
        np.testing.assert_array_equal((found.numpy() * 255).round().astype(np.uint8), wanted)
    assert len(nodes._open) <= nodes.OPEN_MODELS, "room is made as soon as they are idle"


def test_threads_that_ask_for_one_adapter_load_it_once(package: ModuleType, comfy: Comfy) -> None:
    nodes = sys.modules[f"{package.__name__}.nodes"]
    path = str(next(ADAPTERS["demo"].glob("*.safetensors")))
    with nodes.opened(nodes.Model(path="demo", device="cpu")) as pipe, ThreadPoolExecutor(8) as threads:
        names = list(threads.map(lambda _: nodes._named(pipe, path), range(16)))
    assert len(set(names)) == 1
