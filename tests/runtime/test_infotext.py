"""The AUTOMATIC1111 text: fixed samples, round trips, and any text at all."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.engines.errors import UsageError
from latentrt.runtime.pictures.infotext import DEFAULTS, format_infotext, parse_infotext
from tests.sizes import a_tenth_of

FIELDS = {
    "prompt": "a red circle,\n(blue:1.2) background",
    "negative_prompt": "blurry, text",
    "Steps": 20,
    "Sampler": "DPM++ 2M",
    "Schedule type": "Karras",
    "CFG scale": 7.0,
    "Seed": 965400086,
    "Size": "512x768",
    "Model hash": "45dee52b00",
    "Model": "mix, v1:2",
    "RNG": "CPU",
    "Clip skip": 2,
    "Version": "latentrt 0.1.0",
}
TEXT = """a red circle,
(blue:1.2) background
Negative prompt: blurry, text
Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 965400086, Size: 512x768, \
Model hash: 45dee52b00, Model: "mix, v1:2", RNG: CPU, Clip skip: 2, Version: latentrt 0.1.0"""
ENOUGH = {"Steps": 1, "Sampler": "Euler", "Seed": 0}


def test_the_text_is_automatic1111s():
    assert format_infotext(FIELDS) == TEXT
    assert parse_infotext(TEXT) == {name: str(value) for name, value in FIELDS.items()} | {"CFG scale": "7"}


def test_a_picture_of_automatic1111():
    # the shape of the sample in AUTOMATIC1111's parse_generation_parameters, with its hashes and LoRA lists
    text = (
        "portrait, <lora:style:0.8>\n\nby someone\nNegative prompt: ugly, (((deformed)))\nmutated\n"
        'Steps: 20, Sampler: Euler a, CFG scale: 7.5, Seed: 1, Size: 512x512, Lora hashes: "style: 1a2b", '
        "Hires upscale: 2, Version: v1.10.1"
    )
    assert parse_infotext(text) == {
        **DEFAULTS,
        "prompt": "portrait, <lora:style:0.8>\n\nby someone",
        "negative_prompt": "ugly, (((deformed)))\nmutated",
        "Steps": "20",
        "Sampler": "Euler a",
        "CFG scale": "7.5",
        "Seed": "1",
        "Size": "512x512",
        "Lora hashes": "style: 1a2b",
        "Hires upscale": "2",
        "Version": "v1.10.1",
    }


def test_defaults_are_left_out_and_come_back():
    text = format_infotext({**ENOUGH, "prompt": "x", "RNG": "GPU", "Clip skip": 1, "Model": None})
    assert text == "x\nSteps: 1, Sampler: Euler, Seed: 0"
    fields = parse_infotext(text)
    assert (fields["RNG"], fields["Clip skip"], "Model" in fields) == ("GPU", "1", False)


def test_fewer_than_three_pairs_are_prompt():
    assert parse_infotext("a cat\nmood: happy, light: soft") == {
        **DEFAULTS,
        "prompt": "a cat\nmood: happy, light: soft",
        "negative_prompt": "",
    }
    assert parse_infotext("a\nNegative prompt: b\nmood: c")["negative_prompt"] == "b\nmood: c"


def test_prompt_that_looks_like_parameters_survives():
    fields = {
        **ENOUGH,
        "prompt": "a: 1, bb: 2, cc: 3, dd: 4",
        "negative_prompt": "Steps: 9, Seed: 9, Size: 9",
    }
    assert parse_infotext(format_infotext(fields)) == {**DEFAULTS, **{k: str(v) for k, v in fields.items()}}


def test_negative_prompt_inside_a_line_survives_but_at_its_start_moves():
    kept = parse_infotext(format_infotext({**ENOUGH, "prompt": "the words Negative prompt: x"}))
    assert (kept["prompt"], kept["negative_prompt"]) == ("the words Negative prompt: x", "")
    moved = parse_infotext(
        format_infotext({**ENOUGH, "prompt": "a\nNegative prompt: x", "negative_prompt": "y"})
    )
    assert (moved["prompt"], moved["negative_prompt"]) == ("a", "x\ny")


def test_no_prompts():
    text = format_infotext(ENOUGH)
    assert text == "Steps: 1, Sampler: Euler, Seed: 0"
    assert parse_infotext(text)["prompt"] == ""
    assert parse_infotext("") == {**DEFAULTS, "prompt": "", "negative_prompt": ""}


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (7.0, "7"),
        (7.5, "7.5"),
        (-1, "-1"),
        ("", '""'),
        ("plain words", "plain words"),
        ('a "word"', 'a "word"'),
        ('"quoted"', json.dumps('"quoted"')),
        (" spaces ", '" spaces "'),
        ("a,b", '"a,b"'),
        ("a:b", '"a:b"'),
        ("a\nb", '"a\\nb"'),
        ("é, 日本", '"é, 日本"'),
        ('back\\slash, "', '"back\\\\slash, \\""'),
    ],
)
def test_values(value, written):
    text = format_infotext({**ENOUGH, "Model": value})
    assert text.endswith(f", Model: {written}")
    assert parse_infotext(text)["Model"] == (value if isinstance(value, str) else written)


def test_broken_quotes_stay_as_they_are():
    fields = parse_infotext('Steps: 1, Model: "a, Seed: 5, Hash: "\\q", Size: "')
    assert fields["Model"] == '"a'
    assert fields["Hash"] == '"\\q"'
    assert fields["Size"] == '"'


LINES = st.text(st.characters(codec="utf-8"), max_size=40)
PROMPTS = st.lists(
    st.one_of(LINES, st.sampled_from(["", "Steps: 1, Seed: 2, Size: 3", '"', "\\"])), max_size=4
)
NAMES = st.from_regex(r"[A-Za-z0-9é][-/ A-Za-z0-9é]{0,20}[A-Za-z0-9é]", fullmatch=True)
VALUES = st.one_of(
    LINES,
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(['"', '""', "\\", '\\"', ",", ':"', "512x512", "a,b:c", " ", "\x1c", "\u2028"]),
)


def _kept(lines: list[str]) -> str:
    """What the format keeps of a prompt."""
    stripped = [line.strip() for line in "\n".join(lines).split("\n")]
    while stripped and not stripped[0]:
        del stripped[0]
    return "\n".join(stripped)


@a_tenth_of(500)
def test_any_parameters_survive(count):
    given_parameters = given(PROMPTS, PROMPTS, st.dictionaries(NAMES, VALUES, min_size=3, max_size=12))
    settings(max_examples=count, deadline=None)(given_parameters(check_parameters_survive))()


def check_parameters_survive(prompt, negative, parameters):
    parameters = {name: value for name, value in parameters.items() if name not in DEFAULTS} | ENOUGH
    fields = {"prompt": "\n".join(prompt), "negative_prompt": "\n".join(negative), **parameters}
    parsed = parse_infotext(format_infotext(fields))
    expected = {
        name: str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
        for name, value in parameters.items()
    }
    if not any(line.strip().startswith("Negative prompt:") for line in fields["prompt"].split("\n")):
        assert parsed["prompt"] == _kept(prompt)
        assert parsed["negative_prompt"] == _kept(negative)
    assert {name: parsed[name] for name in expected} == expected
    assert set(parsed) == {*expected, *DEFAULTS, "prompt", "negative_prompt"}


@settings(max_examples=500, deadline=None)
@given(st.text(max_size=200) | st.text('ab:," \\\n-/1', max_size=200))
def test_any_text_is_read(text):
    fields = parse_infotext(text)
    assert {"prompt", "negative_prompt", *DEFAULTS} <= set(fields)
    assert all(isinstance(value, str) for value in fields.values())


LONG = (
    "a" * 100_000,
    " " * 99_999 + "x",
    "a " * 50_000,
    "a-/ " * 25_000,
    'ab:"' * 25_000,
    'ab:"\\",' * 20_000,
    "ab: " + " " * 100_000 + '"',
    'ab:"' + "\\" * 100_000,
    "ab:,ab:," * 12_500,
    "\n" * 100_000 + "x",
)


@pytest.mark.parametrize("text", LONG, ids=range(len(LONG)))
def test_long_text_is_read_in_linear_time(text):
    start = time.perf_counter()
    parse_infotext(text)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("name", ["a", "", "a,b", "a:b", "-ab", "ab ", "a\nb", "a.b"])
def test_name_that_the_format_cannot_hold(name):
    with pytest.raises(UsageError, match="parameters named"):
        format_infotext({**ENOUGH, name: 1})


def test_too_few_parameters():
    with pytest.raises(UsageError, match="2 parameters besides the prompts"):
        format_infotext({"prompt": "x", "Steps": 1, "Seed": 2, "RNG": "GPU"})


def test_fooocus_json():
    """As Fooocus 2.5's modules/meta_parser.py writes it with the scheme `fooocus`, shortened."""
    text = json.dumps(
        {
            "adm_guidance": "(1.5, 0.8, 0.3)",
            "base_model": "juggernautXL_v8",
            "guidance_scale": 4.0,
            "loras": [["offset_0.2.safetensors", 0.1]],
            "negative_prompt": "",
            "performance": "Speed",
            "prompt": "a fox, (red:1.2)",
            "resolution": "(1152, 896)",
            "sampler": "dpmpp_2m_sde_gpu",
            "scheduler": "karras",
            "seed": "6312640235219440617",
            "steps": 30,
            "version": "Fooocus v2.5.0",
        }
    )
    fields = parse_infotext(text)
    assert (fields["prompt"], fields["Size"], fields["Steps"]) == ("a fox, (red:1.2)", "1152x896", "30")
    assert (fields["CFG scale"], fields["Seed"]) == ("4.0", "6312640235219440617")
    assert (fields["Sampler"], fields["Schedule type"]) == ("dpmpp_2m_sde_gpu", "karras")
    assert fields["RNG"] == "CPU"
    assert fields["loras"] == '[["offset_0.2.safetensors", 0.1]]'


def test_swarmui_json():
    values = {"prompt": "a fox", "negativeprompt": "blurry", "model": "sdxl", "seed": 5, "steps": 20}
    text = json.dumps({"sui_image_params": {**values, "cfgscale": 7.5, "width": 1024, "height": 768}})
    fields = parse_infotext(text)
    assert (fields["prompt"], fields["negative_prompt"], fields["Seed"]) == ("a fox", "blurry", "5")
    assert (fields["Size"], fields["CFG scale"], fields["Model"]) == ("1024x768", "7.5", "sdxl")


@pytest.mark.parametrize("text", ["{a|b} fox", "{", '["a"]', "{" * 3000, '{"prompt": NaN}', "1"])
def test_braces_are_no_json(text):
    assert isinstance(parse_infotext(text)["prompt"], str)
