"""AUTOMATIC1111's syntax: its own doctests, its grammar's verdicts, and a transcription of its parser."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from latentrt.engines.errors import UsageError
from latentrt.runtime.prompts.a1111 import parse_a1111
from latentrt.runtime.prompts.chunks import Fragment
from tests.runtime.prompt_references import a1111

SCHEDULING = json.loads((Path(__file__).parent / "data" / "prompts_scheduling.json").read_text("utf-8"))

# The doctests of modules/prompt_parser.py, parse_prompt_attention
DOCTESTS = [
    ("normal text", [("normal text", 1.0)]),
    ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
    ("(unbalanced", [("unbalanced", 1.1)]),
    (r"\(literal\]", [("(literal]", 1.0)]),
    ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
    (
        "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
        [
            ("a ", 1.0),
            ("house", 1.5730000000000004),
            (" ", 1.1),
            ("on", 1.0),
            (" a ", 1.1),
            ("hill", 0.55),
            (", sun, ", 1.1),
            ("sky", 1.4641000000000006),
            (".", 1.1),
        ],
    ),
]
BEHAVIOUR = [
    ("", [("", 1.0)]),
    ("()[]((", [("", 1.0)]),
    ("[less]", [("less", 1 / 1.1)]),
    ("a] b) c", [("a] b) c", 1.0)]),
    ("(a:1.5 ) (b: 2)", [("a", 1.5), (" ", 1.0), ("b", 2.0)]),
    ("(a:-1)", [("a", -1.0)]),
    ("(a:+.5)", [("a", 0.5)]),
    ("a:1.5) and (b:c)", [("a:1.5) and ", 1.0), ("b:c", 1.1)]),
    (r"\\ \[ \a (\))", [(r"\ [ a ", 1.0), (")", 1.1)]),
    ("a BREAK b", [("a", 1.0), ("BREAK", -1.0), ("b", 1.0)]),
    ("BREAKER BREAK", [("BREAKER", 1.0), ("BREAK", -1.0), ("", 1.0)]),
    ("(a BREAK b)", [("a", 1.1), ("BREAK", -1.1), ("b", 1.1)]),
    ("([crossed)]", [("crossed", 1.0)]),
]


def _pairs(text):
    return [(fragment.text, fragment.weight) for fragment in parse_a1111(text)]


@pytest.mark.parametrize(("prompt", "fragments"), DOCTESTS + BEHAVIOUR)
def test_published_values(prompt, fragments):
    assert _pairs(prompt) == fragments
    assert a1111(prompt) == fragments  # the transcription that the other tests rely on


def test_break_is_a_chunk_end_only_where_nothing_weighs_it():
    assert [f.ends_chunk for f in parse_a1111("a BREAK (b BREAK c) BREAK")] == [
        *(False, True, False),  # a, BREAK, ""
        *(False, False, False),  # b, the word, c
        *(False, True, False),
    ]
    assert not Fragment(text="BREAK").ends_chunk


@pytest.mark.parametrize("opening", ["(", "["])
def test_exact_up_to_32_brackets(opening):
    weights = [0.7, 1.3, 1.07, 0.93]
    levels = [f"({'abcdefgh'[i % 8]}" if i % 3 else f"{opening}y" for i in range(32)]
    closings = [f":{weights[i % 4]})" if i % 2 else ")]"[i % 4 // 2] for i in range(32)]
    prompt = " ".join([*levels, "x", *closings])
    assert _pairs(prompt) == a1111(prompt)


def test_deeper_brackets_agree_to_rounding():
    prompt = "".join(f"({index}" for index in range(300)) + "x" + ":0.99)y[z:1.02)" * 150
    ours, theirs = _pairs(prompt), a1111(prompt)
    assert [text for text, _ in ours] == [text for text, _ in theirs]
    assert [weight for _, weight in ours] == pytest.approx([weight for _, weight in theirs], rel=1e-12)


@pytest.mark.parametrize("prompt", SCHEDULING["scheduled"] + SCHEDULING["ambiguous"])
def test_scheduling_is_refused(prompt):
    """As the reference's grammar decided, run by the parser it is written for (lark 1.3.1, Earley)."""
    with pytest.raises(UsageError, match=r"the prompt has (prompt editing|alternation): '\["):
        parse_a1111(prompt)


def test_what_the_grammar_takes_for_text_is_text():
    for prompt in SCHEDULING["text"]:
        assert _pairs(prompt) == a1111(prompt), prompt


@pytest.mark.parametrize(
    ("prompt", "what", "fix"),
    [
        ("<hypernet:x:1>", "an extra network: '<hypernet:x:1>'", "Hypernetworks are not supported"),
        ("<other:x>", "an extra network: '<other:x>'", "Extra networks are not supported"),
        ("a [cat:dog:0.5] b", "prompt editing: '[cat:dog:0.5]'", "Write what should be drawn"),
        ("a [cat:10]", "prompt editing: '[cat:10]'", "Write what should be drawn"),
        ("a [cat::.5]", "prompt editing: '[cat::.5]'", "Write what should be drawn"),
        ("[cow|horse] in a field", "alternation: '[cow|horse]'", "Write what should be drawn"),
        ("a cat AND a dog :1.2", "composition of several prompts: 'AND'", "lower case"),
        ("rock AND roll", "composition of several prompts: 'AND'", "lower case"),
        ("a __colour__ hat", "a wildcard: '__colour__'", "Write one of its words"),
    ],
)
def test_named_refusals(prompt, what, fix):
    with pytest.raises(UsageError) as error:
        parse_a1111(prompt)
    assert error.value.found == f"the prompt has {what}"
    assert fix in error.value.fix
    assert '"plain"' in error.value.fix


@pytest.mark.parametrize(
    "prompt",
    [
        "[a:b] rock and roll, SAND, BRAND",
        "a|b [time 10:30pm]",
        "[cat:dog:0.5] | text",  # a bar outside of an alternation: the reference schedules nothing
        r"\[cat:dog:0.5\] 1 < 2 <3 > 2 <b> __ snake_case__",
        "<lora:never closed",
    ],
)
def test_no_false_alarm(prompt):
    assert _pairs(prompt) == a1111(prompt)


@pytest.mark.parametrize("weight", ["1.2.3", ".", "..5"])
def test_weight_that_is_no_number(weight):
    with pytest.raises(UsageError, match=f"the weight '{weight}'"):
        parse_a1111(f"(a:{weight})")
    assert _pairs(f"a:{weight})") == [(f"a:{weight})", 1.0)]


@pytest.mark.parametrize("prompt", ["(a:" + "9" * 40 + ")", "(" * 1000 + "a", "(a:" + "9" * 400 + ")"])
def test_weight_beyond_float32(prompt):
    with pytest.raises(UsageError, match="gives 'a' the weight"):
        parse_a1111(prompt)
