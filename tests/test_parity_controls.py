"""Pictures steered by ControlNets against diffusers' pipelines, on random weights."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentrt import CheckpointError, Control, PackageError, UsageError, read_metadata, redraw
from latentrt.runtime.loop.job import Clock
from latentrt.runtime.request.request import make_request
from latentrt.runtime.steering.loaded import LoadedControls
from tests.parity_pair import BAR, blob, drawn, exported, ours, photo, psnr
from tests.steered_pair import SEEN, Steered

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*__array.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]
MODELS = ["tiny2", pytest.param("xl-tiny", marks=pytest.mark.slow)]
SIZE = {"height": 64, "width": 96}
FAST: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 5.0, **SIZE}


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Steered]:
    found = Steered(exported(tmp_path_factory, request.param), tmp_path_factory.mktemp("controls"))
    yield found
    found.ours.close()


def kind(pair: Steered, task: str = "") -> str:
    xl = "XL" if "xl" in str(pair.checkpoint) else ""
    return f"StableDiffusion{xl}ControlNet{task}Pipeline"


def hint(seed: int = 0) -> Image.Image:
    return photo(64, 96, seed)


@pytest.mark.parametrize("seeds", [[3], [3, 4]])
def test_text_to_image(pair: Steered, seeds: list[int]) -> None:
    prompts = ["a red circle", "large green star"][: len(seeds)]
    images = [hint(n) for n in range(len(seeds))]
    wanted = drawn(
        pair.steered(kind(pair)),
        seeds,
        prompt=prompts,
        image=images,
        controlnet_conditioning_scale=0.8,
        **FAST,
    )
    control = Control(model=pair.names[0], image=images, strength=0.8)
    found = ours(pair.ours, seeds, prompt=prompts, controls=[control], **FAST)
    assert psnr(wanted, found) >= BAR
    assert psnr(wanted, ours(pair.ours, seeds, prompt=prompts, **FAST)) < SEEN
    other = replace(control, image=[hint(9), *images[:0:-1]])
    assert psnr(wanted, ours(pair.ours, seeds, prompt=prompts, controls=[other], **FAST)) < BAR


@pytest.mark.parametrize(
    ("start", "end", "guess"), [(0.0, 0.5, False), (0.25, 1.0, False), (0.0, 1.0, True), (0.3, 0.8, True)]
)
def test_parts_of_the_steps_and_guess_mode(pair: Steered, start: float, end: float, guess: bool) -> None:
    wanted = drawn(
        pair.steered(kind(pair)),
        [5],
        prompt="a ring",
        image=hint(),
        control_guidance_start=start,
        control_guidance_end=end,
        guess_mode=guess,
        **FAST,
    )
    control = Control(
        model=pair.names[0], image=hint(), start=start, end=end, mode="guess" if guess else "balanced"
    )
    assert psnr(wanted, ours(pair.ours, [5], prompt="a ring", controls=[control], **FAST)) >= BAR


def test_a_net_that_averages(pair: Steered, tmp_path: Path) -> None:
    """As "shuffle": with guidance the rows with the prompt alone are steered, whatever the mode is."""
    net, reference = pair.nets[0], pair.steered(kind(pair))
    net.register_to_config(global_pool_conditions=True)
    try:
        net.save_pretrained(tmp_path / "averaging")
        wanted = drawn(reference, [5], prompt="a ring", image=hint(), **FAST)
    finally:
        net.register_to_config(global_pool_conditions=False)
    name = pair.ours.load_control(tmp_path / "averaging")
    try:
        found = ours(pair.ours, [5], prompt="a ring", controls=[Control(model=name, image=hint())], **FAST)
    finally:
        pair.ours.unload_controls(name)
    assert psnr(wanted, found) >= BAR
    assert psnr(wanted, ours(pair.ours, [5], prompt="a ring", **FAST)) < SEEN


def test_a_net_that_reads_blue_first(pair: Steered, tmp_path: Path) -> None:
    net, reference = pair.nets[0], pair.steered(kind(pair))
    net.register_to_config(controlnet_conditioning_channel_order="bgr")
    try:
        net.save_pretrained(tmp_path / "blue")
        wanted = drawn(reference, [5], prompt="a ring", image=hint(), **FAST)
    finally:
        net.register_to_config(controlnet_conditioning_channel_order="rgb")
    name = pair.ours.load_control(tmp_path / "blue")
    try:
        found = ours(pair.ours, [5], prompt="a ring", controls=[Control(model=name, image=hint())], **FAST)
    finally:
        pair.ours.unload_controls(name)
    assert psnr(wanted, found) >= BAR
    red_first = [Control(model=pair.names[0], image=hint())]
    assert psnr(wanted, ours(pair.ours, [5], prompt="a ring", controls=red_first, **FAST)) < BAR


def test_two_nets(pair: Steered) -> None:
    wanted = drawn(
        pair.steered(kind(pair), 2),
        [6],
        prompt="a ring",
        image=[hint(0), hint(1)],
        controlnet_conditioning_scale=[0.7, 0.4],
        **FAST,
    )
    controls = [
        Control(model=name, image=hint(number), strength=strength)
        for number, (name, strength) in enumerate(zip(pair.names, (0.7, 0.4), strict=True))
    ]
    found = ours(pair.ours, [6], prompt="a ring", controls=controls, **FAST)
    assert psnr(wanted, found) >= BAR
    swapped = ours(pair.ours, [6], prompt="a ring", controls=controls[::-1], **FAST)
    assert np.array_equal(swapped, found)


@pytest.mark.parametrize(("steps", "strength"), [(6, 0.6), (20, 0.3)])
def test_from_a_picture(pair: Steered, steps: int, strength: float) -> None:
    """T51: shares of the steps are of those that are run."""
    given = {**FAST, "num_inference_steps": steps, "strength": strength}
    started = photo(64, 96, 7)
    wanted = drawn(
        pair.steered(kind(pair, "Img2Img")),
        [8],
        prompt="a ring",
        image=started,
        control_image=hint(),
        control_guidance_end=0.5,
        controlnet_conditioning_scale=1.0,
        **given,
    )
    control = Control(model=pair.names[0], image=hint(), end=0.5)
    found = ours(pair.ours, [8], prompt="a ring", image=started, controls=[control], **given)
    assert psnr(wanted, found) >= BAR


def test_inpainting(pair: Steered) -> None:
    given = {**FAST, "num_inference_steps": 6, "strength": 1.0}
    started, mask = photo(64, 96, 7), blob(64, 96)
    wanted = drawn(
        pair.steered(kind(pair, "Inpaint")),
        [8],
        prompt="a ring",
        image=started,
        mask_image=mask,
        control_image=hint(),
        controlnet_conditioning_scale=0.9,
        **given,
    )
    control = Control(model=pair.names[0], image=hint(), strength=0.9)
    found = ours(pair.ours, [8], prompt="a ring", image=started, mask_image=mask, controls=[control], **given)
    inside = np.asarray(mask)[None, ..., None] >= 128  # outside of which diffusers puts nothing back
    assert psnr(wanted * inside, found * inside) >= BAR


def test_t44_guess_mode_steers_every_picture_of_a_batch(pair: Steered) -> None:
    prompts, hints = ["a red circle", "large green star"], [hint(0), hint(1)]
    given: dict[str, Any] = {"prompt": prompts, **FAST}
    wanted = drawn(pair.steered(kind(pair)), [3, 4], image=hints, guess_mode=True, **given)
    control = Control(model=pair.names[0], image=hints, mode="guess")
    found = ours(pair.ours, [3, 4], controls=[control], **given)
    plain = ours(pair.ours, [3, 4], **given)
    for number in range(2):
        assert psnr(wanted[number], found[number]) >= BAR
        assert psnr(wanted[number], plain[number]) < SEEN


def test_t45_pictures_of_a_batch_are_those_that_are_drawn_alone(pair: Steered) -> None:
    seeds, text = [3, 4, 5], "a red circle"
    control = Control(model=pair.names[0], image=hint())
    alone = [drawn(pair.steered(kind(pair)), [seed], prompt=text, image=hint(), **FAST) for seed in seeds]
    by_batch = ours(pair.ours, seeds, prompt=[text] * 3, controls=[control], **FAST)
    by_count = ours(pair.ours, seeds, prompt=text, num_images_per_prompt=3, controls=[control], **FAST)
    for found in (by_batch, by_count):
        assert psnr(np.concatenate(alone), found) >= BAR


def test_t46_two_prompts_and_two_nets_have_each_its_own_hint(pair: Steered) -> None:
    prompts, hints = ["a red circle", "large green star"], [[hint(0), hint(1)], [hint(2), hint(3)]]
    wanted = np.concatenate(
        [
            drawn(
                pair.steered(kind(pair), 2),
                [3 + number],
                prompt=prompts[number],
                image=[of_net[number] for of_net in hints],
                controlnet_conditioning_scale=[0.7, 0.5],
                **FAST,
            )
            for number in range(2)
        ]
    )

    def draw(hints: Any) -> Any:
        controls = [
            Control(model=name, image=images, strength=strength)
            for name, images, strength in zip(pair.names, hints, (0.7, 0.5), strict=True)
        ]
        return ours(pair.ours, [3, 4], prompt=prompts, controls=controls, **FAST)

    assert psnr(wanted, draw(hints)) >= BAR
    assert psnr(wanted, draw([hints[0], hints[1][::-1]])) < BAR
    assert psnr(wanted, draw(hints[::-1])) < BAR


class Heard:
    """What a control's nets are called with, and answer."""

    def __init__(self, pair: Steered, patch: pytest.MonkeyPatch) -> None:
        opened = pair.ours.controls._loaded[pair.names[0]]  # pyright: ignore[reportPrivateUsage]
        self.call, self.calls = opened.loop.call, list[tuple[str, dict[str, Any], dict[str, Any]]]()
        patch.setattr(opened.loop, "call", self._called)

    def _called(self, net: str, **arrays: Any) -> Any:
        found = self.call(net, **arrays)
        self.calls.append((net, arrays, found))
        return found

    def of(self, net: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        return [(given, found) for name, given, found in self.calls if name == net]


def test_t48_outputs_scale_with_the_strength_exactly(pair: Steered, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = Heard(pair, monkeypatch)
    for strength in (1.0, 0.3):
        control = Control(model=pair.names[0], image=hint(), strength=strength)
        ours(pair.ours, [3], prompt="a ring", controls=[control], **FAST)
    whole, part = heard.of("controlnet")[0], heard.of("controlnet")[FAST["num_inference_steps"]]
    np.testing.assert_array_equal(whole[0]["latent"], part[0]["latent"])  # the first step has the same noise
    assert len(whole[1]) > 3
    for name, value in whole[1].items():
        assert value.std() > 0
        np.testing.assert_array_equal(part[1][name], value * np.float32(0.3))


@pytest.mark.parametrize(("height", "width"), [(64, 96), (96, 64)])
def test_t53_height_and_width_are_not_exchanged(
    pair: Steered, height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard, picture = Heard(pair, monkeypatch), photo(height, width)
    given = {**FAST, "height": height, "width": width, "prompt": "a ring"}
    seen: list[Any] = []
    net: Any = pair.nets[0]
    hook = net.register_forward_hook(lambda module, given, output: seen.append(output))
    wanted = drawn(pair.steered(kind(pair)), [3], image=picture, **given)
    hook.remove()
    found = ours(pair.ours, [3], controls=[Control(model=pair.names[0], image=picture)], **given)
    assert psnr(wanted, found) >= BAR
    down, middle = seen[0]
    _, residuals = heard.of("controlnet")[0]
    assert [value.shape for value in residuals.values()] == [tuple(one.shape) for one in (*down, middle)]


def test_t52_a_second_larger_pass_is_steered_too(pair: Steered, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its hint is prepared anew at its own size."""
    larger, heard = {**FAST, "height": 128, "width": 192, "strength": 0.6}, Heard(pair, monkeypatch)
    picture = photo(200, 300)
    first = drawn(pair.steered(kind(pair)), [3], prompt="a ring", image=picture, **FAST)
    started = Image.fromarray(first[0]).resize((192, 128), Image.Resampling.LANCZOS)
    wanted = drawn(
        pair.steered(kind(pair, "Img2Img")),
        [3],
        prompt="a ring",
        image=started,
        control_image=picture,
        controlnet_conditioning_scale=1.0,
        **larger,
    )
    again = {"prompt": "a ring", "controls": [Control(model=pair.names[0], image=picture)]}
    small = ours(pair.ours, [3], **again, **FAST)
    assert psnr(first, small) >= BAR
    found = ours(pair.ours, [3], image=started, **again, **larger)
    assert psnr(wanted, found) >= BAR
    sizes = [given["hint"].shape[2:] for given, _ in heard.of("controlnet_hint")]
    assert sizes == [(64, 96), (128, 192)]
    alone = ours(pair.ours, [3], image=started, prompt="a ring", **larger)
    assert psnr(wanted, alone) < SEEN


def test_strength_0_is_no_control_to_the_byte(pair: Steered) -> None:
    control = Control(model=pair.names[0], image=hint(), strength=0.0)
    plain = ours(pair.ours, [1], prompt="a ring", **FAST)
    assert np.array_equal(ours(pair.ours, [1], prompt="a ring", controls=[control], **FAST), plain)


def test_modes_and_pictures_that_are_another_number(pair: Steered) -> None:
    """Negative controls: every field is seen, and what cannot be is refused."""
    plain = Control(model=pair.names[0], image=hint())
    pictures = {
        name: ours(pair.ours, [2], prompt="a ring", controls=[control], **FAST)
        for name, control in {
            "balanced": plain,
            "prompt": replace(plain, mode="prompt"),
            "control": replace(plain, mode="control"),
            "guess": replace(plain, mode="guess"),
            "canny": replace(plain, preparation="canny"),
            "crop": replace(plain, resize_mode="crop", image=photo(96, 96)),
            "other": replace(plain, model=pair.names[1]),
        }.items()
    }
    for one, other in combinations(pictures, 2):
        assert not np.array_equal(pictures[one], pictures[other]), (one, other)
    three = replace(plain, image=[hint(0), hint(1), hint(2)])
    with pytest.raises(UsageError, match="3 control pictures for 2 pictures"):
        ours(pair.ours, [1, 2], prompt=["a", "b"], controls=[three], **FAST)
    with pytest.raises(UsageError, match=r"no control is called 'cany'; expected one of control"):
        ours(pair.ours, [1], prompt="a", controls=[replace(plain, model="cany")], **FAST)
    for wrong in ("canny", [plain, "canny"], 5):
        with pytest.raises(UsageError, match=r"controls is .*; expected a list of Control"):
            ours(pair.ours, [1], prompt="a", controls=wrong, **FAST)


def test_hints_are_computed_once_a_picture(pair: Steered) -> None:
    """And keys, values and the schedule; a step in which a net is off does not call it."""
    opened = pair.ours.controls._loaded[pair.names[0]]  # pyright: ignore[reportPrivateUsage]
    calls: Counter[str] = Counter()

    def call(net: str, **arrays: Any) -> Any:
        calls[net] += 1
        return type(opened.loop).call(opened.loop, net, **arrays)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opened.loop, "call", call)
        control = Control(model=pair.names[0], image=hint(), end=0.5)
        ours(pair.ours, [2], prompt="a ring", controls=[control], **FAST)
    once = {"controlnet_hint": 1, "controlnet_context": 1, "controlnet_time": 1}
    assert calls == {**once, "controlnet": FAST["num_inference_steps"] // 2}


def test_records_and_redrawing(pair: Steered, tmp_path: Path) -> None:
    control = Control(model=pair.names[0], image=hint(), strength=0.7, preparation="canny", end=0.9)
    result = pair.ours("a ring", seed=5, controls=[control], **FAST)
    (steered,) = result.record()["steered_by"]
    assert steered["model"] == pair.names[0]
    assert (steered["strength"], steered["end"], steered["preparation"]) == (0.7, 0.9, "canny")
    result.save(tmp_path / "steered.png")
    text = read_metadata(tmp_path / "steered.png").parameters or ""
    assert (
        f'ControlNet 0: "Module: canny, Model: {pair.names[0]} [{steered["sha256"][:8]}], Weight: 0.7' in text
    )
    assert "Guidance Start: 0.0, Guidance End: 0.9" in text
    with pytest.raises(UsageError, match=f"by {pair.names[0]} .* with a picture .* file does not hold"):
        redraw(pair.ours, tmp_path / "steered.png")
    for wrong in (replace(control, image=hint(9)), replace(control, model=pair.names[1])):
        with pytest.raises(UsageError, match=f"and given is {wrong.model} "):
            redraw(pair.ours, tmp_path / "steered.png", controls=[wrong])
    again = redraw(pair.ours, tmp_path / "steered.png", controls=[control])
    assert again.to_bytes() == result.to_bytes()


def test_names_are_taken_once_and_given_back(pair: Steered, tmp_path: Path) -> None:
    pipe, folder = pair.ours, pair.made
    assert pipe.load_control(folder / "control0") == pair.names[0]  # the same once more
    with pytest.raises(UsageError, match="another control is called 'control0'"):
        pipe.load_control(folder / "control1", "control0")
    third = pipe.load_control(folder / "control1", "third")
    assert set(pipe.controls.names) == {*pair.names, "third"}
    pipe.unload_controls(third)
    with pytest.raises(UsageError, match="no control is called 'third'"):
        pipe.unload_controls("third")
    nets = {name: net for name, net in pipe.package.manifest.nets.items() if name != "unet_image_prompt"}
    old = LoadedControls(
        replace(pipe.package.manifest, nets=nets),
        lambda *_: pytest.fail("opened"),
        lambda _: pytest.fail("opened"),
        lambda _: None,
    )
    with pytest.raises(PackageError, match="takes no controls"):
        old.load(folder / "control0")


def test_an_image_encoder_is_an_ip_adapters(pair: Steered) -> None:
    with pytest.raises(UsageError, match="an image encoder with a ControlNet, which reads none"):
        pair.ours.load_control(pair.made / "control0", "again", image_encoder=pair.made)


def test_controls_that_are_unloaded_before_the_first_step(pair: Steered) -> None:
    control = Control(model=pair.names[0], image=hint())
    request = make_request(pair.ours.package.manifest, "a", controls=[control], **FAST)
    job = pair.ours.prepare(request)
    pair.ours.loop.use_unet(pair.ours.package, "unet")
    try:
        with pytest.raises(UsageError, match="were unloaded before its last step"):
            next(pair.ours.loop.steps(job, Clock(), None))
    finally:
        pair.ours.loop.use_unet(pair.ours.package, "unet_controlled")


def test_another_family_is_refused(pair: Steered) -> None:
    manifest = pair.ours.package.manifest
    other = replace(manifest, context_width=manifest.context_width + 8, name="other")
    package = pair.ours.controls._loaded[pair.names[0]].package  # pyright: ignore[reportPrivateUsage]
    fail: Any = lambda *_: pytest.fail("opened or used")  # noqa: E731
    controls = LoadedControls(other, lambda *_: package, fail, fail)
    with pytest.raises(CheckpointError, match=r"is a ControlNet for .*: it reads a context of \d+ numbers"):
        controls.load("control0")


def test_a_net_of_one_kind_of_picture_takes_no_type(pair: Steered) -> None:
    control = Control(model=pair.names[0], image=hint(), control_type="canny")
    with pytest.raises(UsageError, match="control_type 'canny' for 'control0', which reads one kind"):
        ours(pair.ours, [1], prompt="a", controls=[control], **FAST)
