"""Profiles: the grammar, the expansion into a net's shapes, and which of them serves a call."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentrt.engines import spec
from latentrt.engines.errors import LatentrtError, PackageError, UsageError
from latentrt.engines.package import Package
from latentrt.engines.profiles import (
    GRAMMAR,
    Axis,
    NetProfile,
    Profile,
    choose,
    default_profile,
    fixed_profile,
    net_profiles,
)
from latentrt.engines.spec import NetSpec, TensorSpec
from latentrt.runtime.model import SHIPPED

DEMO = Package.open(SHIPPED["demo"])


def axes(most: int, factor: int = 1) -> st.SearchStrategy[Axis]:
    def ordered(sizes: list[int]) -> Axis:
        low, opt, high = sorted(sizes)
        return Axis(low=low * factor, opt=opt * factor, high=high * factor)

    return st.lists(st.integers(1, most), min_size=3, max_size=3).map(ordered)


PROFILES = st.builds(Profile, width=axes(128, 8), height=axes(128, 8), batch=axes(16), tokens=axes(4, 77))


def expand(net: str, *texts: str) -> tuple[NetProfile, ...]:
    return net_profiles(net, DEMO.manifest.nets[net].spec, [Profile.parse(text) for text in texts])


def shapes_of(net: str, **sizes: int) -> dict[str, tuple[int, ...]]:
    """Input shapes of a call; sizes are named as in the contract, with W8 for W/8."""
    values = {"E": 1, **{name.replace("8", "/8"): size for name, size in sizes.items()}}
    return {
        tensor.name: tuple(values[dim] if isinstance(dim, str) else dim for dim in tensor.shape)
        for tensor in DEMO.manifest.nets[net].spec.inputs
    }


@given(PROFILES)
def test_a_profile_reads_back_as_itself(profile: Profile) -> None:
    assert Profile.parse(str(profile)) == profile


@given(
    st.text() | st.from_regex(r"[0-9]{1,6}(-[0-9]{1,6})?x[0-9]{1,4}(:[bt][0-9@-]{1,6}){0,3}", fullmatch=True)
)
def test_no_text_crashes_the_parser(text: str) -> None:
    try:
        profile = Profile.parse(text)
    except UsageError as error:
        assert error.expected == GRAMMAR  # noqa: PT017
    else:
        assert Profile.parse(str(profile)) == profile


def test_the_grammar_by_example() -> None:
    found = Profile.parse("512-1024@768x512-1024@768:b1-2:t77-231")
    size, tokens = Axis(low=512, opt=768, high=1024), Axis(low=77, opt=77, high=231)
    assert found == Profile(width=size, height=size, batch=Axis(low=1, opt=1, high=2), tokens=tokens)
    assert str(found) == "512-1024@768x512-1024@768:b1-2:t77-231"
    assert str(Profile.parse("512x640")) == "512x640:b1-4"
    assert str(Profile.parse("512-512@512x640:b3-3@3:t77-77")) == "512x640:b3"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "grammar"),
        ("512", "grammar"),
        ("512x512:c1", "grammar"),
        ("512x512\n", "grammar"),
        ("٥١٢x512", "grammar"),
        ("512x512:t77:b1", "grammar"),
        ("512x512:b100000", "digits"),
        ("512x512:b4-1", "order"),
        ("512x512:b1-4@5", "order"),
        ("512x512:b0-4", "order"),
        ("0x512", "order"),
        ("516x512", "516 pixels are not multiples of 8"),
        ("512-1028x512", "512-1028 pixels are not multiples of 8"),
    ],
)
def test_what_is_no_profile(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why) as caught:
        Profile.parse(text)
    assert caught.value.expected == GRAMMAR
    assert "--profile 512x512:b1-4" in caught.value.fix


def test_multiples_are_the_packages() -> None:
    assert Profile.parse("64x64", multiple=64)
    with pytest.raises(UsageError, match="multiples of 64"):
        Profile.parse("72x64", multiple=64)


def test_an_axis_is_in_order() -> None:
    with pytest.raises(ValueError, match="order"):
        Axis(low=2, opt=1, high=2)


def test_the_default_is_the_packages_size() -> None:
    assert str(default_profile(DEMO.manifest)) == "128x128:b1-4"
    assert str(fixed_profile(768, 512, batch=2)) == "768x512:b2"


def test_the_loop_has_two_profiles_per_size() -> None:
    guided, unguided = expand("unet", "128x192:b1-2")
    assert (guided.label, unguided.label) == ("128x192 b1-2 guided", "128x192 b1-2 unguided")
    assert guided.shapes["latent"] == ((2, 4, 24, 16), (2, 4, 24, 16), (4, 4, 24, 16))
    assert unguided.shapes["latent"] == ((1, 4, 24, 16), (1, 4, 24, 16), (2, 4, 24, 16))
    keys = next(name for name in guided.shapes if name.startswith("context."))
    assert guided.shapes[keys] == ((2, 2, 77, 32), (2, 2, 77, 32), (4, 2, 77, 32))
    assert guided.text == "B=2-4 H/8=24 T=77 W/8=16"


def test_the_other_nets() -> None:
    text = "256-512@512x512:b1-2:t77-154"
    # two texts of two chunks for each of two pictures, and the empty one
    assert expand("text_encoder", text)[0].shapes["input_ids"] == ((1, 77), (2, 77), (9, 77))
    assert expand("unet_time", text)[0].shapes["timestep"] == ((1,), (30,), (2000,))
    assert expand("unet_context", text)[0].shapes["context"] == ((1, 77, 96), (2, 77, 96), (4, 154, 96))
    (decoder,) = expand("vae_decoder", text)  # its height may be lower, for tiles
    assert decoder.shapes["latent"] == ((1, 4, 32, 32), (1, 4, 64, 64), (2, 4, 64, 64))
    assert expand("vae_decoder", "128x128")[0].shapes["latent"][0] == (1, 4, 16, 16)
    labels = [expand(net, text)[0].label for net in ("text_encoder", "unet_time", "unet_context")]
    assert expand("vae_decoder", "128x128:b4")[0].label == "128x128 b1-4@4", "one by one, too"
    assert labels == ["1-9@2 prompts", "1-2000@30 steps", "1-4@2 rows 77-154 tokens"]


def test_controls_have_the_shapes_of_the_unets_levels() -> None:
    guided, unguided = expand("unet_controlled", "104-128@120x72:b1-2")
    assert unguided.shapes["residual_0"] == ((1, 64, 9, 13), (1, 64, 9, 15), (2, 64, 9, 16))
    assert guided.shapes["residual_4"] == ((2, 96, 5, 7), (2, 96, 5, 8), (4, 96, 5, 8))
    assert guided.shapes["feature_1"] == guided.shapes["residual_4"]
    assert guided.text == "B=2-4 H/16=5 H/8=9 T=77 W/16=7-8@8 W/8=13-16@15"
    assert guided.label == "104-128@120x72 b1-2 guided"


def test_extra_embeddings_are_one_row_unless_a_prompt_has_some() -> None:
    (encoder,) = expand("text_encoder", "128x128")
    assert encoder.shapes["extra_embeddings"] == ((1, 96), (1, 96), (1024, 96))
    with pytest.raises(UsageError, match=r"1025 embeddings .*at most 1024, .*Use fewer"):
        choose([encoder], {"input_ids": (2, 77), "clip_skip": (1,), "extra_embeddings": (1025, 96)})


@pytest.mark.parametrize(("net", "columns"), [("step", 11), ("step_masked", 13)])
def test_the_step_has_both_symbols_of_the_batch(net: str, columns: int) -> None:
    contract = {"step": spec.step, "step_masked": spec.step_masked}[net](channels=4, float_dtype="float16")
    guided, unguided = net_profiles(net, contract, [Profile.parse("64x64:b2-3")])
    assert (guided.shapes["prediction"][2][0], guided.shapes["state"][2][1]) == (6, 3)
    assert (unguided.shapes["prediction"][2][0], unguided.shapes["state"][2][1]) == (3, 3)
    assert unguided.shapes["noise"] == ((2, 4, 8, 8), (2, 4, 8, 8), (3, 4, 8, 8))
    assert guided.shapes["row"] == ((columns,),) * 3


def profiles_of(net: str, contract: NetSpec, text: str) -> NetProfile:
    (only,) = net_profiles(net, contract, [Profile.parse(text)])
    return only


def test_encoders_take_one_picture_for_many_and_tiles() -> None:
    encoder = profiles_of("vae_encoder", spec.vae_encoder(channels=4, posterior=True), "768x512:b2-4")
    assert encoder.shapes["image"] == ((1, 256, 256, 3), (2, 512, 768, 3), (4, 512, 768, 3))
    assert encoder.shapes["mask"][1] == (2, 512, 768, 1)
    assert encoder.label == "256-768@768x256-512@512 b1-4@2"
    preview = profiles_of(
        "preview_decoder", spec.vae_decoder(channels=4, float_dtype="float16"), "768x512:b2-4"
    )
    assert preview.shapes["latent"] == ((1, 4, 32, 32), (2, 4, 64, 96), (4, 4, 64, 96))
    image = spec.image_encoder(size=224, width=8, float_dtype="float16")
    assert profiles_of("image_encoder", image, "768x512:b2-4").shapes["image"][0] == (1, 224, 224, 3)
    noiser = spec.image_noiser(width=8, float_dtype="float16")
    assert profiles_of("image_noiser", noiser, "768x512:b2-4").text == "N=1-4@2"
    with pytest.raises(UsageError, match="covers 1024x512 pixels, 1 picture") as caught:
        choose([encoder], {"image": (1, 512, 1024, 3), "mask": (1, 512, 1024, 1)})
    assert caught.value.fix.endswith("--profile 768x512:b2-4 --profile 1024x512:b1")


def test_a_schedule_with_vectors_has_rows_for_every_picture() -> None:
    contract = spec.unet_time(invariants=(), vectors={"text_embeds": 8, "time_ids": 6})
    time = profiles_of("unet_time", contract, "64x64:b1-4@2")
    assert time.shapes["time_ids"] == ((1, 6), (120, 6), (16000, 6))
    assert time.label == "1-16000@120 steps x rows"
    shapes = {"timestep": (16008,), "text_embeds": (16008, 8), "time_ids": (16008, 6)}
    with pytest.raises(UsageError, match="16008 steps x rows") as caught:
        choose([time], shapes)
    assert "at most 2000 steps" in caught.value.fix


def test_a_net_without_symbols_has_one_profile() -> None:
    contract = NetSpec(inputs=(TensorSpec(name="x", dtype="float32", shape=(1, 4)),), outputs=())
    (only,) = net_profiles("vae_decoder", contract, [Profile.parse("64x64"), Profile.parse("128x64")])
    assert (only.shapes["x"], only.text) == (((1, 4), (1, 4), (1, 4)), "fixed")


def test_profiles_that_add_nothing_are_left_out() -> None:
    assert len(expand("unet_time", "128x128", "192x128")) == 1
    assert len(expand("unet", "128x128", "192x128", "128x128")) == 4
    texts = [item.text for item in expand("text_encoder", "64x64:b1-2", "64x64:b1-8")]
    assert texts == ["E=1-1024 P=1-17@2"]
    assert [item.text for item in expand("unet_context", "64x64:b1-2", "64x64:b2-8")] == [
        "B=1-4@2 T=77",
        "B=1-16@4 T=77",
    ]


def test_a_symbol_from_the_future() -> None:
    contract = NetSpec(inputs=(TensorSpec(name="x", dtype="float32", shape=("Q", 4)),), outputs=())
    with pytest.raises(PackageError, match="the symbol 'Q'"):
        net_profiles("unet", contract, [Profile.parse("64x64")])


@given(st.lists(PROFILES, min_size=1, max_size=4), st.data())
def test_the_chosen_profile_covers_and_none_that_covers_is_nearer(
    wanted: list[Profile], data: st.DataObject
) -> None:
    net = data.draw(st.sampled_from(["text_encoder", "unet", "unet_context", "unet_time", "vae_decoder"]))
    profiles = net_profiles(net, DEMO.manifest.nets[net].spec, wanted)
    from_one = data.draw(st.sampled_from(profiles))
    sizes = {
        symbol.replace("/8", "8"): data.draw(st.integers(max(1, axis.low - 1), axis.high + 1))
        for symbol, axis in from_one.axes.items()
    }
    shapes = shapes_of(net, **sizes)
    covering = [profile for profile in profiles if profile.covers(shapes)]
    try:
        chosen = profiles[choose(profiles, shapes)]
    except LatentrtError as error:
        assert not covering
        assert "covers" in str(error) or "steps" in str(error)  # noqa: PT017
    else:
        assert chosen.covers(shapes)
        assert chosen.distance(shapes) == min(item.distance(shapes) for item in covering)


def test_every_shape_of_a_profile_is_covered_by_the_union_of_its_profiles() -> None:
    profiles = expand("unet", "128x128:b1-2", "128-256@192x128:b1")
    for rows, width, index in ((2, 128, 0), (1, 128, 1), (4, 128, 0), (2, 192, 2), (1, 256, 3)):
        assert choose(profiles, shapes_of("unet", B=rows, T=77, H8=16, W8=width // 8)) == index


def test_ties_go_to_the_first() -> None:
    profiles = expand("unet", "128x128:b1-4", "128x128:b1-2")
    assert choose(profiles, shapes_of("unet", B=2, T=77, H8=16, W8=16)) == 0


def test_an_uncovered_call_names_the_command() -> None:
    profiles = expand("unet", "128x128:b1-4")
    with pytest.raises(UsageError) as caught:
        choose(profiles, shapes_of("unet", B=4, T=77, H8=64, W8=96), backend="tensorrt", package="foo")
    assert "768x512 pixels, 4 rows, 77 tokens" in caught.value.found
    assert caught.value.expected.endswith("128x128 b1-4 guided; 128x128 b1-4 unguided")
    command = "latentrt build foo --backend tensorrt --profile 128x128:b1-4 --profile 768x512:b2"
    assert caught.value.fix.endswith(command)


@pytest.mark.parametrize(
    ("net", "sizes", "option"),
    [
        ("unet", {"B": 9, "T": 77, "H8": 16, "W8": 16}, "128x128:b9"),
        ("unet", {"B": 2, "T": 154, "H8": 16, "W8": 16}, "128x128:b1:t154"),
        ("vae_decoder", {"N": 9, "H8": 16, "W8": 16}, "128x128:b9"),
        ("text_encoder", {"P": 20}, "128x128:b10"),
    ],
)
def test_the_command_builds_what_was_asked(net: str, sizes: dict[str, int], option: str) -> None:
    profiles = expand(net, "128x128:b1-4")
    shapes = shapes_of(net, **sizes)
    with pytest.raises(UsageError) as caught:
        choose(profiles, shapes)
    assert caught.value.fix.endswith(f"--profile 128x128:b1-4 --profile {option}")
    assert choose(expand(net, "128x128:b1-4", option), shapes) > -1


def test_a_schedule_that_no_engine_covers() -> None:
    with pytest.raises(UsageError, match="2001 steps") as caught:
        choose(expand("unet_time", "128x128"), shapes_of("unet_time", S=2001))
    assert "--steps" in caught.value.fix


@pytest.mark.parametrize(
    "shapes",
    [{}, {"latent": (2, 4, 16)}, {"latent": (2, 5, 16, 16)}, {"x": (1,)}, {"latent": (0, 4, 16, 16)}],
)
def test_shapes_of_another_net(shapes: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(UsageError, match=r"was called with the shapes .*latentrt inspect"):
        choose(expand("vae_decoder", "128x128"), shapes)


def test_shapes_that_contradict_each_other() -> None:
    shapes = shapes_of("unet", B=9, T=77, H8=16, W8=16)
    shapes["latent"] = (2, 4, 16, 16)
    with pytest.raises(UsageError, match="was called with the shapes"):
        choose(expand("unet", "128x128"), shapes)
