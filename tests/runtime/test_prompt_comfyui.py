"""ComfyUI's syntax: its own examples, and a transcription of its parser."""

from __future__ import annotations

import pytest

from latentrt.engines.errors import UsageError
from latentrt.runtime.prompts.comfyui import parse_comfyui
from tests.runtime.prompt_references import comfyui

# The examples in comfy/sd1_clip.py, token_weights (there rounded)
EXAMPLES = [
    ("(foo)", [("foo", 1.1)]),
    ("(foo)(bar)", [("foo", 1.1), ("bar", 1.1)]),
    ("(foo:2.0)", [("foo", 2.0)]),
    ("((foo))", [("foo", 1.21)]),
    ("((foo):1.1)", [("foo", 1.21)]),
    ("((foo:1.1))", [("foo", 1.1)]),
    ("(foo:0.0)", [("foo", 0.0)]),
    ("((foo:1.0):0.0)", [("foo", 1.0)]),
    (
        "foo ((((lol (cat:666) attack:100)))) baz",
        [("foo ", 1.0), ("lol ", 100.0), ("cat", 666.0), (" attack", 100.0), (" baz", 1.0)],
    ),
    (
        "foo ((((lol (cat:666) attack):100))) baz",
        [("foo ", 1.0), ("lol ", 110.0), ("cat", 666.0), (" attack", 110.0), (" baz", 1.0)],
    ),
]
BEHAVIOUR = [
    ("", []),
    ("()", []),
    ("[a:b:0.5]", [("[a:b:0.5]", 1.0)]),
    (r"\(foo\) (bar\))", [("(foo) ", 1.0), ("bar)", 1.1)]),
    ("(:1.2)", [(":1.2", 1.1)]),
    ("(a:b)", [("a:b", 1.1)]),
    ("(a:1e1)", [("a", 10.0)]),
    ("a (b (c", [("a ", 1.0), ("(b (c", 1.0)]),
    ("(a (b)", [("a ", 1.1), ("(b", 1.1)]),
    ("a) (b) (c)", [("a) (b) (c)", 1.0)]),
    ("a) ( (b) c", [("a) ( ", 1.0), ("b", 1.1), (" c", 1.0)]),
]


def _pairs(text):
    return [(fragment.text, fragment.weight) for fragment in parse_comfyui(text)]


@pytest.mark.parametrize(("prompt", "fragments"), EXAMPLES + BEHAVIOUR)
def test_published_values(prompt, fragments):
    texts, weights = [text for text, _ in fragments], [weight for _, weight in fragments]
    for parsed in (_pairs(prompt), comfyui(prompt)):
        assert [text for text, _ in parsed] == texts
        assert [weight for _, weight in parsed] == pytest.approx(weights, rel=1e-15)


def test_ten_thousand_brackets_do_not_recurse():
    prompt = "(" * 10_000 + "a:0.5" + ")" * 10_000
    assert _pairs(prompt) == [("a", 0.5)]


@pytest.mark.parametrize(
    ("prompt", "what"),
    [
        ("a {red|blue} hat", "a random choice: '{red|blue}'"),
        ("{a|{b|c}|}", "a random choice: '{a|{b|c}'"),
        ("{a|b", "a random choice: '{a|b'"),
        ("a __colour__ hat", "a wildcard: '__colour__'"),
    ],
)
def test_named_refusals(prompt, what):
    with pytest.raises(UsageError) as error:
        parse_comfyui(prompt)
    assert error.value.found == f"the prompt has {what}"


@pytest.mark.parametrize(
    "prompt",
    [
        r"\{a|b} {a} | }",
        "embeddings, myembedding:x, an embedding of words",
        "<lora:x:1> rock AND roll [a|b] BREAK __",
    ],
)
def test_no_false_alarm(prompt):
    assert _pairs(prompt) == comfyui(prompt)


@pytest.mark.parametrize("weight", ["inf", "nan", "1e39"])
def test_weight_beyond_float32(weight):
    with pytest.raises(UsageError, match="gives 'a' the weight"):
        parse_comfyui(f"(a:{weight})")
