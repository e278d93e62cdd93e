"""From the store to a picture through the simulated TensorRT: engines found, chosen, bound, drawn with."""

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentrt import Control
from latentrt.checkpoints.opened import Options, open_control
from latentrt.engines.backends import BACKENDS
from latentrt.engines.cuda.facts import DeviceFacts
from latentrt.engines.device import Device
from latentrt.engines.errors import BackendError, EngineError, NumericError, UsageError
from latentrt.engines.net_weights import net_tensors
from latentrt.engines.package import NetFile, Package
from latentrt.engines.profiles import Profile, net_profiles
from latentrt.engines.store.engine_store import EngineStore, Entry
from latentrt.engines.tensorrt import backend as tensorrt_backend
from latentrt.engines.tensorrt.build import engine_key
from latentrt.engines.tensorrt.builder import BuildOptions, Weights
from latentrt.runtime.loop.device.loop import DeviceLoop
from latentrt.runtime.model import CONTROLS
from latentrt.runtime.pipeline import Pipeline
from tests.engines.host_device import DEVICE_NETS, HostDevice
from tests.engines.simulated_tensorrt import SimulatedLibrary, simulated_engine
from tests.engines.simulated_tensorrt_names import VARIANTS
from tests.engines.tensorrt_setting import row
from tests.parity_pair import photo
from tests.runtime.test_adapters import write

PROMPT = "a red circle on a blue background"
SMALL: dict[str, Any] = {"num_inference_steps": 3, "height": 64, "width": 64, "seed": 3, "output_type": "np"}
GPU = DeviceFacts(
    index=0,
    name="Imagined",
    compute_capability=(8, 9),
    multiprocessors=58,
    driver="580.82",
    cuda="13.0",
    total=2**34,
    unified=False,
    uuid="GPU-0",
)


def fill(
    store: EngineStore,
    package: Package,
    variant: str,
    texts: list[str],
    net: str | None = None,
    options: BuildOptions = BuildOptions(),  # noqa: B008
) -> None:
    """Engines as `latentrt build` would leave them, for one `--profile` list."""
    refittable = options.weights is Weights.refittable
    sources = [Profile.parse(text) for text in texts]
    for name in [net] if net else DEVICE_NETS:
        file = package.manifest.nets[name]
        profiles = net_profiles(name, file.spec, sources)
        key = engine_key(package, name, row(variant), VARIANTS[variant], profiles, options, gpu=GPU)
        marked = [key for key, tensor in net_tensors(package, name).items() if len(tensor.shape) > 1]
        more = {"refittable": marked} if refittable else {"weights": str(package.weights_folder(name))}

        def build(
            path: Path, file: NetFile = file, profiles: Any = profiles, more: Any = more
        ) -> dict[str, Any]:
            path.write_bytes(simulated_engine(variant, package.path(file.graph), profiles, **more))
            return {"profiles": [str(source) for source in sources]}

        store.get_or_build(key, build)


class Bench:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
        self.device = HostDevice()
        self.device.facts = GPU  # pyright: ignore[reportAttributeAccessIssue]
        self.trt = SimulatedLibrary(variant, self.device.submit)
        self.variant, self.backend = variant, variant.partition(" ")[0]
        monkeypatch.setattr(tensorrt_backend, "CudaDevice", lambda _: self.device)
        monkeypatch.setattr(tensorrt_backend, "load", lambda row: self.trt)
        monkeypatch.setattr(tensorrt_backend, "flavour", lambda backend: row(variant))
        monkeypatch.setattr(tensorrt_backend, "installed_version", lambda backend: VARIANTS[variant])

    def open(
        self, package: Package, store: EngineStore, further: Sequence[str] = (), **more: Any
    ) -> Pipeline:
        backend = tensorrt_backend.TensorRTBackend(self.backend)
        names = (*DEVICE_NETS, *further)
        device, nets = backend.open_device(package, names, store=store)
        again = partial(backend.open_another, device, store=store)
        loop = DeviceLoop(_as_device(device), nets, package.manifest, graphs="on", open_net=again)
        return Pipeline.over(package, loop, self.backend, cache_bytes=0, **more)

    def refits(self) -> dict[str, int]:
        """How often each net's weights were replaced so far."""
        counts = self.trt._world.counts
        return {name.removeprefix("refit "): n for name, n in counts.items() if name.startswith("refit ")}


def _as_device(device: Device) -> Device:
    return device


@pytest.mark.parametrize("variant", VARIANTS)
def test_engines_of_the_store_draw_the_hosts_picture(
    package: Package,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variant: str,
) -> None:
    store, bench = EngineStore(tmp_path), Bench(monkeypatch, variant)
    fill(store, package, variant, ["64x64:b1-2", "96x64:b1-2"])
    with Pipeline.open(package.root, backend="onnxruntime") as host:
        wanted = [host(PROMPT, **{**SMALL, "width": width}).images for width in (64, 96)]
    with bench.open(package, store) as pipe:
        for _ in range(3):
            for width, images in zip((64, 96), wanted, strict=True):
                found = pipe(PROMPT, **{**SMALL, "width": width}).images
                assert np.abs(found.astype(int) - images).max() <= 1
        # Each size is plain once before it is captured; the larger one's activations moved the first one's
        # block, so that was plain twice. Each is compared once, by two launches.
        assert bench.device.launches == 3 * 3 + 2 * 2
        addresses = bench.trt._world.counts["address latent"]
        pipe(PROMPT, **SMALL)
        assert bench.trt._world.counts["address latent"] == addresses, "bound once, not once a picture"
    assert not bench.device.blocks


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_engine_takes_any_number_of_embeddings(
    package: Package,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variant: str,
) -> None:
    store, bench = EngineStore(tmp_path), Bench(monkeypatch, variant)
    fill(store, package, variant, ["64x64:b1"])
    rows = np.random.default_rng(0).standard_normal((20, 96), np.float32) / 4
    words = [{"one": rows[:1]}, {"twenty": rows}]
    prompts = ("one", PROMPT, "a twenty, one")
    with Pipeline.open(package.root, backend="onnxruntime") as host:
        host.load_textual_inversion(words)
        wanted = [host(prompt, **SMALL).images for prompt in prompts]
    with bench.open(package, store) as pipe:
        pipe.load_textual_inversion(words)
        for prompt, images in zip(prompts, wanted, strict=True):
            assert np.abs(pipe(prompt, **SMALL).images.astype(int) - images).max() <= 1


def test_a_later_build_is_chosen_where_it_fits(
    package: Package,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, bench = EngineStore(tmp_path), Bench(monkeypatch, "tensorrt-rtx")
    fill(store, package, "tensorrt-rtx", ["64x64:b1"])
    with (
        bench.open(package, store) as pipe,
        pytest.raises(UsageError, match="--profile 64x64:b1 --profile 96"),
    ):
        pipe(PROMPT, **{**SMALL, "width": 96})
    fill(store, package, "tensorrt-rtx", ["96x64:b1"])
    bench = Bench(monkeypatch, "tensorrt-rtx")
    with bench.open(package, store) as pipe:
        pipe(PROMPT, **{**SMALL, "width": 96})
        used = bench.trt._world.counts["deserialised"]
        assert used == len(DEVICE_NETS), "only the engines that serve"
        pipe(PROMPT, **SMALL)
        assert bench.trt._world.counts["deserialised"] > used


def test_missing_engines_name_the_command(
    package: Package,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, bench = EngineStore(tmp_path), Bench(monkeypatch, "tensorrt 11")
    fill(store, package, "tensorrt 11", ["64x64:b1"], net="unet")
    with pytest.raises(
        BackendError, match=r"no tensorrt 11.* engines of text_encoder.*sm_89.*latentrt build"
    ):
        bench.open(package, store)
    assert not bench.device.blocks


def test_a_damaged_engine_is_never_deserialised(
    package: Package,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, bench = EngineStore(tmp_path), Bench(monkeypatch, "tensorrt 10")
    fill(store, package, "tensorrt 10", ["64x64:b1"])
    for entry in store.entries():
        data = bytearray(
            (entry.path / "engine.bin").read_bytes() if entry.path.is_dir() else entry.path.read_bytes()
        )
        data[-2] ^= 1
        (entry.path / "engine.bin" if entry.path.is_dir() else entry.path).write_bytes(data)
    with bench.open(package, store) as pipe, pytest.raises(EngineError):
        pipe(PROMPT, **SMALL)
    assert bench.trt._world.counts["deserialised"] == 0


def test_a_picture_says_which_profile_drew_it(
    package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, bench = EngineStore(tmp_path), Bench(monkeypatch, "tensorrt-rtx")
    fill(store, package, "tensorrt-rtx", ["64x64:b1-4", "64-128@128x64:b2"])
    with bench.open(package, store) as pipe:
        for change, expected in (
            ({}, "64x64 b1-4 guided"),
            ({"guidance_scale": 1.0}, "64x64 b1-4"),
            ({"width": 128, "num_images_per_prompt": 2}, "64-128@128x64 b2 guided"),
        ):
            assert pipe(PROMPT, **{**SMALL, **change}).producer["profile"].startswith(expected)


# ── adapters ─────────────────────────────────────────────────────────────────────────────────────────────

# The nets that each file of `write` changes, as the simulation counts them.
CHANGED = {
    "loop": {"unet/loop"},
    "keys": {"unet/context"},
    "time": {"unet/time"},
    "text": {"text_encoder/model"},
}
REFITTABLE = BuildOptions(weights=Weights.refittable)


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    for where in CHANGED:
        write(folder / f"{where}.safetensors", where)
    return folder


def filled(folder: Path, package: Package, variant: str) -> EngineStore:
    """A store with engines of both kinds."""
    store = EngineStore(folder)
    fill(store, package, variant, ["64x64:b1"])
    fill(store, package, variant, ["64x64:b1"], options=REFITTABLE)
    return store


def draw(pipe: Pipeline, *loras: Any, **more: Any) -> np.ndarray:
    return pipe(PROMPT, loras=list(loras), **{**SMALL, **more}).images


@pytest.mark.parametrize("variant", VARIANTS)
def test_sets_of_adapters_draw_the_hosts_pictures(
    package: Package, loras: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    """Those of engines are rounded to the file's half precision, those of ONNX Runtime are not."""
    store, bench = filled(tmp_path, package, variant), Bench(monkeypatch, variant)
    sets: list[list[Any]] = [[name] for name in CHANGED] + [[], [("loop", -0.5), "keys", ("text", 0.4)]]
    with Pipeline.open(package.root, backend="onnxruntime", loras=loras) as host:
        wanted = [draw(host, *chosen) for chosen in sets]
    with bench.open(package, store, loras=loras) as pipe:
        refits = dict[str, int]()
        for chosen, images in zip(sets, wanted, strict=True):
            np.testing.assert_allclose(draw(pipe, *chosen).astype(int), images, atol=1)
            new = {name for name, count in bench.refits().items() if count > refits.get(name, 0)}
            names = {one if isinstance(one, str) else one[0] for one in chosen}
            assert new == set[str]().union(*(CHANGED[name] for name in names)), "and no net else"
            refits = bench.refits()
        for chosen in sets:  # each is still open
            draw(pipe, *chosen)
        assert bench.refits() == refits
    assert not bench.device.blocks
    assert not bench.device.graphs


def test_swaps_among_sets_leave_nothing_behind(
    package: Package, loras: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T24 and T27: whichever sets were drawn before, and whether or not they are still open."""
    store, bench = filled(tmp_path, package, "tensorrt-rtx"), Bench(monkeypatch, "tensorrt-rtx")
    few = {"num_inference_steps": 1}
    sets: list[list[Any]] = [[], [("loop", 0.4)], ["keys"], [("time", -0.5), "text"], ["loop", ("keys", 0.3)]]
    wanted = list[np.ndarray]()
    for chosen in sets:
        with bench.open(package, store, loras=loras) as fresh:
            wanted.append(draw(fresh, *chosen, **few))
    order = random.Random(0)
    for limit in (0, 2**30):
        with bench.open(package, store, loras=loras, adapted_bytes=limit) as pipe:
            for _ in range(12):
                index = order.randrange(len(sets))
                np.testing.assert_array_equal(draw(pipe, *sets[index], **few), wanted[index])
        assert not bench.device.blocks


def test_without_adapters_the_plain_engines_serve(
    package: Package, loras: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T34: with marks and without, the base's picture is the same; engines with marks serve where others do
    not cover the size.
    """
    store, bench = filled(tmp_path, package, "tensorrt-rtx"), Bench(monkeypatch, "tensorrt-rtx")
    marked = EngineStore(tmp_path / "marked")
    fill(marked, package, "tensorrt-rtx", ["64x64:b1"], options=REFITTABLE)
    opened = list[bool]()
    real = tensorrt_backend.open_entry

    def counted(of: Any, entry: Entry, *rest: Any) -> Any:
        opened.append("REFIT_INDIVIDUAL" in entry.key.flags)
        return real(of, entry, *rest)

    monkeypatch.setattr(tensorrt_backend, "open_entry", counted)
    with bench.open(package, store, loras=loras) as pipe:
        plain = draw(pipe)
        assert opened == [False] * len(DEVICE_NETS)
        draw(pipe, "loop")
        assert opened[len(DEVICE_NETS) :] == [True]
    with bench.open(package, marked, loras=loras) as pipe:
        np.testing.assert_array_equal(draw(pipe), plain)
        assert bench.refits() == {"unet/loop": 1}


def test_without_refittable_engines_the_command_that_builds_them(
    package: Package, loras: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, bench = EngineStore(tmp_path), Bench(monkeypatch, "tensorrt 11")
    fill(store, package, "tensorrt 11", ["64x64:b1", "96x64:b1"])
    with bench.open(package, store, loras=loras) as pipe:
        plain = draw(pipe)
        for _ in range(2):
            with pytest.raises(
                BackendError, match=r"no tensorrt 11.* engine of unet_context .*sm_89"
            ) as caught:
                draw(pipe, "keys", "loop")
            assert caught.value.fix.endswith("--weights refittable --nets unet_context,unet")
        fill(store, package, "tensorrt 11", ["64x64:b1"], options=REFITTABLE)
        assert not np.array_equal(draw(pipe, "keys", "loop"), plain), "the next request finds new engines"
        with pytest.raises(UsageError, match="covers 96x64 pixels") as missing:
            draw(pipe, "keys", "loop", width=96)
        assert "--weights refittable --profile 64x64:b1 --profile 96x64" in missing.value.fix
        np.testing.assert_array_equal(draw(pipe), plain)


def test_weights_that_cannot_be_replaced_leave_nothing(
    package: Package, loras: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, bench = filled(tmp_path, package, "tensorrt-rtx"), Bench(monkeypatch, "tensorrt-rtx")
    with bench.open(package, store, loras=loras) as pipe:
        pipe.load_lora_weights(write(tmp_path / "beyond.safetensors", "loop", scale=1e6))
        plain, wanted = draw(pipe), draw(pipe, "loop")
        for _ in range(2):
            with pytest.raises(NumericError, match=r"with the adapters the weight .* reaches"):
                draw(pipe, "beyond")
        bench.trt._world.failing["refit"] = "broken"
        with pytest.raises(BackendError, match=r"does not take .* weights, first .*broken"):
            draw(pipe, ("loop", 0.9))
        np.testing.assert_array_equal(draw(pipe), plain)
        np.testing.assert_array_equal(draw(pipe, "loop"), wanted)
    assert not bench.device.blocks


def test_a_stream_goes_on_while_other_sets_draw(
    package: Package, loras: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, bench = filled(tmp_path, package, "tensorrt-rtx"), Bench(monkeypatch, "tensorrt-rtx")
    few = {name: value for name, value in SMALL.items() if name != "output_type"}
    with bench.open(package, store, loras=loras) as pipe:
        wanted = {name: draw(pipe, *chosen) for name, chosen in {"loop": ["loop"], "none": []}.items()}
        streams = {
            "loop": pipe.stream(PROMPT, loras=["loop"], **few),
            "none": pipe.stream(PROMPT, **few),
        }
        for stream in streams.values():
            next(stream)
        draw(pipe, "keys")
        pipe.unload_lora_weights()
        for name, stream in streams.items():
            *_, last = stream
            np.testing.assert_array_equal(np.asarray(last.preview()[0]), wanted[name][0])
    assert not bench.device.blocks


def test_closing_while_a_set_is_in_use_frees_everything(
    package: Package, loras: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, bench = filled(tmp_path, package, "tensorrt-rtx"), Bench(monkeypatch, "tensorrt-rtx")
    few = {name: value for name, value in SMALL.items() if name != "output_type"}
    pipe = bench.open(package, store, loras=loras)
    stream = pipe.stream(PROMPT, loras=["loop"], **few)
    next(stream)
    draw(pipe, "keys")
    pipe.close()
    assert not bench.device.blocks
    with pytest.raises(BackendError, match="closed while a picture was drawn"):
        next(stream)
    pipe.close()


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_engine_draws_with_and_without_controls(
    package: Package, variant: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Once controls are loaded; without its engine, the command that builds it."""
    store = EngineStore(tmp_path)
    fill(store, package, variant, ["64x64:b1"])
    bench = Bench(monkeypatch, variant)
    with bench.open(package, store) as pipe:
        plain = pipe("a", **SMALL).images
        with pytest.raises(
            BackendError, match=r"no tensorrt.* engine of unet_controlled .*--nets unet_controlled"
        ):
            pipe.loop.use_unet(package, "unet_controlled")
        assert np.array_equal(pipe("a", **SMALL).images, plain), "nothing is lost"
        fill(store, package, variant, ["64x64:b1"], net="unet_controlled")
        pipe.loop.use_unet(package, "unet_controlled")
        assert np.abs(pipe("a", **SMALL).images.astype(int) - plain).max() <= 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_several_controlnets_by_the_same_engine(
    package: Package, variant: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The UNet's engine draws with none, one and two of them, in parts of the steps."""
    store, options = (
        EngineStore(tmp_path / "store"),
        Options(dtype="fp32", reads=BACKENDS["onnxruntime"].reads),
    )
    control = open_control(CONTROLS["demo"] / "edges", options, store=tmp_path / "cache")
    fill(store, package, variant, ["64x64:b1"])
    fill(store, package, variant, ["64x64:b1"], net="unet_controlled")
    for net in control.manifest.nets:
        fill(store, control, variant, ["64x64:b1"], net=net)
    first, second = (
        Control(model=name, image=photo(64, 64, seed), preparation="canny", strength=strength, end=end)
        for name, seed, strength, end in (("edges", 0, 0.6, 1.0), ("other", 1, 0.8, 0.7))
    )

    def pictures(pipe: Pipeline) -> list[np.ndarray]:
        for name in ("edges", "other"):
            pipe.load_control(CONTROLS["demo"] / "edges", name)
        requests = [[first, second], [], [second], [first], [first, second]]
        return [pipe(PROMPT, **SMALL, controls=controls).images.astype(int) for controls in requests]

    with Pipeline.open(package.root, backend="onnxruntime") as host:
        host.controls._open_package = lambda path, encoder: control
        wanted = pictures(host)
    assert len({picture.tobytes() for picture in wanted}) == 4
    bench = Bench(monkeypatch, variant)
    opener: Any = lambda path, encoder: control  # noqa: E731
    with bench.open(package, store, open_control=opener) as pipe:
        for found, images in zip(pictures(pipe), wanted, strict=True):
            assert np.abs(found - images).max() <= 1
        assert pipe.loop.unet == "unet_controlled"
    assert not bench.device.blocks


@pytest.mark.parametrize("variant", VARIANTS)
def test_everything_in_one_request(
    package: Package, loras: Path, variant: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A LoRA, an embedding, a ControlNet and inpainting draw what they draw on ONNX Runtime."""
    store, masked = EngineStore(tmp_path / "store"), ("vae_encoder", "step_masked")
    options = Options(dtype="fp32", reads=BACKENDS["onnxruntime"].reads)
    control = open_control(CONTROLS["demo"] / "edges", options, store=tmp_path / "cache")
    fill(store, package, variant, ["64x64:b1"])
    for net in (*masked, "unet_controlled"):
        fill(store, package, variant, ["64x64:b1"], net=net)
    fill(store, package, variant, ["64x64:b1"], net="unet_controlled", options=REFITTABLE)
    for net in control.manifest.nets:
        fill(store, control, variant, ["64x64:b1"], net=net)
    seen = photo(64, 64)
    request: dict[str, Any] = {
        **SMALL,
        "prompt": "a red one on a blue background",
        "loras": [("loop", 0.5)],
        "image": seen,
        "mask_image": Image.fromarray(np.pad(np.full((32, 32), 255, np.uint8), 16)),
        "controls": [Control(model="edges", image=seen, preparation="canny", end=0.7)],
    }
    words = {"one": np.random.default_rng(0).standard_normal((3, 96), np.float32) / 4}

    def pictures(pipe: Pipeline) -> list[np.ndarray]:
        pipe.load_textual_inversion(words)
        pipe.load_control(CONTROLS["demo"] / "edges")
        parts: list[dict[str, Any]] = [
            {},
            {"controls": []},
            {"loras": []},
            {"prompt": "a", "image": None, "mask_image": None},
        ]
        return [pipe(**{**request, **part}).images.astype(int) for part in parts]

    with Pipeline.open(package.root, backend="onnxruntime", loras=loras) as host:
        host.controls._open_package = lambda path, encoder: control
        wanted = pictures(host)
    assert len({picture.tobytes() for picture in wanted}) == len(wanted), "each part counts"
    bench = Bench(monkeypatch, variant)
    opener: Any = lambda path, encoder: control  # noqa: E731
    with bench.open(package, store, masked, loras=loras, open_control=opener) as pipe:
        for found, images in zip(pictures(pipe), wanted, strict=True):
            assert np.abs(found - images).max() <= 1
        assert bench.refits() == {"unet/controlled": 1}
    assert not bench.device.blocks
