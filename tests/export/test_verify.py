import math
from pathlib import Path

import numpy as np
import pytest

from latentrt.checkpoints.precision.calibration import components
from latentrt.engines.errors import NumericError
from latentrt.export import verify
from latentrt.export.verify import compare
from tests.export.conftest import Exported


def test_the_figures() -> None:
    wanted = np.array([3.0, 4.0], np.float32)
    found = compare("unet", "prediction", wanted + np.float32(0.5), wanted, "fp32")
    assert found.relative_l2 == pytest.approx(math.sqrt(0.5) / 5)
    assert found.max_error == pytest.approx(0.5)
    assert found.psnr == pytest.approx(20 * math.log10(1.0 / 0.5))
    assert not found.passed


def test_equal_arrays_pass() -> None:
    found = compare("unet", "prediction", np.ones(4), np.ones(4), "fp32")
    assert found.passed
    assert found.psnr == math.inf


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_outputs_fail(bad: float) -> None:
    assert not compare("unet", "prediction", np.array([1.0, bad]), np.ones(2), "fp16").passed


def test_other_shapes_fail() -> None:
    assert not compare("unet", "prediction", np.ones(3), np.ones(2), "fp16").passed


def test_pictures_are_judged_by_psnr() -> None:
    wanted = np.full((1, 64, 64, 3), 100, np.uint8)
    one = wanted.copy()
    one[0, 0, 0, 0] += 1
    assert compare("vae_decoder", "image", one, wanted, "fp32").passed
    far = wanted + np.uint8(4)
    assert compare("vae_decoder", "image", far, wanted, "fp16").psnr == pytest.approx(36.1, abs=0.1)
    assert not compare("vae_decoder", "image", far, wanted, "fp16").passed


def test_a_deviation_is_measured_against_the_latent_it_is_added_to() -> None:
    wanted = np.full((1, 4, 2, 2), 1e-5, np.float32)
    assert compare("vae_encoder", "std", wanted * 1.5, wanted, "fp32").relative_l2 == pytest.approx(5e-6)
    assert compare("vae_encoder", "mean", wanted * 1.5, wanted, "fp32").relative_l2 == pytest.approx(0.5)


@pytest.mark.parametrize(("which", "bar"), [("sd1", 1e-4), ("sd2", 5e-3)])
def test_every_net_is_compared(which: str, bar: float, request: pytest.FixtureRequest) -> None:
    """sd2 was compared when it was exported; sd1 is now."""
    exported = request.getfixturevalue(which)
    found = exported.comparisons
    for component in () if found else components(exported.checkpoint):
        files = {
            name: net
            for name, net in exported.package.manifest.nets.items()
            if net.graph.startswith(f"{component}/")
        }
        found = found + verify.verify_component(
            exported.checkpoint, component, exported.package.root, files, exported.package.manifest.dtype
        )
    assert [(item.net, item.output) for item in found] == [
        ("text_encoder", "context"),
        ("vae_encoder", "mean"),
        ("vae_encoder", "std"),
        ("unet_whole", "out_sample"),
        ("unet", "prediction"),
        ("vae_decoder", "image"),
        ("vae_decoder", "mean"),
    ]
    assert all(item.passed for item in found)
    assert all(item.relative_l2 < bar for item in found if item.output != "image")
    if which == "sd2":  # fp16 is fp16: the comparison would see if it were not.
        assert found[3].relative_l2 > 1e-5


@pytest.mark.parametrize(("dtype", "fix"), [("fp16", "fp32"), ("fp32", "Report")])
def test_a_net_below_its_bar(sd1: Exported, monkeypatch: pytest.MonkeyPatch, dtype: str, fix: str) -> None:
    monkeypatch.setattr(verify, "NET_RELATIVE_L2", {"fp32": 1e-12, "fp16": 1e-12})
    files = sd1.package.manifest.nets
    with pytest.raises(NumericError, match="text_encoder: context differs from torch by") as error:
        verify.verify_component(
            sd1.checkpoint,
            "text_encoder",
            Path(sd1.package.root),
            {"text_encoder": files["text_encoder"]},
            dtype,
        )
    assert fix in error.value.fix
