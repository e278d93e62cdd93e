"""The table of syntaxes."""

from __future__ import annotations

import numpy as np
import pytest

from latentrt.runtime.prompts.encode import PROMPT_SYNTAXES
from tests.runtime.prompt_references import clip_tokenizer

WEIGHTED = "a (red:1.5) cat"


def test_names():
    assert list(PROMPT_SYNTAXES) == ["plain", "a1111", "comfyui"]


@pytest.mark.parametrize(("name", "ids"), [("a1111", [320, 736, 2368]), ("comfyui", [320, 736, 2368])])
def test_weights_are_read(name, ids):
    syntax = PROMPT_SYNTAXES[name]
    chunks = syntax.cut(syntax.parse(WEIGHTED), clip_tokenizer())
    assert chunks.ids[0, 1:4].tolist() == ids
    np.testing.assert_array_equal(chunks.weights[0, :5], np.array([1, 1, 1.5, 1, 1], np.float32))


def test_plain_refuses_nothing():
    prompt = WEIGHTED + " <lora:a:1> [a:b:0.5] [a|b] a AND b embedding:x {a|b} __x__"
    syntax = PROMPT_SYNTAXES["plain"]
    chunks = syntax.cut(syntax.parse(prompt), clip_tokenizer())
    np.testing.assert_array_equal(chunks.ids, clip_tokenizer().encode([prompt]).ids)
    assert not chunks.weighted
