import numpy as np
import pytest
import torch

from latentrt.engines import spec
from latentrt.engines.errors import PackageError, UsageError
from latentrt.engines.spec import NetSpec, TensorSpec
from tests.tiny_package import SPEC


def test_check_accepts_the_contract_and_names_what_differs() -> None:
    SPEC.check({"x": np.zeros((2, 4), np.float32)})
    for bad in (np.zeros((2, 5), np.float32), np.zeros((2, 4), np.float16), np.zeros(4, np.float32)):
        with pytest.raises(UsageError, match=r"x is float.*expected float32 \(B, 4\)"):
            SPEC.check({"x": bad})
    with pytest.raises(UsageError, match=r"\['y'\]; expected exactly \['x'\]"):
        SPEC.check({"y": np.zeros((2, 4), np.float32)})


def test_a_symbol_has_one_size_per_call() -> None:
    net = NetSpec(
        inputs=(
            TensorSpec(name="a", dtype="float32", shape=("B", "H/8")),
            TensorSpec(name="b", dtype="float32", shape=("B",)),
        ),
        outputs=(),
    )
    net.check({"a": np.zeros((2, 3), np.float32), "b": np.zeros(2, np.float32)})
    with pytest.raises(UsageError, match="b is float32"):
        net.check({"a": np.zeros((2, 3), np.float32), "b": np.zeros(3, np.float32)})


@pytest.mark.parametrize(
    ("dtype", "shape", "expected"),
    [("float16", (2, 4, 8, 8), 1024), ("uint8", (3, 5), 15), ("int64", (), 8), ("float32", (0, 4), 0)],
)
def test_bytes_at_a_shape(dtype: str, shape: tuple[int, ...], expected: int) -> None:
    assert spec.TensorSpec(name="x", dtype=dtype, shape=("B",)).nbytes(shape) == expected


def test_unknown_dtype() -> None:
    with pytest.raises(PackageError, match="bfloat16"):
        TensorSpec(name="x", dtype="bfloat16", shape=())


def test_every_net_has_a_contract_and_round_trips() -> None:
    time = TensorSpec(name="time.a", dtype="float16", shape=("S", 8))
    keys = TensorSpec(name="context.a", dtype="float16", shape=("B", 2, "T", 16))
    vectors = {"text_embeds": 6, "time_ids": 6}
    nets = {
        "text_encoder": spec.text_encoder(tokens="T", width=8, float_dtype="float16"),
        "text_encoder_2": spec.text_encoder(tokens=77, width=8, pooled=6, float_dtype="float16"),
        "image_encoder": spec.image_encoder(size=224, width=6, float_dtype="float16"),
        "image_noiser": spec.image_noiser(width=6, float_dtype="float16"),
        "vae_encoder": spec.vae_encoder(channels=4, posterior=True),
        "unet_context": spec.unet_context(width=8, float_dtype="float16", invariants=[keys]),
        "unet_time": spec.unet_time(invariants=[time], vectors=vectors),
        "unet": spec.unet(channels=4, float_dtype="float16", invariants=[keys, time], image_channels=5),
        "unet_controlled": spec.with_controls(
            spec.unet(channels=4, float_dtype="float16", invariants=[keys, time]),
            residuals=[(8, 0), (16, 1), (16, 1)],
            features=[(8, 0)],
        ),
        "unet_image_prompt": spec.with_image_prompt(
            spec.unet(channels=4, float_dtype="float16", invariants=[keys, time]),
            attentions=[(2, 16), (4, 8)],
            levels=[0, 1],
        ),
        "controlnet_hint": spec.controlnet_hint(width=8, float_dtype="float16"),
        "controlnet_context": spec.unet_context(width=8, float_dtype="float16", invariants=[keys]),
        "controlnet_time": spec.unet_time(invariants=[time], vectors=vectors),
        "controlnet": spec.controlnet_whole(
            channels=4, width=8, residuals=spec.residuals([8, 16], 1), float_dtype="float16"
        ),
        "t2i_adapter": spec.t2i_adapter(channels=1, features=[(8, 0), (16, 1)], float_dtype="float16"),
        "image_features": spec.image_features(size=32, shape=(17, 8), float_dtype="float16"),
        "image_prompt": spec.image_prompt(shape=("I", 8), tokens="I", widths=[8, 16], float_dtype="float16"),
        "step": spec.step(channels=4, float_dtype="float16"),
        "step_masked": spec.step_masked(channels=4, float_dtype="float16"),
        "vae_decoder": spec.vae_decoder(channels=4, float_dtype="float16"),
        "preview_decoder": spec.vae_decoder(channels=4, float_dtype="float16"),
        "unet_whole": spec.unet_whole(channels=9, width=8, float_dtype="float16", vectors=vectors),
    }
    assert list(nets) == list(spec.NETS)
    for net in nets.values():
        assert NetSpec.from_json(net.to_json()) == net


def test_levels_of_the_unet_are_halved_and_rounded_up() -> None:
    """As torch's convolutions of stride 2 and padding 1 do, one after the other."""
    unet = spec.unet(channels=4, float_dtype="float32", invariants=[])
    net = spec.with_controls(unet, residuals=[(1, level) for level in range(4)], features=[])
    halve = torch.nn.Conv2d(1, 1, 3, stride=2, padding=1)
    for height, width in ((64, 64), (7, 12), (9, 1), (33, 95)):
        arrays = {"latent": np.zeros((2, 4, height, width), np.float32)}
        image = torch.zeros(2, 1, height, width)
        for level in range(4):
            arrays[f"residual_{level}"] = image.detach().numpy()
            image = halve(image)
        net.check(arrays)
        sizes = {"B": 2, "H/8": height, "W/8": width}
        assert {item.name: spec.shape_of(item.shape, sizes) for item in net.inputs} == {
            name: array.shape for name, array in arrays.items()
        }
        with pytest.raises(UsageError, match=r"residual_3 is .*expected float32 \(B, 1, H/64, W/64\)"):
            net.check({**arrays, "residual_3": arrays["residual_0"].repeat(2, axis=2)})


def test_the_time_of_each_row() -> None:
    def unet(rows: spec.Dim) -> NetSpec:
        time = TensorSpec(name="time.a", dtype="float32", shape=(rows, 8))
        return spec.unet(channels=4, float_dtype="float32", invariants=[time])

    assert spec.has_time_of_each_row(unet("B"))
    assert not spec.has_time_of_each_row(unet(1))


def test_what_is_built_and_opened_for_every_package() -> None:
    assert {name for name, row in spec.NETS.items() if not row.usual} == {
        "unet_controlled",
        "unet_image_prompt",
        "unet_whole",
    }


def test_output_shapes_follow_from_the_inputs() -> None:
    decoder = spec.vae_decoder(channels=4, float_dtype="float16")
    assert spec.output_shapes(decoder, {"latent": (2, 4, 9, 13)}) == {"image": (2, 72, 104, 3), "mean": (2,)}
    encoder = spec.vae_encoder(channels=4, posterior=True)
    latent = (2, 4, 9, 13)
    assert spec.output_shapes(encoder, {"image": (2, 72, 104, 3), "mask": (2, 72, 104, 1)}) == {
        "mean": latent,
        "std": latent,
    }
    step = spec.step(channels=4, float_dtype="float16")
    shapes = {"prediction": (4, 4, 8, 9), "state": (5, 2, 4, 8, 9), "noise": (2, 4, 8, 9), "row": (11,)}
    assert spec.output_shapes(step, shapes) == {"next_state": (5, 2, 4, 8, 9), "latent": (4, 4, 8, 9)}


def test_output_shapes_of_wrong_inputs() -> None:
    decoder = spec.vae_decoder(channels=4, float_dtype="float16")
    for bad in ((2, 5, 9, 13), (2, 4, 9), (2, 4, 9, 13, 1)):
        with pytest.raises(UsageError, match=r"latent has the shape .*expected \(N, 4, H/8, W/8\)"):
            spec.output_shapes(decoder, {"latent": bad})
    with pytest.raises(UsageError, match=r"\['image'\]; expected exactly \['latent'\]"):
        spec.output_shapes(decoder, {"image": (1, 64, 64, 3)})


def test_an_output_that_no_input_decides() -> None:
    net = NetSpec(inputs=SPEC.inputs, outputs=(TensorSpec(name="y", dtype="float32", shape=("B", "T")),))
    with pytest.raises(
        PackageError, match="no input decides the size 'T' of the output 'y'; expected one of B"
    ):
        spec.output_shapes(net, {"x": (2, 4)})
