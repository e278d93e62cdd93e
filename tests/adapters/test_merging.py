"""Several adapters in one tensor: sums, orders, layouts in memory, and what a type cannot hold."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from lycoris.functional import general

from latentrt.adapters.kinds.change import Change
from latentrt.adapters.merging import merged
from tests.adapters.tiny import assert_near, bound, normal, write

SHAPE = (40, 56)
TARGETS = {"unet": {"layer.weight": SHAPE}}


def change(path: Path, **parts: torch.Tensor) -> Change:
    write(path, {f"lora_unet_layer.{name.replace('__', '.')}": x for name, x in parts.items()})
    return bound(path, TARGETS).changes["unet"]["layer.weight"]


def lora(folder: Path, seed: int, **more: torch.Tensor) -> tuple[Change, torch.Tensor]:
    up, down = normal(SHAPE[0], 4, seed=seed), normal(4, SHAPE[1], seed=seed + 100)
    made = change(folder / f"{seed}.safetensors", lora_up__weight=up, lora_down__weight=down, **more)
    return made, up.double() @ down.double()


@pytest.fixture
def base() -> torch.Tensor:
    return normal(*SHAPE)


def test_additive_changes_are_one_sum_whatever_their_order(base: torch.Tensor, tmp_path: Path) -> None:
    made = [
        (*lora(tmp_path, seed), strength) for seed, strength in ((1, 0.7), (2, -1.3), (3, 1e-3), (4, 2.0))
    ]
    expected = base.double() + sum(strength * delta for _, delta, strength in made)
    changes = [(one, strength) for one, _, strength in made]
    found = merged(base.numpy(), changes)
    assert_near(found, expected)
    for shuffled in (changes[::-1], changes[2:] + changes[:2]):
        assert np.array_equal(merged(base.numpy(), shuffled), found)


def test_t55_the_same_file_twice(base: torch.Tensor, tmp_path: Path) -> None:
    one, _ = lora(tmp_path, 1)
    (tmp_path / "copy.safetensors").write_bytes((tmp_path / "1.safetensors").read_bytes())
    again = bound(tmp_path / "copy.safetensors", TARGETS).changes["unet"]["layer.weight"]
    twice = merged(base.numpy(), [(one, 0.5), (again, 0.25)])
    assert np.array_equal(twice, merged(base.numpy(), [(one, 0.75)]))
    assert np.array_equal(merged(base.numpy(), [(one, 0.5), (again, -0.5)]), base.numpy())


def test_strength_0_is_the_base(base: torch.Tensor, tmp_path: Path) -> None:
    dora, _ = lora(tmp_path, 1, dora_scale=normal(SHAPE[0]).abs())
    rotated = change(tmp_path / "o.safetensors", oft_blocks=normal(10, 4, 4), rescale=normal(SHAPE[0]))
    new = change(tmp_path / "n.safetensors", set_weight=normal(*SHAPE))
    changes = [(lora(tmp_path, 2)[0], 0.0), (dora, 0.0), (rotated, 0.0), (new, 0)]
    for given in (changes, []):
        found = merged(base.numpy(), given)
        assert np.array_equal(found, base.numpy())
        assert not np.shares_memory(found, base.numpy())


def test_t21_changes_that_depend_on_the_weight_go_in_the_requests_order(
    base: torch.Tensor, tmp_path: Path
) -> None:
    """Each on what those before it left; sums between them."""
    scales = [normal(SHAPE[0], 1, seed=s).abs() for s in (7, 8)]
    (a, da), (b, db) = (lora(tmp_path, seed, dora_scale=s) for seed, s in zip((1, 2), scales, strict=True))
    (c, dc), (d, dd) = lora(tmp_path, 3), lora(tmp_path, 4)

    def dora(weight: torch.Tensor, delta: torch.Tensor, scale: torch.Tensor, m: float) -> torch.Tensor:
        moved = general.weight_decompose(weight + delta, scale.double(), 1, True)
        return weight + m * (moved - weight)

    w = base.double()
    first = dora(dora(w, da, scales[0], 0.6), db, scales[1], 0.5)
    second = dora(dora(w, db, scales[1], 0.5), da, scales[0], 0.6)
    assert (first - second).abs().max() > 0.01
    np.testing.assert_allclose(merged(base.numpy(), [(a, 0.6), (b, 0.5)]), first.numpy(), atol=1e-6)
    np.testing.assert_allclose(merged(base.numpy(), [(b, 0.5), (a, 0.6)]), second.numpy(), atol=1e-6)
    mixed = dora(w + dc + 2 * dd, da, scales[0], 1.0) + 0.5 * dc
    found = merged(base.numpy(), [(d, 2.0), (c, 1.0), (a, 1.0), (c, 0.5)])
    np.testing.assert_allclose(found, mixed.numpy(), atol=2e-5)
    assert np.array_equal(found, merged(base.numpy(), [(c, 1.0), (d, 2.0), (a, 1.0), (c, 0.5)]))


def every_kind(folder: Path) -> dict[str, tuple[Change, ...]]:
    rank = 3
    o, i = SHAPE
    kron = {"lokr_w1": normal(4, 7), "lokr_w2_a": normal(10, rank), "lokr_w2_b": normal(rank, 8)}
    hada = {
        "hada_w1_a": normal(o, 2),
        "hada_w1_b": normal(2, i),
        "hada_w2_a": normal(o, 2),
        "hada_w2_b": normal(2, i),
    }
    parts = {
        "lokr": kron,
        "loha": hada,
        "full": {"diff": normal(o, i)},
        "loha by input": {**hada, "dora_scale": normal(1, i).abs()},
        "ia3": {"weight": normal(i), "on_input": torch.tensor(True)},
        "oft": {"oft_blocks": normal(10, 4, 4)},
        "boft": {"oft_blocks": normal(2, 10, 4, 4)},
        "glora": {
            n + "__weight": x
            for n, x in zip(
                ("a1", "a2", "b1", "b2"),
                (normal(i, 2), normal(2, i), normal(o, 2), normal(2, i)),
                strict=True,
            )
        },
    }
    made = {kind: (change(folder / f"{kind}.safetensors", **one),) for kind, one in parts.items()}
    return made | {"lora": (lora(folder, 1)[0],), "all": tuple(c for (c,) in made.values())}


@pytest.mark.parametrize(
    "stored", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]
)
def test_a_base_of_any_type_and_layout(stored: Any, base: torch.Tensor, tmp_path: Path) -> None:
    """A linear layer may lie in memory as (in, out): the same numbers, with the layout kept by what adds."""
    plain = base.numpy().astype(stored)
    turned = np.ascontiguousarray(plain.T).T
    strided = np.repeat(plain, 2, axis=0)[::2]
    for kind, changes in every_kind(tmp_path).items():
        given = [(one, 0.3) for one in changes]
        expected = merged(plain.astype(np.float32), given)
        for other in (plain, turned, strided):
            kept = other.copy()
            found = merged(other, given)
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, expected, rtol=3e-6, atol=3e-6)
            assert np.array_equal(other, kept), kind
    additive = merged(turned, [(lora(tmp_path, 1)[0], 1.0)])
    assert additive.T.flags.c_contiguous


def test_every_change_is_merged_anew(base: torch.Tensor, tmp_path: Path) -> None:
    """A, B, A: the third is the first, to the bit, and the base is as it was."""
    before = base.numpy().copy()
    (tmp_path / "other").mkdir()
    other = lora(tmp_path / "other", 1)[0]
    for changes in every_kind(tmp_path).values():
        given = [(one, 0.8) for one in changes]
        first = merged(base.numpy(), given)
        merged(base.numpy(), [(other, 1.0)])
        assert np.array_equal(merged(base.numpy(), given), first)
        assert np.array_equal(base.numpy(), before)
