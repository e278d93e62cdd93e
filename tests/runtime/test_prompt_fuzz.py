"""Strings rich in syntax: both parsers equal the transcriptions, in linear time."""

from __future__ import annotations

import math
from time import process_time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.engines.errors import UsageError
from latentrt.runtime.prompts.a1111 import parse_a1111
from latentrt.runtime.prompts.comfyui import parse_comfyui
from tests.runtime import prompt_references as reference
from tests.sizes import a_tenth_of

PARSERS = ((parse_a1111, reference.a1111), (parse_comfyui, reference.comfyui))
PIECES = ("(", ")", "[", "]", ":", "\\", "1", ".", "-5", "a", " ", ",", "BREAK", "(", ":1.2)", ")")
STRINGS, LENGTH = 20, 21  # Hypothesis is quick with few examples of many strings each
FLOAT32_MAX = 3.4028234e38


def _expected(transcription, text):
    """Fragments, or None where the reference fails or its weights are beyond float32."""
    try:
        fragments = transcription(text)
    except ValueError:
        return None
    return fragments if all(abs(weight) <= FLOAT32_MAX for _, weight in fragments) else None


def _parsed(parse, text):
    """Fragments, or the error."""
    try:
        return [(fragment.text, fragment.weight) for fragment in parse(text)]
    except UsageError as error:
        return error


@a_tenth_of(20_000)
def test_strings_rich_in_syntax(count):
    compared = {parse: 0 for parse, _ in PARSERS}
    strings = 0

    def check(text):
        for parse, transcription in PARSERS:
            expected, parsed = _expected(transcription, text), _parsed(parse, text)
            if not isinstance(parsed, UsageError):
                assert parsed == expected, text
                compared[parse] += 1
            elif expected is not None:  # test_prompt_a1111.py has when this is right
                assert parse is parse_a1111, text
                assert "the prompt has prompt editing: '[" in parsed.found, text

    @settings(max_examples=count // STRINGS, deadline=None, derandomize=True, database=None)
    @given(st.binary(min_size=STRINGS * LENGTH, max_size=STRINGS * LENGTH))
    def run(data):
        nonlocal strings
        for start in range(0, len(data), LENGTH):
            count, *pieces = data[start : start + LENGTH]
            check("".join(PIECES[piece % len(PIECES)] for piece in pieces[: count % LENGTH]))
            strings += 1

    run()
    assert strings >= count
    assert min(compared.values()) > 0.9 * strings


def _repeat(unit):
    return lambda length: unit * (length // len(unit))


WORST = {
    **{unit: _repeat(unit) for unit in ("(", "[|", ":", " ", "\\", "<a:", "{", "__a")},
    "nested": lambda length: "(" * (length // 2) + ")" * (length // 2),
    "nested weights": lambda length: "(a" * (length // 8) + "b:1.0)" * (length // 8),
    "one long tail": lambda length: "(" * (length // 3) + ":" + "a" * (length // 3) + ")" * (length // 3),
    "half closed": lambda length: "(a" * (length // 3) + ")" * (length // 3),
    "crossing": lambda length: (
        "(" + "a[" * (length // 6) + "x" + ")a(" * (length // 9) + "]b" * (length // 6)
    ),
}


def _seconds(parse, text):
    start = process_time()
    _parsed(parse, text)
    return process_time() - start


@pytest.mark.parametrize("worst", WORST)
@pytest.mark.parametrize("parse", [parse_a1111, parse_comfyui])
def test_linear_time(parse, worst):
    """Sixteen times the length may take 48 times as long; a quadratic parser takes 256 times."""
    short, long = (WORST[worst](length) for length in (6_500, 104_000))
    ratio = math.inf
    for _ in range(3):  # another process may have been in the way
        base = min(_seconds(parse, short) for _ in range(2))
        ratio = min(ratio, _seconds(parse, long) / max(base, 0.001))
        if ratio < 48:
            return
    raise AssertionError(f"{ratio:.0f} times as long")
