"""Adapters in the weights: what a package stores, that it draws as a set at run time does, what is refused.

Sums are LyCORIS'; tests/test_parity_adapters.py compares pictures of fused packages with diffusers'.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lycoris.functional import locon
from safetensors.torch import load_file
from typer.testing import CliRunner

from latentrt.adapters.fusing import read_fused
from latentrt.checkpoints.files.net_reads import net_tensors
from latentrt.checkpoints.files.open import Checkpoint
from latentrt.checkpoints.fused import Fused, fuse
from latentrt.checkpoints.opened import Options, open_checkpoint
from latentrt.cli import app
from latentrt.engines.backends import BACKENDS
from latentrt.engines.errors import AdapterError, NumericError, UsageError
from latentrt.engines.package import MANIFEST, FusedAdapter, Package
from latentrt.export import export_package
from latentrt.runtime import Pipeline
from latentrt.runtime.loop import open as loops
from latentrt.runtime.model import CheckpointOptions
from latentrt.runtime.prompts.tokenizer import tokenize
from tests.checkpoints.conftest import shared, write_lora, write_small
from tests.export.overflow import RoundedBackend

SMALL: dict[str, Any] = {"num_inference_steps": 3, "height": 64, "width": 64, "output_type": "np", "seed": 4}
PROMPT = "a red circle on a blue background"
STRENGTHS = (0.8, {"unet": 0.5, "text_encoder": -0.4})


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small checkpoint in float32."""
    return shared(tmp_path_factory, "wide.safetensors", partial(write_small, dtype=torch.float32))


@pytest.fixture(scope="module")
def loras(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One for attention, keys and values included, and one for convolutions and the text encoder."""
    folder = tmp_path_factory.mktemp("loras")
    places: list[dict[str, str]] = [{"unet": "attn"}, {"unet": "conv", "text_encoder": "_proj"}]
    return [
        write_lora(folder / f"{name}.safetensors", wide, inside, seed=seed)
        for seed, (name, inside) in enumerate(zip(("first", "second"), places, strict=True))
    ]


@pytest.fixture
def export(small_archive: Path, tmp_path: Path) -> Callable[..., Package]:
    """Exports through the small templates, in float32 if nothing else is said."""

    def run(source: Path, name: str = "package", **options: Any) -> Package:
        usual: dict[str, Any] = {"dtype": "fp32", "verify": False, "templates": small_archive}
        return export_package(source, tmp_path / name, **{**usual, **options})

    return run


def draw(package: Package, *loras: tuple[Path, Any]) -> np.ndarray[Any, Any]:
    with Pipeline.open(package.root) as pipe:
        chosen = [(pipe.load_lora_weights(path), strength) for path, strength in loras]
        return pipe(PROMPT, loras=chosen, **SMALL).images


def stored(package: Package, component: str) -> dict[str, torch.Tensor]:
    return load_file(package.path(f"{component}/weights.safetensors"))


# ── what is stored and drawn ───────────────────────────────────────────────────────────────────────


def test_a_fused_package_draws_as_the_set_at_run_time(
    wide: Path, loras: list[Path], export: Callable[..., Package]
) -> None:
    """To the byte: both compute with the same float32 sums."""
    chosen = list(zip(loras, STRENGTHS, strict=True))
    plain = export(wide, "plain")
    wanted = draw(plain, *chosen)
    fused = export(wide, "fused", loras=chosen)
    np.testing.assert_array_equal(draw(fused), wanted)
    assert np.abs(wanted.astype(int) - draw(plain)).max() > 20


def test_half_stored_it_draws_the_same_within_one_level(
    small_file: Path, loras: list[Path], export: Callable[..., Package]
) -> None:
    """The package rounds the sums to float16, in which the checkpoint is; at run time nothing does."""
    chosen = list(zip(loras, STRENGTHS, strict=True))
    plain, fused = export(small_file, "plain"), export(small_file, "fused", loras=chosen)
    wanted = draw(plain, *chosen)
    assert np.abs(wanted.astype(int) - draw(fused)).max() <= 1
    assert np.abs(wanted.astype(int) - draw(plain)).max() > 20
    assert plain.manifest.files.keys() == fused.manifest.files.keys()
    sizes = [
        {name: record.size for name, record in each.manifest.files.items() if name.endswith(".safetensors")}
        for each in (plain, fused)
    ]
    assert sizes[0] == sizes[1], "the merged weights have the types that they had"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("computed", ["fp32", "fp16"])
def test_one_sum_and_one_rounding(tmp_path: Path, dtype: torch.dtype, computed: Any) -> None:
    """Merged weights are LyCORIS' sums, rounded once to what a package of the type stores; 8 bits widen."""
    source = write_small(tmp_path / "small.safetensors", dtype=dtype)
    lora = write_lora(tmp_path / "one.safetensors", source, {"unet": "attn1.to_q"})
    checkpoint = Checkpoint.open(source)
    merged = fuse(checkpoint, read_fused(checkpoint, [(lora, 0.7)]), tmp_path / "merged", computed)
    before, after = net_tensors(checkpoint, "unet"), net_tensors(merged, "unet")
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {name for name in before if "attn1.to_q.weight" in name}
    narrow = torch.float16 if dtype.itemsize == 1 else dtype
    wanted_type = torch.float16 if computed == "fp16" else narrow
    parts, base, found = load_file(lora), load_file(source), load_file(tmp_path / "merged/unet.safetensors")
    assert found.keys() == changed
    for name in changed:
        module = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        down, up = (parts[f"{module}.lora_{part}.weight"].double() for part in ("down", "up"))
        delta = locon._diff_weight(down, up, None, 1.0 / 2)  # pyright: ignore[reportPrivateUsage]
        wanted = (base[before[name].name].double() + 0.7 * delta).float().to(wanted_type)
        assert found[name].dtype == wanted_type
        assert (found[name] == wanted).float().mean() > 0.99
        step = 2 * torch.finfo(wanted_type).eps  # of sums that fall between two numbers
        torch.testing.assert_close(found[name].float(), wanted.float(), rtol=step, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_traced_is_as_from_templates(
    small_file: Path, loras: list[Path], export: Callable[..., Package], dtype: str
) -> None:
    """And torch, with the merged weights, computes the same: `verify`."""
    chosen = list(zip(loras, STRENGTHS, strict=True))
    one, other = (
        export(small_file, name, loras=chosen, dtype=dtype, verify=True, **more)
        for name, more in (("one", {}), ("other", {"templates": None}))
    )
    names = one.manifest.files.keys()
    assert names == other.manifest.files.keys()
    assert [name for name in names if one.path(name).read_bytes() != other.path(name).read_bytes()] == []
    assert one.manifest.fused == other.manifest.fused


def test_ranges_are_measured_on_merged_weights(
    wide: Path, tmp_path: Path, export: Callable[..., Package]
) -> None:
    """T56: activations that only an adapter drives beyond fp16 are computed in float32."""
    large = write_lora(tmp_path / "large.safetensors", wide, {"unet": "ff.net.2"}, scale=3e4)
    found: dict[str, list[int]] = {"plain": [], "fused": []}
    for name, chosen in (("plain", []), ("fused", [large])):
        export(
            wide,
            name,
            dtype="fp16",
            loras=chosen,
            report_islands=lambda one, told=found[name]: told.append(len(one.islands)),
        )
    assert sum(found["fused"]) > sum(found["plain"])


def test_ranges_are_not_measured_for_sets_and_what_overflows_is_named(
    wide: Path, tmp_path: Path, export: Callable[..., Package], monkeypatch: pytest.MonkeyPatch
) -> None:
    """T56 at run time, where fp16 rounds as on a device: the weights fit it, what they drive does not."""
    large = write_lora(tmp_path / "large.safetensors", wide, {"unet": "ff.net.2"}, scale=3e4)
    monkeypatch.setattr(loops, "choose_backend", lambda *_: ("rounded", RoundedBackend()))
    with Pipeline.open(export(wide, "half", dtype="fp16").root) as pipe:
        plain = pipe(PROMPT, **SMALL).images
        pipe.load_lora_weights(large)
        message = (
            r"with the adapters large: the latent is not finite after step 1.*Use less of them\. An fp16"
        )
        with pytest.raises(NumericError, match=message):
            pipe(PROMPT, loras=[("large", 4.0)], **SMALL)
        assert pipe(PROMPT, loras=[("large", 0.1)], **SMALL).images.shape == plain.shape
        np.testing.assert_array_equal(pipe(PROMPT, **SMALL).images, plain)


# ── what is told ───────────────────────────────────────────────────────────────────────────────────


def test_the_package_and_its_pictures_say_what_is_in_them(
    small_file: Path, loras: list[Path], export: Callable[..., Package]
) -> None:
    chosen = list(zip(loras, STRENGTHS, strict=True))
    package = export(small_file, loras=chosen)
    first, second = package.manifest.fused
    assert (first.name, first.strength, second.strength) == ("first", *STRENGTHS)
    assert first.applied == first.total == len(load_file(loras[0]))
    assert Package.open(package.root).manifest == package.manifest
    told = json.loads((package.root / MANIFEST).read_text())["fused"]
    assert [one["sha256"] for one in told] == [first.sha256, second.sha256]
    with Pipeline.open(package.root) as pipe:
        record = pipe(PROMPT, **SMALL).record()
    assert record["fused"] == told
    shown = CliRunner().invoke(app, ["inspect", str(package.root)]).output
    assert f"fused: first at strength 0.8, {first.applied} of {first.total} keys, sha256" in shown
    assert 'fused: second at strength {"unet": 0.5, "text_encoder": -0.4}' in shown


def test_a_package_without_says_nothing(small_file: Path, export: Callable[..., Package]) -> None:
    package = export(small_file)
    assert "fused" not in json.loads((package.root / MANIFEST).read_text())
    with Pipeline.open(package.root) as pipe:
        assert "fused" not in pipe(PROMPT, **SMALL).record()


def test_embeddings_in_the_file_are_named(small_file: Path, tmp_path: Path) -> None:
    vectors = torch.ones(2, 64)
    lora = write_lora(
        tmp_path / "both.safetensors",
        small_file,
        {"unet": "to_q"},
        **{"bundle_emb.ring.string_to_param.*": vectors},
    )
    (note,) = read_fused(Checkpoint.open(small_file), [lora]).notes
    assert "both also has embeddings (ring)" in note


# ── what is refused ────────────────────────────────────────────────────────────────────────────────


def test_a_weight_beyond_its_type_is_named(
    small_file: Path, wide: Path, tmp_path: Path, export: Callable[..., Package]
) -> None:
    where = "mid_block.resnets.0.conv1"
    large = write_lora(tmp_path / "large.safetensors", small_file, {"unet": where}, scale=1e6)
    for source, dtype in ((small_file, "fp16"), (wide, "fp16"), (wide, "fp32")):
        with pytest.raises(NumericError, match=rf"weight unet\.{where}\.weight reaches .*65504.*Use less"):
            export(source, "package", dtype=dtype, loras=[large])
    assert [path.name for path in tmp_path.iterdir()] == ["large.safetensors"], "something was left behind"


def test_a_file_for_another_model_is_refused_before_anything_is_written(
    small_file: Path, tmp_path: Path, export: Callable[..., Package]
) -> None:
    foreign = {
        "lora_unet_nowhere.lora_down.weight": torch.ones(2, 8),
        "lora_unet_nowhere.lora_up.weight": torch.ones(8, 2),
    }
    lora = write_lora(tmp_path / "odd.safetensors", small_file, {"unet": "to_q"}, **foreign)
    with pytest.raises(AdapterError, match=r"2 of \d+ keys that this model has no"):
        export(small_file, loras=[lora])
    assert not (tmp_path / "package").exists()
    package = export(small_file, loras=[lora], allow_unused=True)
    (one,) = package.manifest.fused
    assert one.total - one.applied == 2


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (3, "the adapters are 3; expected a list of files"),
        ("a.safetensors", "the adapters are 'a.safetensors'; expected a list of files"),
        ({"a.safetensors": 1}, "the adapters are {.*}; expected a list of files"),
        ([3], "an adapter is given as 3"),
        ([None], "an adapter is given as None"),
        ([()], r"an adapter is given as \(\)"),
        ([(None, 1)], r"an adapter is given as \(None, 1\)"),
        (("a.safetensors", 0.5), r"an adapter is given as 0\.5"),
        ([("a.safetensors", math.nan)], r"the strength of an adapter is nan"),
        ([("a.safetensors", math.inf)], r"the strength of an adapter is inf"),
        ([("a.safetensors", -100.5)], r"the strength of an adapter is -100\.5"),
        ([("a.safetensors", True)], r"the strength of an adapter is True"),
        ([("a.safetensors", None)], r"the strength of an adapter is None"),
        ([("a.safetensors", {"unet": math.nan})], r"the strength of an adapter is {'unet': nan}"),
        ([("a", 1, 2)], "an adapter is given as"),
        ([("a.safetensors", "strong")], "the strength of an adapter is 'strong'"),
        (["a.safetensors"] * 17, "17 adapters"),
    ],
)
def test_what_is_no_adapter_is_refused(small_file: Path, wrong: Any, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        read_fused(Checkpoint.open(small_file), wrong)


@pytest.mark.parametrize("wrong", [3, "a.safetensors", [3], [()], ["a.safetensors"] * 17])
def test_options_that_are_no_adapters_are_refused_at_once(wrong: Any) -> None:
    with pytest.raises(UsageError, match=r"the adapters are|an adapter is given as|17 adapters"):
        CheckpointOptions(fused=wrong)


@pytest.mark.parametrize(
    ("file", "match"),
    [
        ("nowhere.safetensors", r"nowhere\.safetensors is no file"),
        ("~nobody.here/x.safetensors", r"x\.safetensors is no file"),
        ("x" * 300, "xxx is no file"),
        ("", "is a folder without adapter_model"),
    ],
)
def test_a_missing_file_is_refused(small_file: Path, file: str, match: str) -> None:
    with pytest.raises(AdapterError, match=match):
        read_fused(Checkpoint.open(small_file), [file])


@pytest.mark.parametrize(
    ("strength", "plain"),
    [
        (np.float32(-0.5), -0.5),
        (np.int64(1), 1.0),
        ({"unet": {"down": np.float16(0.25), "mid": [1]}, "text_encoder": 2}, None),
    ],
)
def test_strengths_of_numpy_are_noted_as_json_has_them(
    small_file: Path, loras: list[Path], strength: Any, plain: Any
) -> None:
    """A negative one, too: the weights change the other way."""
    used = read_fused(Checkpoint.open(small_file), [(loras[0], strength)])
    (one,) = used.adapters
    wanted = {"unet": {"down": 0.25, "mid": [1]}, "text_encoder": 2} if plain is None else plain
    assert json.loads(json.dumps(one.strength)) == wanted


def test_without_adapters_nothing_is_written(small_file: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(small_file)
    assert fuse(checkpoint, Fused(), tmp_path / "merged", "fp32") is checkpoint
    assert not (tmp_path / "merged").exists()


# ── few steps ──────────────────────────────────────────────────────────────────────────────────────


def test_few_steps_of_the_metadata_are_the_defaults(
    small_file: Path, tmp_path: Path, export: Callable[..., Package]
) -> None:
    said = {"modelspec.title": "LCM-LoRA SD 1.5"}
    lora = write_lora(tmp_path / "fast.safetensors", small_file, {"unet": "to_q"}, metadata=said)
    lines: list[str] = []
    defaults = export(small_file, loras=[lora], note=lines.append).manifest.defaults
    assert (defaults.sampler, defaults.num_inference_steps, defaults.guidance_scale) == ("lcm", 4, 1.0)
    assert any("what lcm wants: 4 steps of lcm, without guidance" in line for line in lines)
    with Pipeline.open(tmp_path / "package") as pipe:
        request = pipe(PROMPT, **{**SMALL, "num_inference_steps": None}).request
    assert (request.sampler.name, request.num_inference_steps, request.guided) == ("lcm", 4, False)


def test_a_name_alone_is_a_remark(small_file: Path, tmp_path: Path, export: Callable[..., Package]) -> None:
    lora = write_lora(tmp_path / "sdxl_lightning_4step_lora.safetensors", small_file, {"unet": "to_q"})
    lines: list[str] = []
    package = export(small_file, "plain", loras=[lora], note=lines.append)
    assert any("pass --few-steps lightning-4" in line for line in lines)
    assert package.manifest.defaults.guidance_scale == 7.5
    chosen = export(small_file, "chosen", loras=[lora], few_steps="lightning-4").manifest.defaults
    assert (chosen.sampler, chosen.num_inference_steps) == ("euler trailing", 4)


@pytest.mark.parametrize(
    ("titles", "few_steps", "match"),
    [
        ([], "lcm", "without a LoRA"),
        (["plain"], "lightening-4", "Did you mean lightning-4"),
        (["plain"], 3, "no kind of few-step LoRA is called 3"),
        (["plain"], ["lcm"], r"no kind of few-step LoRA is called \['lcm'\]"),
        (["LCM", "DMD2"], None, "different numbers of steps: lcm, dmd2"),
    ],
)
def test_few_steps_that_cannot_be(
    small_file: Path, tmp_path: Path, titles: list[str], few_steps: Any, match: str
) -> None:
    place = {"unet": "to_q"}
    files = [
        write_lora(tmp_path / f"{title}.safetensors", small_file, place, metadata={"ss_output_name": title})
        for title in titles
    ]
    with pytest.raises(UsageError, match=match):
        read_fused(Checkpoint.open(small_file), files, few_steps=few_steps)


# ── opened as it is ────────────────────────────────────────────────────────────────────────────────


def test_opened_with_adapters_it_draws_as_exported(
    small_file: Path, loras: list[Path], small_archive: Path, tmp_path: Path, export: Callable[..., Package]
) -> None:
    """What adapters change is in the cache, made once; the rest stays in the user's file."""
    notes, stages = list[str](), list[str]()
    usual = Options(dtype="fp32", reads=BACKENDS["onnxruntime"].reads, templates=small_archive)

    def opened(*chosen: Any) -> Package:
        notes.clear()
        stages.clear()
        return open_checkpoint(
            small_file,
            replace(usual, fuse=partial(read_fused, loras=chosen)),
            tokenize=tokenize,
            store=tmp_path / "cache",
            note=notes.append,
            progress=lambda now: stages.append(now.stage),
        )

    plain, package = opened(), opened((loras[0], 0.8))
    assert "unet: the weights with the adapters in them are in the cache" in notes
    assert stages[0] == "merge the adapters"
    assert package.root != plain.root
    assert {name for name in package.manifest.files if name.endswith("/weights.safetensors")} == {
        "unet/weights.safetensors"
    }
    assert package.manifest.nets["text_encoder"].weights == plain.manifest.nets["text_encoder"].weights
    exported = export(small_file, loras=[(loras[0], 0.8)])
    wanted, found = stored(exported, "unet"), stored(package, "unet")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert package.manifest.fused == exported.manifest.fused
    assert (opened((loras[0], 0.8)).root, stages) == (package.root, [])
    assert opened((loras[0], 0.5)).root not in (package.root, plain.root)


def test_manifest_of_an_adapter() -> None:
    one = FusedAdapter(name="a", sha256="b", short_hash="c", strength=0.5, applied=1, total=2)
    for wrong in ({"name": 3}, {"sha256": None}, {"strength": "much"}, {"applied": "all"}):
        with pytest.raises(ValueError, match="fused"):
            replace(one, **wrong)
