"""Every kind of change against LyCORIS and PEFT in float64, or its published formula where these differ."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lycoris.functional import boft, diag_oft, general, locon, loha, lokr
from lycoris.modules.glora import _glora_weight  # pyright: ignore[reportPrivateUsage]
from lycoris.modules.ia3 import _ia3_weight  # pyright: ignore[reportPrivateUsage]

from latentrt.adapters.keys import flat
from latentrt.adapters.merging import merged
from latentrt.engines.errors import AdapterError
from tests.adapters.tiny import assert_near, bound, modules, normal, one, targets, weights, write
from tests.export.ldm_files import unet_to_ldm

Parts = dict[str, torch.Tensor]
SHAPES = [(24, 16), (16, 24), (12, 8, 3, 3), (8, 12, 1, 1), (10, 6, 3, 1)]


def double(parts: Parts) -> Parts:
    return {name: part.double() for name, part in parts.items()}


def product(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape))


# ── kinds of deltas: their parts for a shape and rank, and LyCORIS' delta of them ─────────────────────────


def lora(shape: tuple[int, ...], rank: int) -> tuple[Parts, Any]:
    out, *rest = shape
    parts = {
        "lora_up.weight": normal(out, rank, *(1 for _ in shape[2:]), seed=1),
        "lora_down.weight": normal(rank, *rest, seed=2),
    }
    return parts, lambda p: locon.diff_weight(p["lora_down.weight"], p["lora_up.weight"], None)


def tucker(shape: tuple[int, ...], rank: int) -> tuple[Parts, Any]:
    out, inputs, *kernel = shape
    ones = [1 for _ in kernel]
    parts = {
        "lora_up.weight": normal(out, rank, *ones, seed=1),
        "lora_down.weight": normal(rank, inputs, *ones, seed=2),
        "lora_mid.weight": normal(rank, rank, *kernel, seed=3),
    }
    return parts, lambda p: locon.diff_weight(
        p["lora_down.weight"], p["lora_up.weight"], p["lora_mid.weight"]
    )


def hada(shape: tuple[int, ...], rank: int) -> tuple[Parts, Any]:
    out, *rest = shape
    parts = {
        "hada_w1_a": normal(out, rank, seed=1),
        "hada_w1_b": normal(rank, product(tuple(rest)), seed=2),
        "hada_w2_a": normal(out, rank, seed=3),
        "hada_w2_b": normal(rank, product(tuple(rest)), seed=4),
    }
    names = ("hada_w1_b", "hada_w1_a", "hada_w2_b", "hada_w2_a")
    return parts, lambda p: loha.diff_weight(
        *(p[name] for name in names), None, None, gamma=torch.tensor(1.0)
    )


def hada_tucker(shape: tuple[int, ...], rank: int) -> tuple[Parts, Any]:
    out, inputs, *kernel = shape
    parts = {
        "hada_w1_a": normal(rank, out, seed=1),
        "hada_w1_b": normal(rank, inputs, seed=2),
        "hada_w2_a": normal(rank, out, seed=3),
        "hada_w2_b": normal(rank, inputs, seed=4),
        "hada_t1": normal(rank, rank, *kernel, seed=5),
        "hada_t2": normal(rank, rank, *kernel, seed=6),
    }
    names = ("hada_w1_b", "hada_w1_a", "hada_w2_b", "hada_w2_a", "hada_t1", "hada_t2")
    return parts, lambda p: loha.diff_weight(*(p[name] for name in names), gamma=torch.tensor(1.0))


LOKR = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")


def kron(form: str) -> Any:
    """`form` has "1" or "2" where that factor is decomposed, "t" for a core in the second."""

    def make(shape: tuple[int, ...], rank: int) -> tuple[Parts, Any]:
        out, inputs, *kernel = shape
        parts = {"w1": normal(2, 2, seed=1), "w2": normal(out // 2, inputs // 2, *kernel, seed=2)}
        if "1" in form:
            del parts["w1"]
            parts |= {"w1_a": normal(2, rank, seed=3), "w1_b": normal(rank, 2, seed=4)}
        if "2" in form:
            del parts["w2"]
            columns = product((inputs // 2, *kernel))
            parts |= {"w2_a": normal(out // 2, rank, seed=5), "w2_b": normal(rank, columns, seed=6)}
        if "t" in form:
            del parts["w2"]
            parts |= {"w2_a": normal(rank, out // 2, seed=5), "w2_b": normal(rank, inputs // 2, seed=6)}
            parts |= {"t2": normal(rank, rank, *kernel, seed=7)}

        def delta(p: Parts) -> torch.Tensor:
            whole = [p.get(f"lokr_{name}") for name in LOKR]
            if "2" in form and kernel:  # LyCORIS' function wants the kernel's axes
                whole[5] = p["lokr_w2_b"].reshape(-1, inputs // 2, *kernel)
            return lokr.kron_weight(*whole)

        return {f"lokr_{name}": part for name, part in parts.items()}, delta

    return make


DELTAS = {
    "lora": lora,
    "lora tucker": tucker,
    "loha": hada,
    "loha tucker": hada_tucker,
    **{f"lokr {form}": kron(form) for form in ("", "1", "2", "12", "t", "1t")},
}
CASES = [
    (kind, shape)
    for kind in DELTAS
    for shape in SHAPES
    if product(shape[2:]) > 1 or not ("tucker" in kind or "t" in kind.split(" ")[-1][-1:])
]


def scale_of(kind: str, rank: int, alpha: float | None) -> float:
    return 1.0 if alpha is None or kind == "lokr " else alpha / rank


@pytest.mark.parametrize("alpha", [None, 3.0])
@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_a_delta_is_lycoris(kind: str, shape: tuple[int, ...], alpha: float | None, tmp_path: Path) -> None:
    base, rank = normal(*shape), 2
    parts, delta = DELTAS[kind](shape, rank)
    stored = parts if alpha is None else parts | {"alpha": torch.tensor(alpha)}
    expected = delta(double(parts)).reshape(shape) * scale_of(kind, rank, alpha)
    for strength in (1.0, 0.7, -0.25):
        assert_near(one(tmp_path, base, stored, strength), base.double() + strength * expected)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(sorted(DELTAS)),
    half=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    kernel=st.sampled_from([(), (1, 1), (3, 3), (2, 3)]),
    rank=st.integers(1, 24),
    alpha=st.one_of(st.none(), st.floats(0.125, 64, width=16)),
    kept=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    strength=st.floats(-2, 2),
)
def test_t57_any_shape_and_rank(
    kind: str,
    half: tuple[int, int],
    kernel: tuple[int, ...],
    rank: int,
    alpha: float | None,
    kept: torch.dtype,
    strength: float,
    tmp_path: Path,
) -> None:
    """Ranks beyond the tensor's own are legal: sd-scripts' LoCon has them on `conv_out`."""
    if kernel in ((), (1, 1)) and kind.endswith(("tucker", "t")):
        kernel = (3, 3)
    shape = (2 * half[0], 2 * half[1], *kernel)
    parts, delta = DELTAS[kind](shape, rank)
    parts = {name: part.to(kept) for name, part in parts.items()}
    stored = parts if alpha is None else parts | {"alpha": torch.tensor(alpha, dtype=kept)}
    base = normal(*shape) * 50
    scale = scale_of(kind, rank, None if alpha is None else float(stored["alpha"]))
    expected = base.double() + strength * scale * delta(double(parts)).reshape(shape)
    assert_near(one(tmp_path, base, stored, strength), expected)


# ── whole UNets ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("kind", ["lora", "lora tucker", "loha", "loha tucker"])
def test_t22_every_layer_of_a_unet(kind: str, family: str, tmp_path: Path) -> None:
    """sd-scripts' names: diffusers' for 1.x, latent-diffusion's for SDXL. T57: `conv_out` has fewer outputs
    than the rank. Where a kernel is 1x1, or there is none, trainers store no core.
    """
    unet, rank, alpha = weights(family)["unet"], 5, 3.0
    original = dict(zip(unet, unet_to_ldm(unet, modules(family)["unet"].config), strict=True))
    stored: Parts = {}
    expected: Parts = {}
    for name, base in unet.items():
        shape = tuple(base.shape)
        if len(shape) not in (2, 4):
            continue
        cored = "tucker" in kind and product(shape[2:]) > 1
        parts, delta = DELTAS[kind if cored else kind.removesuffix(" tucker")](shape, rank)
        module = flat((original[name] if family == "sdxl" else name).removesuffix(".weight"))
        parts = {end: part + 0.1 * len(expected) for end, part in parts.items()}  # each layer's own
        stored |= {f"lora_unet_{module}.{end}": part for end, part in parts.items()}
        stored[f"lora_unet_{module}.alpha"] = torch.tensor(alpha)
        expected[name] = base.double() + 0.5 * alpha / rank * delta(double(parts)).reshape(shape)
    found = bound(write(tmp_path / "a.safetensors", stored), targets(family))
    assert (found.applied, found.total, found.unused) == (len(stored), len(stored), ())
    changes = found.changes["unet"]
    assert changes.keys() == expected.keys()
    assert min(expected["conv_out.weight"].shape) < rank
    for name, wanted in expected.items():
        assert_near(merged(unet[name].numpy(), [(changes[name], 0.5)]), wanted)


@pytest.mark.parametrize("form", ["", "1", "2", "12", "t"])
def test_t13_lokr_of_simpletuner(form: str, tmp_path: Path) -> None:
    """Its prefix says no component: whose module it is, the rest of the name tells."""
    shapes = {
        "unet": ["mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "down_blocks.0.resnets.0.conv1"],
        "text_encoder": ["text_model.encoder.layers.0.mlp.fc1"],
    }
    stored: Parts = {}
    expected: dict[tuple[str, str], torch.Tensor] = {}
    for component, names in shapes.items():
        for name in names:
            base = weights("sd1")[component][f"{name}.weight"]
            own = form if form != "t" or base.ndim == 4 else "2"
            parts, delta = kron(own)(tuple(base.shape), 4)
            stored |= {f"lycoris_{flat(name)}.{end}": part for end, part in parts.items()}
            stored[f"lycoris_{flat(name)}.alpha"] = torch.tensor(2.0)
            scale = scale_of(f"lokr {own}", 4, 2.0)
            expected[component, name] = base.double() + scale * delta(double(parts)).reshape(base.shape)
    found = bound(write(tmp_path / "a.safetensors", stored), targets("sd1"))
    assert (found.applied, found.total) == (len(stored), len(stored))
    for (component, name), wanted in expected.items():
        base = weights("sd1")[component][f"{name}.weight"]
        assert_near(merged(base.numpy(), [(found.changes[component][f"{name}.weight"], 1.0)]), wanted)


# ── the layouts that factors may have ─────────────────────────────────────────────────────────────────────


def test_a_linear_file_fits_a_1x1_convolution_and_the_other_way_round(tmp_path: Path) -> None:
    """SD 1's proj_in is a convolution, SD 2's a linear layer."""
    up, down = normal(8, 4, seed=1), normal(4, 12, seed=2)
    expected = up.double() @ down.double()
    for tail in ((), (1, 1)):
        base = normal(8, 12, *tail)
        for ups in ((), (1, 1)):
            for downs in ((), (1, 1)):
                parts = {
                    "lora_up.weight": up.reshape(8, 4, *ups),
                    "lora_down.weight": down.reshape(4, 12, *downs),
                }
                wanted = base.double() + expected.reshape(base.shape)
                assert_near(one(tmp_path, base, parts), wanted)


@pytest.mark.parametrize("channels", [8, 9])
def test_t31_a_lora_of_four_channels_on_a_wider_first_convolution(channels: int, tmp_path: Path) -> None:
    base = normal(16, channels, 3, 3)
    parts, delta = lora((16, 4, 3, 3), 2)
    expected = base.double()
    expected[:, :4] += delta(double(parts))
    assert_near(one(tmp_path, base, parts), expected)
    diff = normal(16, 4, 3, 3, seed=5)
    expected = base.double()
    expected[:, :4] += diff.double()
    assert_near(one(tmp_path, base, {"diff": diff}), expected)
    magnitude = normal(16, 1, 1, 1, seed=3).abs()
    moved = base.double()
    moved[:, :4] += delta(double(parts))
    wanted = moved * (magnitude.double() / moved.flatten(1).norm(dim=1).reshape(16, 1, 1, 1))
    assert_near(one(tmp_path, base, parts | {"dora_scale": magnitude}), wanted)


# ── whole tensors ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("part", "shape"), [("diff", (8, 6, 3, 3)), ("w_norm", (8,)), ("diff", (8,))])
def test_a_difference(part: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    base, diff = normal(*shape), normal(*shape, seed=1)
    assert_near(one(tmp_path, base, {part: diff}, 0.3), base.double() + 0.3 * diff.double())
    with_alpha = {part: diff, "alpha": torch.tensor(0.5)}  # which says nothing here
    assert_near(one(tmp_path, base, with_alpha, 0.3), base.double() + 0.3 * diff.double())


def test_a_new_weight_has_no_strength(tmp_path: Path) -> None:
    base, new = normal(8, 6), normal(8, 6, seed=1)
    assert np.array_equal(one(tmp_path, base, {"set_weight": new}, 0.3), new.numpy())


def test_a_reshaped_weight_must_have_the_models_shape(tmp_path: Path) -> None:
    base = normal(16, 9, 3, 3)
    parts, delta = lora((16, 9, 3, 3), 2)
    fitting = parts | {"reshape_weight": torch.tensor([16, 9, 3, 3])}
    assert_near(one(tmp_path, base, fitting), base.double() + delta(double(parts)))
    with pytest.raises(AdapterError, match=r"makes a tensor of the shape \(16, 12, 3, 3\)"):
        one(tmp_path, base, parts | {"reshape_weight": torch.tensor([16, 12, 3, 3])})


# ── in proportion to the weight ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shape", [(8, 6), (8, 6, 3, 3)])
@pytest.mark.parametrize("on_input", [True, False])
def test_t14_ia3(on_input: bool, shape: tuple[int, ...], tmp_path: Path) -> None:
    base = normal(*shape)
    size = shape[1] if on_input else shape[0]
    weight = normal(*((1, size, 1, 1) if len(shape) == 4 else (size,)), seed=1)
    for strength in (1.0, 0.4):
        expected = _ia3_weight(base.double(), weight.double(), on_input, strength, False)
        parts = {"weight": weight, "on_input": torch.tensor(int(on_input))}
        assert_near(one(tmp_path, base, parts, strength), expected)


@pytest.mark.parametrize("shape", [(8, 6), (6, 8), (8, 8), (8, 6, 3, 3)])
@pytest.mark.parametrize("former", [True, False])
def test_glora_of_both_layouts(former: bool, shape: tuple[int, ...], tmp_path: Path) -> None:
    out, inputs, *kernel = shape
    base, rank = normal(*shape), 4
    ones = [1 for _ in kernel]
    a1, a2 = normal(inputs, rank, *ones, seed=1), normal(rank, inputs, *ones, seed=2)
    b1, b2 = normal(out, rank, *ones, seed=3), normal(rank, inputs, *kernel, seed=4)
    delta = _glora_weight(*(x.double() for x in (base, a1, a2, b1, b2)), None, 2.0 / rank)
    names = ("a2", "a1", "b2", "b1") if former else ("a1", "a2", "b1", "b2")
    parts = {f"{name}.weight": part for name, part in zip(names, (a1, a2, b1, b2), strict=True)}
    stored = parts | {"alpha": torch.tensor(2.0)}
    assert_near(one(tmp_path, base, stored, 0.6), base.double() + 0.6 * delta)


# ── DoRA ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shape", [(8, 8), (8, 12), (8, 6, 3, 3), (6, 6, 3, 3)])
@pytest.mark.parametrize("by_output", [True, False])
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr 2"])
def test_t17_to_t20_the_magnitude_of_the_sum(
    kind: str, by_output: bool, shape: tuple[int, ...], tmp_path: Path
) -> None:
    """Alpha by rank is applied before the norm (T19); the norm is that of the sum (T18); the axis is the
    shape's.
    """
    base = normal(*shape)
    parts, delta = DELTAS[kind](shape, 2)
    tail = [1 for _ in shape[2:]]
    magnitude = normal(*((shape[0], 1) if by_output else (1, shape[1])), *tail, seed=9).abs()
    moved = base.double() + 1.5 * delta(double(parts)).reshape(shape)
    expected = general.weight_decompose(moved, magnitude.double(), 1, by_output)
    stored = parts | {"alpha": torch.tensor(3.0), "dora_scale": magnitude}
    assert_near(one(tmp_path, base, stored), expected)
    for strength in (0.5, -1.0, 2.0):  # from W to the whole change, as in A1111 and ComfyUI
        wanted = base.double() + strength * (expected - base.double())
        assert_near(one(tmp_path, base, stored, strength), wanted)


@pytest.mark.parametrize("shape", [(8, 8), (8, 12), (8, 6)])
def test_t17_a_magnitude_of_one_axis_is_the_outputs(shape: tuple[int, ...], tmp_path: Path) -> None:
    base = normal(*shape)
    parts, delta = lora(shape, 2)
    magnitude = normal(shape[0], seed=9).abs()
    moved = base.double() + delta(double(parts))
    expected = general.weight_decompose(moved, magnitude.double()[:, None], 1, True)
    for name in ("dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.weight"):
        assert_near(one(tmp_path, base, parts | {name: magnitude}), expected)


def test_t20_pefts_magnitude_of_a_convolution_looks_like_the_inputs(tmp_path: Path) -> None:
    base = normal(8, 8, 3, 3)
    parts, delta = lora((8, 8, 3, 3), 2)
    magnitude = normal(1, 8, 1, 1, seed=9).abs()
    moved = base.double() + delta(double(parts))
    by_output = general.weight_decompose(moved, magnitude.double().reshape(8, 1, 1, 1), 1, True)
    by_input = general.weight_decompose(moved, magnitude.double(), 1, False)
    assert_near(one(tmp_path, base, parts | {"lora_magnitude_vector": magnitude}), by_output)
    assert_near(one(tmp_path, base, parts | {"dora_scale": magnitude}), by_input)


def test_a_glora_may_have_a_magnitude(tmp_path: Path) -> None:
    base = normal(8, 6)
    factors = [normal(6, 2, seed=1), normal(2, 6, seed=2), normal(8, 2, seed=3), normal(2, 6, seed=4)]
    delta = _glora_weight(base.double(), *(x.double() for x in factors), None, 1.0)
    magnitude = normal(8, 1, seed=5).abs()
    expected = general.weight_decompose(base.double() + delta, magnitude.double(), 1, True)
    parts = {f"{n}.weight": x for n, x in zip(("a1", "a2", "b1", "b2"), factors, strict=True)}
    assert_near(one(tmp_path, base, parts | {"dora_scale": magnitude}), expected)


# ── rotations ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shape", [(12, 8), (12, 5, 3, 3)])
@pytest.mark.parametrize("constraint", [None, 0.0, 1e-2, 100.0])
@pytest.mark.parametrize("rescaled", [True, False])
def test_oft(shape: tuple[int, ...], constraint: float | None, rescaled: bool, tmp_path: Path) -> None:
    base, blocks = normal(*shape), normal(3, 4, 4, seed=1)
    rescale = normal(12, *(1 for _ in shape[1:]), seed=2) if rescaled else None
    stored = {"oft_blocks": blocks}
    stored |= {} if constraint is None else {"alpha": torch.tensor(constraint)}
    stored |= {} if rescale is None else {"rescale": rescale}
    # LyCORIS keeps the constraint by output, and takes 0 for none.
    bound = (constraint or 0) * shape[0]
    q = blocks.double() - blocks.double().mT
    norm = q.norm() + 1e-8
    q = q * (bound / norm) if 0 < bound < norm else q
    one_ = torch.eye(4).double()
    r = (one_ + q) @ (one_ - q).inverse()
    for strength in (1.0, 0.3):
        turned = one_ + strength * (r - one_)
        expected = torch.einsum("knm,kn...->km...", turned, base.double().reshape(3, 4, *shape[1:]))
        expected = expected.reshape(shape) * (1 if rescale is None else rescale.double())
        assert_near(one(tmp_path, base, stored, strength), expected)
        if strength == 1:  # LyCORIS itself computes in float32
            theirs = diag_oft.diff_weight(base, blocks, rescale, constraint=bound) + base
            torch.testing.assert_close(expected.float(), theirs, atol=2e-5, rtol=0)


def test_oft_of_rotations_that_are_stored(tmp_path: Path) -> None:
    """LyCORIS' former `oft_diag`, as A1111 reads it."""
    base, rotations = normal(12, 8), normal(3, 4, 4, seed=1)
    turned = torch.eye(4).double() + 0.3 * (rotations.double() - torch.eye(4).double())
    expected = torch.einsum("knm,kni->kmi", turned, base.double().reshape(3, 4, 8)).reshape(12, 8)
    assert_near(one(tmp_path, base, {"oft_diag": rotations}, 0.3), expected)


@pytest.mark.parametrize("shape", [(16, 6), (16, 5, 3, 3)])
@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("constraint", [None, 1e-2])
def test_boft(shape: tuple[int, ...], stages: int, constraint: float | None, tmp_path: Path) -> None:
    base, blocks = normal(*shape), normal(stages, 4, 4, 4, seed=1) * 0.3
    rescale = normal(16, *(1 for _ in shape[1:]), seed=2)
    stored = {"oft_blocks": blocks, "rescale": rescale}
    stored |= {} if constraint is None else {"alpha": torch.tensor(constraint)}
    for strength in (1.0, 0.3):
        delta = boft.diff_weight(
            base, blocks, rescale, constraint=(constraint or 0) * 16, scale=strength, backend="torch"
        )
        found = one(tmp_path, base, stored, strength)
        assert found.shape == shape
        np.testing.assert_allclose(found, (base + delta).numpy(), atol=1e-5)


# ── LoKr's scale ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("alpha", [1e10, 0.0, 4.0])
def test_t15_whole_factors_have_no_alpha(alpha: float, tmp_path: Path, logged: list[str]) -> None:
    base = normal(8, 6)
    parts, delta = kron("")((8, 6), 1)
    found = one(tmp_path, base, parts | {"alpha": torch.tensor(alpha)})
    assert_near(found, base.double() + delta(double(parts)))
    assert not any("alpha 0" in line for line in logged), "it says nothing here"


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_t16_one_alpha_and_ranks_of_their_own(rank: int, tmp_path: Path) -> None:
    base = normal(16, 16)
    parts, delta = kron("2")((16, 16), rank)
    found = one(tmp_path, base, parts | {"alpha": torch.tensor(2.0)})
    assert_near(found, base.double() + 2.0 / rank * delta(double(parts)))


def test_lycoris_trained_factor(tmp_path: Path) -> None:
    base = normal(8, 6)
    parts, delta = lora((8, 6), 2)
    for form in ((), (1,)):
        stored = parts | {"scalar": torch.full(form, 0.25)}
        assert_near(one(tmp_path, base, stored), base.double() + 0.25 * delta(double(parts)))
