"""Sets of adapters at run time: what is opened, kept and forgotten, by whom they are named, what records say.

What they do to pictures is compared with LyCORIS and PEFT in tests/test_parity_adapters.py.
"""

from __future__ import annotations

import gc
import os
import random
import resource
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from latentrt.adapters.folder import NamedFiles
from latentrt.engines.errors import AdapterError, CheckpointError, ModelError, NumericError, UsageError
from latentrt.engines.net_weights import part_shapes
from latentrt.engines.package import Package
from latentrt.engines.spec import Array
from latentrt.runtime import Pipeline
from latentrt.runtime.adapted import MOST_SETS
from latentrt.runtime.loop.denoise import HostLoop
from latentrt.runtime.model import SHIPPED
from latentrt.runtime.pictures.write import PictureMetadata
from latentrt.runtime.redraw import redraw
from latentrt.runtime.refine import refine

DEMO = Package.open(SHIPPED["demo"])
SMALL: dict[str, Any] = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "np", "seed": 4}
PROMPT = "a red circle on a blue background"
WHERE = {
    "loop": ("unet", "attn1.to_q"),
    "keys": ("unet", "attn2.to_k"),
    "time": ("unet", "time_emb_proj"),
    "text": ("text_encoder", "q_proj"),
    "everything": ("unet", ""),
}
PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_"}


def write(path: Path, where: str, seed: int = 0, scale: float = 0.5, **more: Array) -> Path:
    """A LoRA of rank 2 with kohya's names, on the weights of that place."""
    part, inside = WHERE[where]
    values = np.random.default_rng([seed, len(where)])
    tensors = dict[str, Array]()
    for name, shape in part_shapes(DEMO, part).items():
        if inside in name and name.endswith(".weight") and len(shape) == 2 and "embeddings" not in name:
            key = PREFIXES[part] + name.removesuffix(".weight").replace(".", "_")
            down = values.normal(0, shape[1] ** -0.5, (2, shape[1]))
            tensors[f"{key}.lora_down.weight"] = down.astype(np.float32)
            up = values.normal(0, scale, (shape[0], 2))
            tensors[f"{key}.lora_up.weight"] = up.astype(np.float32)
    save_file({**tensors, **more}, path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("loras")
    return {where: write(folder / f"{where}.safetensors", where) for where in WHERE}


@pytest.fixture
def pipe(files: dict[str, Path]) -> Iterator[Pipeline]:
    with Pipeline.open("demo", loras=files["loop"].parent) as pipe:
        yield pipe


def draw(pipe: Pipeline, *loras: Any, prompt: str = PROMPT, **more: Any) -> Array:
    return pipe(prompt, loras=list(loras), **{**SMALL, **more}).images


def opened(pipe: Pipeline, *loras: Any) -> set[str]:
    """The nets that a set has of its own."""
    pairs = [(one, 1.0) if isinstance(one, str) else one for one in loras]
    with pipe._adapted.use(pipe.adapters.chosen(pairs)) as adapted:
        loop: Any = adapted.loop
        assert isinstance(loop, HostLoop)
        return set(loop.nets) if loop is not pipe.loop else set()


# ── what is opened ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("where", "nets"),
    [
        ("loop", {"unet"}),
        ("keys", {"unet_context"}),
        ("time", {"unet_time"}),
        ("text", {"text_encoder"}),
        ("everything", {"unet", "unet_context", "unet_time"}),
    ],
)
def test_only_what_is_touched_is_opened(pipe: Pipeline, where: str, nets: set[str]) -> None:
    plain = draw(pipe)
    assert opened(pipe, where) == nets
    assert not np.array_equal(draw(pipe, where), plain)
    np.testing.assert_array_equal(draw(pipe), plain)


def test_strength_0_opens_nothing(pipe: Pipeline) -> None:
    """T29."""
    for strength in (0, 0.0, {"unet": 0, "text_encoder": 1}, {"unet": {"down": 0, "mid": 0, "up": 0}}):
        assert opened(pipe, ("loop", strength)) == set()
        assert pipe.adapters.chosen([("loop", strength)]).key == ""
    np.testing.assert_array_equal(draw(pipe, ("loop", 0)), draw(pipe))
    keys = {pipe.adapters.chosen([("keys", 0.5), *zero]).key for zero in ([], [("loop", 0.0)])}
    assert len(keys) == 1, "it is no part of a set either"


def test_a_block_alone(pipe: Pipeline) -> None:
    """Blocks that are left out have strength 1, as in diffusers."""
    whole, plain = draw(pipe, "loop"), draw(pipe)
    assert np.array_equal(draw(pipe, ("loop", {"unet": {"down": {"block_0": 1.0}}})), whole)
    some = draw(pipe, ("loop", {"unet": {"mid": 0.0, "up": 0.0}}))
    assert not np.array_equal(some, whole)
    assert not np.array_equal(some, plain)
    blocks = {"down": {"block_0": [1.0], "block_1": 1.0}, "mid": 0.0, "up": {"block_0": 0, "block_1": 0}}
    assert np.array_equal(draw(pipe, ("loop", {"unet": blocks})), some)


def test_the_first_of_two_strengths_alone(pipe: Pipeline) -> None:
    """T25."""
    one, other = draw(pipe, ("loop", 0.5), "keys"), draw(pipe, ("loop", 0.6), "keys")
    assert not np.array_equal(one, other)


def test_the_same_adapter_twice_adds_up(pipe: Pipeline) -> None:
    """T55."""
    twice, once = draw(pipe, ("loop", 0.25), ("loop", 0.5)), draw(pipe, ("loop", 0.75))
    assert np.abs(twice.astype(int) - once).max() <= 1


def test_prompts_are_encoded_for_each_set(pipe: Pipeline) -> None:
    """T30: the first picture with a text encoder's adapter is right, and the next one without too."""
    plain, first = draw(pipe), draw(pipe, "text")
    np.testing.assert_array_equal(draw(pipe), plain)
    np.testing.assert_array_equal(draw(pipe, "text"), first)
    with Pipeline.open("demo") as fresh:
        fresh.load_lora_weights(Path(pipe.adapters._files.paths()["text"]))
        np.testing.assert_array_equal(draw(fresh, "text"), first)


# ── kept and forgotten ───────────────────────────────────────────────────────────────────────────────────


def test_sets_are_kept_by_bytes(files: dict[str, Path]) -> None:
    with Pipeline.open("demo", loras=files["loop"].parent, adapted_bytes=0) as pipe:
        plain = draw(pipe)
        draw(pipe, "loop")
        assert "unet" not in pipe.loop.nets, "the base makes way"
        draw(pipe, "keys")
        assert len(pipe._adapted._entries) == 1, "at least the last set is kept"
        np.testing.assert_array_equal(draw(pipe), plain)
        assert not pipe._adapted._entries, "which makes way for the base"
        np.testing.assert_array_equal(draw(pipe), plain)
        first = draw(pipe, "keys")
        np.testing.assert_array_equal(draw(pipe, "keys"), first)
        assert len(pipe._adapted._entries) == 1
    with Pipeline.open("demo", loras=files["loop"].parent) as pipe:
        for where in WHERE:
            draw(pipe, where)
        draw(pipe)
        assert len(pipe._adapted._entries) == len(WHERE)
        assert set(pipe.loop.nets) >= {"unet", "unet_context"}


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads and memory of the process in /proc")
def test_trying_strengths_does_not_take_ever_more(files: dict[str, Path]) -> None:
    """Threads and memory stay within those of MOST_SETS sets, and go back when all are unloaded."""

    def taken() -> tuple[int, int]:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return len(os.listdir("/proc/self/task")), pages * resource.getpagesize()

    few = {"num_inference_steps": 1}
    with Pipeline.open("demo", threads=2) as pipe:
        pipe.load_lora_weights(files["everything"])
        draw(pipe, **few)
        before = taken()
        for index in range(MOST_SETS + 8):
            draw(pipe, ("everything", 0.5 + index / 100), **few)
            if index + 1 == MOST_SETS:
                full = taken()
        more = taken()
        assert len(pipe._adapted._entries) == MOST_SETS
        assert more[0] <= full[0]
        assert more[1] < full[1] + 40_000_000
        pipe.unload_lora_weights()
        threads, memory = taken()
        assert threads <= before[0]
        assert memory < before[1] + (full[1] - before[1]) / 3


def test_unloading_leaves_nothing(pipe: Pipeline, files: dict[str, Path]) -> None:
    """T23 and T28."""
    plain = draw(pipe)
    for where in ("loop", "keys", "time"):
        pipe.load_lora_weights(files[where])
    pipe.set_adapters(["loop", "keys", "time"], [0.5, 0.6, 0.7])
    pipe(PROMPT, **SMALL)
    pipe.unload_lora_weights("keys")
    two = pipe(PROMPT, **SMALL).images
    np.testing.assert_array_equal(two, draw(pipe, ("loop", 0.5), ("time", 0.7)))
    pipe.unload_lora_weights()
    np.testing.assert_array_equal(pipe(PROMPT, **SMALL).images, plain)
    assert (pipe.adapters.names, len(pipe._adapted._entries)) == ((), 0)


def test_unloading_one_of_three_is_never_having_loaded_it(pipe: Pipeline, files: dict[str, Path]) -> None:
    """T28, against a pipeline that never had it."""
    strengths = {"loop": 0.5, "keys": 0.6, "time": 0.7}
    for where in strengths:
        pipe.load_lora_weights(files[where])
    pipe.set_adapters(list(strengths), list(strengths.values()))
    three = pipe(PROMPT, **SMALL).images
    pipe.unload_lora_weights("keys")
    with Pipeline.open("demo") as fresh:
        for where in ("loop", "time"):
            fresh.load_lora_weights(files[where])
        fresh.set_adapters(["loop", "time"], [0.5, 0.7])
        two = fresh(PROMPT, **SMALL).images
    np.testing.assert_array_equal(pipe(PROMPT, **SMALL).images, two)
    assert not np.array_equal(two, three)


def test_biases_come_and_go(pipe: Pipeline, tmp_path: Path) -> None:
    """T26: every bias of the UNet, those of norms without their weights."""
    values = np.random.default_rng(3)
    diffs = {
        name: values.normal(0, 0.3, shape).astype(np.float32)
        for name, shape in part_shapes(DEMO, "unet").items()
        if name.endswith(".bias")
    }
    keys = dict[str, Array]()
    for name, diff in diffs.items():
        module = name.removesuffix(".bias").replace(".", "_")
        keys[f"lora_unet_{module}.{'b_norm' if 'norm' in module else 'diff_b'}"] = diff
    save_file(keys, tmp_path / "biases.safetensors")
    plain = draw(pipe)
    pipe.load_lora_weights(tmp_path / "biases.safetensors")
    changes = pipe.adapters.chosen([("biases", 0.5)]).changes["unet"]
    assert changes.keys() == diffs.keys()
    for name, diff in diffs.items():
        base = values.normal(0, 1, diff.shape).astype(np.float32)
        wanted = base.astype(np.float64) + 0.5 * diff.astype(np.float64)
        np.testing.assert_allclose(changes[name](base), wanted, rtol=1e-6, atol=1e-7)
    assert opened(pipe, "biases") == {"unet", "unet_time"}
    assert not np.array_equal(draw(pipe, "biases"), plain)
    pipe.unload_lora_weights()
    np.testing.assert_array_equal(draw(pipe), plain)
    with Pipeline.open("demo") as fresh:
        np.testing.assert_array_equal(draw(fresh), plain)


def test_two_doras_in_either_order(pipe: Pipeline, tmp_path: Path) -> None:
    """T21: which comes first matters, and a set that was open meanwhile is that of a fresh pipeline."""
    loras = list[Path]()
    for seed, name in enumerate(("one", "other")):
        scales = {
            f"lora_unet_{weight.removesuffix('.weight').replace('.', '_')}.dora_scale": np.random.default_rng(
                seed
            ).uniform(0.5, 1.5, (shape[0], 1))
            for weight, shape in part_shapes(DEMO, "unet").items()
            if weight.endswith("attn1.to_q.weight")
        }
        loras.append(write(tmp_path / f"{name}.safetensors", "loop", seed=seed, **scales))
    orders = [[("one", 0.6), ("other", 0.5)], [("other", 0.5), ("one", 0.6)]]
    for path in loras:
        pipe.load_lora_weights(path)
    drawn = [draw(pipe, *order) for order in orders]
    assert not np.array_equal(*drawn)
    for order, images in zip(orders, drawn, strict=True):
        draw(pipe, "keys")
        np.testing.assert_array_equal(draw(pipe, *order), images)
        with Pipeline.open("demo") as fresh:
            for path in loras:
                fresh.load_lora_weights(path)
            np.testing.assert_array_equal(draw(fresh, *order), images)


BLOCK = "attentions_0_transformer_blocks_0"
PAIR = {"lora_down.weight": np.ones((2, 96), np.float32), "lora_up.weight": np.ones((96, 2), np.float32)}


@pytest.mark.parametrize(
    ("module", "parts", "message"),
    [
        ("lora_te_text_model_encoder_layers_9_mlp_fc1", PAIR, "layers_9_mlp_fc1"),
        (f"lora_unet_down_blocks_7_{BLOCK}_attn1_to_q", PAIR, "down_blocks_7"),
        (
            f"lora_unet_mid_block_{BLOCK}_attn2_to_k",
            {**PAIR, "lora_down.weight": np.ones((2, 2048), np.float32)},
            r"is made for SDXL: its attn2\.to_k reads 2048",
        ),
        ("lora_unet_conv_in", {"diff_b": np.full(64, np.nan, np.float32)}, "NaN or infinity"),
        ("lora_unet_conv_out", {"lora_up.weight": np.ones((4, 2), np.float32)}, "expected down too"),
    ],
)
def test_what_is_refused_leaves_nothing_of_itself(
    pipe: Pipeline, module: str, parts: dict[str, Array], message: str, tmp_path: Path
) -> None:
    """T6, T7, T32, T57: what fits in the file is not used either."""
    plain = draw(pipe)
    odd = {f"{module}.{part}": array for part, array in parts.items()}
    path = write(tmp_path / "odd.safetensors", "loop", **odd)
    for _ in range(2):
        with pytest.raises(AdapterError, match=message):
            pipe.load_lora_weights(path)
    with pytest.raises(UsageError, match="no adapter is called 'odd'"):
        draw(pipe, "odd")
    assert pipe.adapters.names == ()
    np.testing.assert_array_equal(draw(pipe), plain)


@pytest.mark.parametrize("swaps", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_swaps(files: dict[str, Path], swaps: int) -> None:
    """T27: random sets in turn; every picture is that of a fresh pipeline, and memory does not grow."""
    sets = [
        [("loop", 0.4)],
        ["keys"],
        [("time", -0.5), "text"],
        ["loop", ("keys", 0.3)],
        [("everything", 0.2)],
    ]
    few = {"num_inference_steps": 1}
    wanted = list[Array]()
    for chosen in [[], *sets]:
        with Pipeline.open("demo", loras=files["loop"].parent) as fresh:
            wanted.append(draw(fresh, *chosen, **few))
    order = random.Random(0)
    with Pipeline.open("demo", loras=files["loop"].parent, adapted_bytes=30_000_000) as pipe:
        peaks = list[int]()
        for swap in range(swaps):
            index = order.randrange(len(sets) + 1)
            np.testing.assert_array_equal(draw(pipe, *[[], *sets][index], **few), wanted[index])
            if swap in (swaps // 4, swaps - 1):
                peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert peaks[1] - peaks[0] < 60_000, "kilobytes"


def test_threads_share_a_pipeline(pipe: Pipeline) -> None:
    sets = [[], ["loop"], ["text"], [("loop", 0.5), "time"]]
    wanted = [draw(pipe, *chosen) for chosen in sets]
    pipe.unload_lora_weights()
    with ThreadPoolExecutor(4) as pool:
        drawn = list(pool.map(lambda index: draw(pipe, *sets[index % 4]), range(12)))
    for index, images in enumerate(drawn):
        np.testing.assert_array_equal(images, wanted[index % 4])


def test_a_stream_goes_on_while_its_set_is_forgotten(pipe: Pipeline) -> None:
    wanted = draw(pipe, "loop")
    steps = pipe.stream(PROMPT, loras=["loop"], **{k: v for k, v in SMALL.items() if k != "output_type"})
    next(steps)
    pipe.unload_lora_weights()
    (last,) = list(steps)
    np.testing.assert_array_equal(np.asarray(last.preview()[0]), wanted[0])


def test_a_set_that_does_not_open_is_not_kept(pipe: Pipeline, tmp_path: Path) -> None:
    beyond = write(tmp_path / "beyond.safetensors", "loop", scale=1e37)
    pipe.load_lora_weights(beyond)
    plain = draw(pipe)
    for _ in range(2):
        with pytest.raises(NumericError, match="reaches"):
            draw(pipe, ("beyond", 100.0))
    np.testing.assert_array_equal(draw(pipe), plain)


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_usual_ones(pipe: Pipeline) -> None:
    pipe.set_adapters("loop", 0.5)
    usual = pipe(PROMPT, **SMALL).images
    np.testing.assert_array_equal(usual, draw(pipe, ("loop", 0.5)))
    np.testing.assert_array_equal(draw(pipe), Pipeline.open("demo")(PROMPT, **SMALL).images)
    tagged = pipe(f"{PROMPT}<lora:keys:0.5>", **SMALL).images
    np.testing.assert_array_equal(tagged, draw(pipe, ("loop", 0.5), ("keys", 0.5)))
    pipe.set_adapters([])
    np.testing.assert_array_equal(pipe(PROMPT, **SMALL).images, draw(pipe))


def test_names_that_are_unknown_or_taken(pipe: Pipeline, files: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="no adapter is called 'lop'") as caught:
        draw(pipe, "lop")
    assert "loop" in caught.value.expected
    with pytest.raises(UsageError, match="no adapter is called"):
        pipe.unload_lora_weights("nothing")
    with pytest.raises(UsageError, match="no adapter is called"):
        pipe.set_adapters(["loop", "nothing"])
    with pytest.raises(UsageError, match="an adapter is called 3; expected a name, or a list of names"):
        pipe.set_adapters([3])  # pyright: ignore
    with pytest.raises(UsageError, match="2 adapters and 1 strengths"):
        pipe.set_adapters(["loop", "keys"], [1.0])
    assert pipe.load_lora_weights(files["loop"], "mine") == "mine"
    assert pipe.load_lora_weights(files["loop"], "mine") == "mine", "the same content"
    with pytest.raises(UsageError, match="another adapter is called 'mine'"):
        pipe.load_lora_weights(files["keys"], "mine")
    for name in ("", " ", 3, "a\n"):
        with pytest.raises(UsageError, match="an adapter is called"):
            pipe.load_lora_weights(files["loop"], name)  # pyright: ignore
    for path in (None, {"a": np.ones(1)}, 3):
        with pytest.raises(UsageError, match="an adapter's file is"):
            pipe.load_lora_weights(path)  # pyright: ignore
    with pytest.raises(UsageError, match="no block 'block_9' of 'down'"):
        pipe.set_adapters("loop", {"unet": {"down": {"block_9": 0}}})
    with pytest.raises(UsageError, match=r"6 strengths for up\.block_1, which has 2 layers"):
        draw(pipe, ("loop", {"unet": {"up": {"block_1": [1] * 6}}}))
    with pytest.raises(UsageError, match="17 adapters"):
        draw(pipe, *["loop"] * 17)
    with pytest.raises(UsageError, match="is no folder"):
        Pipeline.open("demo", loras=files["loop"])


@pytest.mark.parametrize("wrong", [3, 1.5, b"x", [3], [["a"]], [None], {3: "a"}], ids=repr)
def test_what_is_no_name_is_said(pipe: Pipeline, wrong: Any) -> None:
    for call, whose in (
        (pipe.set_adapters, "an adapter"),
        (pipe.unload_lora_weights, "an adapter"),
        (pipe.unload_controls, "a control"),
        (pipe.unload_textual_inversion, "an embedding"),
    ):
        with pytest.raises(UsageError, match=rf"{whose} is called .*; expected a name, or a list of names"):
            call(wrong)
    with pytest.raises(UsageError, match=r"a control is .*; expected a file, a folder, or the name of"):
        pipe.load_control(wrong)
    with pytest.raises(UsageError, match=r"an image encoder is .*; expected a file or a folder"):
        pipe.load_control("a.safetensors", image_encoder=wrong)
    with pytest.raises(UsageError, match=r"a control is called .*; expected 1 to 255 printable"):
        pipe.load_control("a.safetensors", wrong)
    with pytest.raises(UsageError, match=r"the folder is .*; expected the path of a folder"):
        Pipeline.open("demo", loras=wrong)


@pytest.mark.parametrize("written", ["style.safetensors", "style", "old/style.safetensors", "old/style"])
def test_a_file_of_the_folder_is_called_with_its_ending_too(written: str, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    for place in ("style", "old/style", "v1.5"):
        write(tmp_path / f"{place}.safetensors", "loop")
    with Pipeline.open("demo", loras=tmp_path) as pipe:
        assert pipe.adapters.called(written) == written.removesuffix(".safetensors")
        assert [pipe.adapters.called(name) for name in ("v1.5", "v1", "style.pt", "x.safetensors")] == [
            *("v1.5", None, None, None)
        ]
        pipe.load_lora_weights(tmp_path / "v1.5.safetensors", "x.safetensors")
        assert pipe.adapters.called("x.safetensors") == "x.safetensors"


def test_a_file_of_the_folder_that_changed_is_read_again(tmp_path: Path) -> None:
    write(tmp_path / "one.safetensors", "loop")
    with Pipeline.open("demo", loras=tmp_path) as pipe:
        before = draw(pipe, "one")
        write(tmp_path / "one.safetensors", "loop", seed=1, scale=0.6)
        assert not np.array_equal(draw(pipe, "one"), before)


def test_a_name_is_a_path_first(pipe: Pipeline, tmp_path: Path, files: dict[str, Path]) -> None:
    """The file at the top has its stem; what two in subfolders have is asked for by path."""
    for place in ("a", "old", "z"):
        (tmp_path / place).mkdir()
        write(tmp_path / place / "style.safetensors", "loop", seed=1)
    write(tmp_path / "style.safetensors", "loop")
    with Pipeline.open("demo", loras=tmp_path) as pipe_of_folder:
        wanted, other = draw(pipe, "loop"), draw(pipe_of_folder, "old/style")
        assert not np.array_equal(wanted, other)
        np.testing.assert_array_equal(draw(pipe_of_folder, "style"), wanted)
        tagged = pipe_of_folder(f"{PROMPT}<lora:style:1>", **SMALL).images
        np.testing.assert_array_equal(tagged, wanted)
        (tmp_path / "style.safetensors").unlink()
        with pytest.raises(UsageError, match=r"3 files of .* are called 'style'") as caught:
            draw(pipe_of_folder, "style")
        assert caught.value.expected == "one of 'a/style', 'old/style', 'z/style'"
        (tmp_path / "a" / "style.safetensors").unlink()
        (tmp_path / "z" / "style.safetensors").unlink()
        np.testing.assert_array_equal(draw(pipe_of_folder, "style"), other)


def test_unknown_keys_are_left_out_everywhere(pipe: Pipeline, tmp_path: Path) -> None:
    """The folder's adapters, tags, and what is loaded later are alike."""
    path = write(tmp_path / "odd.safetensors", "loop", **{"lora_unet_nowhere.diff": np.ones(3, np.float32)})
    with Pipeline.open("demo", loras=tmp_path) as strict, pytest.raises(AdapterError, match="1 of"):
        draw(strict, "odd")
    with Pipeline.open("demo", loras=tmp_path, allow_unused=True) as lenient:
        wanted = draw(pipe, "loop")
        np.testing.assert_array_equal(draw(lenient, "odd"), wanted)
        np.testing.assert_array_equal(draw(lenient, prompt=f"{PROMPT}<lora:odd:1>"), wanted)
        lenient.load_lora_weights(path, "again")
        np.testing.assert_array_equal(draw(lenient, "again"), wanted)


def test_links_are_followed(
    pipe: Pipeline, files: dict[str, Path], tmp_path: Path, logged: list[str]
) -> None:
    """Files and folders that are kept elsewhere; a link to nothing and a loop are left out with a line."""
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    for place in (outside / "sub", folder):
        place.mkdir(parents=True)
    write(outside / "ink.safetensors", "loop")
    write(outside / "sub" / "deep.safetensors", "loop")
    (folder / "link.safetensors").symlink_to(outside / "ink.safetensors")
    (folder / "linked").symlink_to(outside)
    (folder / "again").symlink_to(outside)
    (outside / "sub" / "loop").symlink_to(folder)
    (folder / "gone.safetensors").symlink_to(folder / "nothing.safetensors")
    (folder / "self").symlink_to(folder / "self")
    with Pipeline.open("demo", loras=folder) as linked:
        wanted = draw(pipe, "loop")
        for name in ("link", "linked/sub/deep", "deep", "ink"):  # one file by two ways is one
            np.testing.assert_array_equal(draw(linked, name), wanted)
        with pytest.raises(UsageError, match="no adapter is called 'gone'"):
            draw(linked, "gone")
    lines = [line for line in logged if "left out" in line]
    assert len(lines) == len(set(lines)) == 4, "each once"
    assert sum("leads to nothing" in line for line in lines) == 2
    assert sum("a folder that it lies in" in line for line in lines) == 2


def test_a_file_that_cannot_be_read_and_a_folder(tmp_path: Path, logged: list[str]) -> None:
    files = NamedFiles(tmp_path, (".safetensors",), lambda path: path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        files.content(tmp_path / "nothing.safetensors")
    tmp_path.rmdir()
    assert files.paths() == {}
    assert "cannot be looked through" in logged[-1]


def test_a_file_that_was_replaced_is_read_again(tmp_path: Path) -> None:
    """Also by one of the same size and time of writing, as a copy that keeps times is."""
    one, other = write(tmp_path / "one.safetensors", "loop"), write(tmp_path / "other", "loop", seed=1)
    os.utime(other, ns=(one.stat().st_atime_ns, one.stat().st_mtime_ns))
    with Pipeline.open("demo", loras=tmp_path) as pipe:
        before = pipe(PROMPT, loras=["one"], **SMALL)
        other.replace(one)
        after = pipe(PROMPT, loras=["one"], **SMALL)
        assert not np.array_equal(after.images, before.images)
        assert before.record()["adapters"]["one"]["sha256"] != after.record()["adapters"]["one"]["sha256"]


def test_a_loaded_file_that_changed_is_not_drawn_with(pipe: Pipeline, tmp_path: Path) -> None:
    """What is open goes on; a strength that is to be computed anew is refused, and loading it mends it."""
    path = write(tmp_path / "mine.safetensors", "loop")
    pipe.load_lora_weights(path)
    wanted = draw(pipe, "mine")
    time.sleep(0.02)
    with path.open("r+b") as stream:
        stream.truncate(1000)
    np.testing.assert_array_equal(draw(pipe, "mine"), wanted)
    with pytest.raises(AdapterError, match=r"mine\.safetensors has changed since it was loaded"):
        draw(pipe, ("mine", 0.5))
    write(path, "loop", seed=1)
    pipe.unload_lora_weights("mine")
    pipe.load_lora_weights(path)
    assert not np.array_equal(draw(pipe, ("mine", 0.5)), wanted)


def test_a_folder_as_diffusers_writes_it(pipe: Pipeline, tmp_path: Path) -> None:
    for name in ("pytorch_lora_weights", "adapter_model"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / f"{name}.safetensors", "loop")
        assert pipe.load_lora_weights(tmp_path / name) == name
    np.testing.assert_array_equal(draw(pipe, "adapter_model"), draw(pipe, "loop"))


def bundle(path: Path, vectors: Array, word: str = "glow") -> Path:
    """An adapter that changes next to nothing, with an embedding in its file."""
    return write(path, "loop", scale=1e-6, **{f"bundle_emb.{word}.string_to_param.*": vectors})


VECTORS = np.random.default_rng(3).standard_normal((2, 2, 96), np.float32) / 4


def test_the_words_of_an_adapter_belong_to_the_requests_that_draw_with_it(
    pipe: Pipeline, tmp_path: Path
) -> None:
    """They count where the adapter does, at any strength but 0, and are gone behind it."""
    text = "a red glow circle"
    with Pipeline.open("demo") as other:
        other.load_textual_inversion({"glow": VECTORS[0]})
        wanted = draw(other, prompt=text)
    plain = draw(pipe, prompt=text)
    pipe.load_lora_weights(bundle(tmp_path / "bundle.safetensors", VECTORS[0]))
    np.testing.assert_array_equal(draw(pipe, prompt=text), plain)
    for prompt, loras in ((text, [("bundle", 1e-9)]), (f"{text} <lora:bundle:1e-9>", [])):
        result = pipe(prompt, loras=loras, **SMALL)
        np.testing.assert_array_equal(result.images, wanted)
        (said,) = result.record()["embeddings"]
        assert (said["name"], said["adapter"]) == ("glow", "bundle")
        assert "TI hashes" not in result.infotext()
        np.testing.assert_array_equal(draw(pipe, prompt=text), plain)
    np.testing.assert_array_equal(draw(pipe, ("bundle", 0), prompt=text), plain)
    np.testing.assert_array_equal(
        draw(pipe, ("bundle", 1e-9), prompt=text, prompt_syntax="plain"),
        draw(pipe, ("bundle", 1e-9), prompt=text),
    )
    assert "glow" not in pipe.embeddings.names()
    with pytest.raises(UsageError, match="no embedding is called 'glow'"):
        pipe("embedding:glow", **SMALL)
    pipe.set_adapters("bundle", 1e-9)
    steps = pipe.stream(text, **{k: v for k, v in SMALL.items() if k != "output_type"})
    pipe.unload_lora_weights()
    *_, last = steps
    np.testing.assert_array_equal(np.asarray(last.preview()[0]), wanted[0])


def test_a_word_of_an_adapter_and_of_the_user(pipe: Pipeline, tmp_path: Path, logged: list[str]) -> None:
    text, mine = "a red glow circle", ("mine", 1e-9)
    pipe.load_textual_inversion({"glow": VECTORS[1]})
    own = draw(pipe, prompt=text)
    pipe.load_lora_weights(bundle(tmp_path / "bundle.safetensors", VECTORS[0]), "mine")
    for _ in range(2):
        assert not np.array_equal(draw(pipe, mine, prompt=text), own)
        np.testing.assert_array_equal(draw(pipe, prompt=text), own)
    assert [one for one in logged if "glow" in one] == [
        "the word 'glow' is the embedding that the adapter 'mine' brings along, and not yours of that name"
    ]


def test_one_word_of_several_adapters(pipe: Pipeline, tmp_path: Path) -> None:
    text = "a red glow circle"
    path = bundle(tmp_path / "one.safetensors", VECTORS[0])
    for name in ("a", "b"):
        pipe.load_lora_weights(path, name)
    pipe.load_lora_weights(bundle(tmp_path / "two.safetensors", VECTORS[1]), "c")
    wanted = draw(pipe, ("b", 1e-9), prompt=text)
    np.testing.assert_array_equal(draw(pipe, ("a", 1e-9), ("b", 1e-9), prompt=text), wanted)
    pipe.unload_lora_weights("a")
    np.testing.assert_array_equal(draw(pipe, ("b", 1e-9), prompt=text), wanted)
    assert not np.array_equal(draw(pipe, ("c", 1e-9), prompt=text), wanted)
    with pytest.raises(UsageError, match="the adapters 'b' and 'c' both bring the embedding 'glow'"):
        draw(pipe, "b", "c", prompt=text)
    draw(pipe, "b", "c", prompt="a red circle")


def test_embeddings_that_are_damaged_are_refused_with_their_adapter(pipe: Pipeline, tmp_path: Path) -> None:
    for index, (word, vectors) in enumerate(
        {"glow": np.ones((76, 96), np.float32), "numbers": np.ones((1, 96), np.int32)}.items()
    ):
        with pytest.raises(ModelError, match=word):
            pipe.load_lora_weights(bundle(tmp_path / f"{index}.safetensors", vectors, word))
    with pytest.raises(UsageError, match="an embedding is called"):
        pipe.load_lora_weights(bundle(tmp_path / "2.safetensors", VECTORS[0], " x"))
    assert pipe.adapters.names == ()


def test_a_word_of_an_adapter_is_found_again(pipe: Pipeline, tmp_path: Path) -> None:
    path = bundle(tmp_path / "mine.safetensors", VECTORS[0])
    pipe.load_lora_weights(path)
    result = pipe("a red glow circle", loras=[("mine", 0.5)], **{**SMALL, "output_type": "pil"})
    result.save(tmp_path / "one.png")
    assert redraw(pipe, tmp_path / "one.png").to_bytes() == result.to_bytes()
    redraw(pipe, tmp_path / "one.png", loras=[])
    record = result.record()
    record["embeddings"][0]["sha256"] = "0" * 64
    with pytest.raises(UsageError, match="the embedding 'glow' is not the one"):
        redraw(pipe, record)


# ── records ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_picture_is_drawn_again_with_its_adapters(
    pipe: Pipeline, files: dict[str, Path], tmp_path: Path
) -> None:
    more = {**SMALL, "output_type": "pil"}
    result = pipe(f"{PROMPT} <lora:keys:0.5>", loras=[("loop", {"unet": 0.7})], **more)
    record = result.record()
    assert record["loras"] == [["loop", {"unet": 0.7}]]
    assert set(record["adapters"]) == {"loop", "keys"}
    result.save(tmp_path / "one.png")
    again = redraw(pipe, tmp_path / "one.png")
    np.testing.assert_array_equal(np.asarray(again.images[0]), np.asarray(result.images[0]))
    again.save(tmp_path / "two.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    plain = pipe(PROMPT, **more)
    pipe.set_adapters("loop")
    same = redraw(pipe, plain.record())
    np.testing.assert_array_equal(np.asarray(same.images[0]), np.asarray(plain.images[0]))
    with Pipeline.open("demo") as other:
        with pytest.raises(UsageError, match="no adapter is called 'loop'"):
            redraw(other, tmp_path / "one.png")
        other.load_lora_weights(files["time"], "loop")
        other.load_lora_weights(files["keys"])
        with pytest.raises(UsageError, match="the adapter 'loop' is another file than the picture's"):
            redraw(other, tmp_path / "one.png")
    with pytest.raises(UsageError, match="the record's adapters are"):
        redraw(pipe, {**record, "adapters": ["loop"]})


def test_a_picture_of_automatic1111(pipe: Pipeline, tmp_path: Path) -> None:
    """Its text has the tags and the hashes; ours are written as its own are."""
    hashes = pipe(f"{PROMPT} <lora:keys:0.5>", **SMALL).record()["adapters"]["keys"]["short_hash"]
    facts = f'Steps: 2, Sampler: Euler, Seed: 4, Size: 64x64, Lora hashes: "keys: {hashes}"'
    text = f"{PROMPT} <lora:keys:0.5>\n{facts}"
    found = redraw(pipe, PictureMetadata(parameters=text, record=None))
    assert found.request.tagged == (("keys", 0.5),)
    assert f'Lora hashes: "keys: {hashes}"' in found.infotext()
    wrong = text.replace(hashes, "0" * 12)
    with pytest.raises(UsageError, match="the adapter 'keys' is another file"):
        redraw(pipe, PictureMetadata(parameters=wrong, record=None))


def text_of(result: Any) -> PictureMetadata:
    """AUTOMATIC1111's text alone, as other programs keep it."""
    return PictureMetadata(parameters=result.infotext(), record=None)


@pytest.mark.parametrize("syntax", ["a1111", "plain"])
def test_the_text_alone_has_adapters_that_were_passed(pipe: Pipeline, syntax: str) -> None:
    """A1111 knows no others than those of tags, so they are written as such."""
    more = {**SMALL, "prompt_syntax": syntax}
    loras = [("loop", 0.7), ("text", {"unet": 0.25, "text_encoder": -0.5, "text_encoder_2": -0.5})]
    result = pipe(PROMPT, loras=loras, **more)
    assert f"{PROMPT} <lora:loop:0.7> <lora:text:-0.5:0.25>\n" in result.infotext()
    assert result.record()["prompt"] == PROMPT
    again = redraw(pipe, text_of(result), output_type="np")
    np.testing.assert_array_equal(again.images, result.images)
    pipe.set_adapters("keys")
    np.testing.assert_array_equal(redraw(pipe, text_of(result), output_type="np").images, result.images)


def test_a_hash_that_no_tag_goes_with_is_told(pipe: Pipeline, logged: list[str]) -> None:
    """Strengths of blocks are no tag's."""
    result = pipe(PROMPT, loras=[("loop", {"unet": {"up": 0.5}})], **SMALL)
    assert "<lora" not in result.infotext()
    assert "Lora hashes" in result.infotext()
    redraw(pipe, text_of(result))
    assert any("Lora hashes: loop, which no <lora:loop:…>" in line for line in logged)
    del logged[:]
    redraw(pipe, text_of(result), loras=["loop"])
    assert not any("which no" in line for line in logged)


def test_adapters_given_anew_are_as_strong_as_they_were(files: dict[str, Path], tmp_path: Path) -> None:
    with Pipeline.open("demo") as first:
        first.load_lora_weights(files["loop"], "mine")
        passed = first(PROMPT, loras=[("mine", 0.6)], **SMALL)
        tagged = first(f"{PROMPT} <lora:mine:0.6>", **SMALL)
        weaker = draw(first, ("mine", 0.3))
    with Pipeline.open("demo") as pipe:
        with pytest.raises(
            UsageError, match="no adapter is called 'mine', and no file has its hash"
        ) as caught:
            redraw(pipe, passed.record())
        assert caught.value.fix.endswith("latentrt generate --from PICTURE --lora FILE:0.6")
        assert passed.record()["adapters"]["mine"]["sha256"] in caught.value.expected
        for name in ("mine", "other"):
            pipe.load_lora_weights(files["loop"], name)
            for result in (passed, tagged):
                for source in (result.record(), text_of(result)):
                    again = redraw(pipe, source, loras=[name], output_type="np")
                    np.testing.assert_array_equal(again.images, result.images)
                    found = redraw(pipe, source, loras=[(name, 0.3)], output_type="np")
                    assert np.abs(found.images.astype(int) - weaker).max() <= 1, "not added to the tag's"
        pipe.unload_lora_weights("mine")
        np.testing.assert_array_equal(redraw(pipe, passed.record(), output_type="np").images, passed.images)
        pipe.unload_lora_weights()
        pipe.load_lora_weights(files["keys"], "mine")
        pipe.load_lora_weights(files["keys"], "another")
        for source in (passed.record(), text_of(tagged)):
            with pytest.raises(UsageError, match="the adapter 'mine' is another file than the picture's"):
                redraw(pipe, source, loras=["mine"])
        redraw(pipe, passed.record(), loras=["another"])
        redraw(pipe, passed.record(), loras=[])
        with pytest.raises(UsageError, match="loras is 'mine'"):
            redraw(pipe, passed.record(), loras="mine")


def test_a_file_of_the_folder_is_found_by_its_hash(files: dict[str, Path], tmp_path: Path) -> None:
    """Under whatever name: sha256 in our record, the short hash in A1111's text."""
    (tmp_path / "sub").mkdir()
    write(tmp_path / "mine.safetensors", "loop", seed=7)
    with Pipeline.open("demo", loras=tmp_path) as pipe:
        results = [pipe(PROMPT, loras=[("mine", 0.6)], **SMALL), pipe(f"{PROMPT} <lora:mine:0.6>", **SMALL)]
        (tmp_path / "mine.safetensors").rename(tmp_path / "sub" / "renamed.safetensors")
        (tmp_path / "broken.safetensors").write_bytes(b"no")
        for result in results:
            for source in (result.record(), text_of(result)):
                again = redraw(pipe, source, output_type="np")
                np.testing.assert_array_equal(again.images, result.images)
                assert set(again.record()["adapters"]) == {"mine"}
        write(tmp_path / "mine.safetensors", "loop", seed=8)
        np.testing.assert_array_equal(
            redraw(pipe, results[0].record(), output_type="np").images, results[0].images
        )
        (tmp_path / "sub" / "renamed.safetensors").unlink()
        with pytest.raises(UsageError, match="the adapter 'mine' is another file") as caught:
            redraw(pipe, results[0].record())
        assert "--lora FILE:0.6" in caught.value.fix


def test_a_trainers_name_of_a_file(tmp_path: Path) -> None:
    """A1111 calls files so by default (`lora_preferred_name`: "Alias from file")."""
    for number, name in enumerate(("ink", "dot", "dot")):
        path = write(tmp_path / f"file{number}.safetensors", "loop", seed=number)
        save_file(load_file(path), path, {"ss_output_name": name, "sshs_model_hash": f"{number}" * 64})
    with Pipeline.open("demo", loras=tmp_path) as pipe:
        wanted = draw(pipe, "file0")
        tagged = pipe(f"{PROMPT} <lora:ink:1>", **SMALL)
        np.testing.assert_array_equal(tagged.images, wanted)
        facts = 'Steps: 2, Sampler: Euler, Seed: 4, Size: 64x64, Lora hashes: "gone: 000000000000"'
        text = PictureMetadata(parameters=f"{PROMPT} <lora:gone:1>\n{facts}", record=None)
        assert redraw(pipe, text).record()["adapters"]["gone"]["short_hash"] == "0" * 12
        with pytest.raises(UsageError, match=r"2 files were called 'dot' by their trainer: .*file1"):
            draw(pipe, "dot")


# ── a base and a refiner ─────────────────────────────────────────────────────────────────────────────────


def test_a_refiner_has_the_adapters_that_fit_it(
    files: dict[str, Path], tmp_path: Path, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However they are said: loaded into the base, by argument or by tag."""
    half = {**SMALL, "num_inference_steps": 4, "at": 0.5}
    with Pipeline.open("demo") as base, Pipeline.open("demo") as refiner:
        plain = refine(base, refiner, PROMPT, **half)
        base.load_lora_weights(files["loop"])
        passed = refine(base, refiner, PROMPT, loras=[("loop", 0.5)], **half)
        tagged = refine(base, refiner, f"{PROMPT} <lora:loop:0.5>", **half)
        np.testing.assert_array_equal(passed.images, tagged.images)
        alone = refine(base, refiner, PROMPT, loras=[("loop", 0.5)], refiner_loras=[], **half)
        assert not np.array_equal(alone.images, plain.images)
        assert not np.array_equal(alone.images, passed.images)
        assert "adapters" not in alone.record()
        assert passed.record()["adapters"] == passed.record()["base_record"]["adapters"]
        assert "<lora:loop:0.5>" in passed.infotext()
        assert refiner.adapters.names == ()
        np.testing.assert_array_equal(refine(base, refiner, PROMPT, **half).images, plain.images)
        refiner.load_lora_weights(files["keys"])
        refiner.set_adapters("keys")
        own = refine(base, refiner, PROMPT, **half)
        for result in (passed, tagged, alone, own):
            again = redraw(base, result.record(), refiner=refiner, output_type="np")
            np.testing.assert_array_equal(again.images, result.images)
        refiner.set_adapters([])
        shapes = {"unet": {"another.weight": (2, 2)}}
        with Pipeline.open("demo") as other:
            monkeypatch.setattr(other.adapters, "_targets", shapes)
            for _ in range(2):
                for prompt, loras in ((PROMPT, [("loop", 0.5)]), (f"{PROMPT} <lora:loop:0.5>", None)):
                    found = refine(base, other, prompt, loras=loras, **half)
                    np.testing.assert_array_equal(found.images, alone.images)
                    assert "<lora:loop:0.5>" in found.infotext()
        assert sum("draws without the adapter 'loop'" in line for line in logged) == 1
