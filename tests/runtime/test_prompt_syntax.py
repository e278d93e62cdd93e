"""The table of syntaxes."""

from __future__ import annotations

import numpy as np
import pytest

from latentrt.engines.errors import UsageError
from latentrt.runtime.prompts.syntax import PROMPT_SYNTAXES, prompt_syntax
from tests.runtime.prompt_references import clip_tokenizer

WEIGHTED = "a (red:1.5) cat"


def test_names():
    assert list(PROMPT_SYNTAXES) == ["plain", "a1111", "comfyui"]
    assert all(prompt_syntax(name) is syntax for name, syntax in PROMPT_SYNTAXES.items())


@pytest.mark.parametrize(("name", "ids"), [("a1111", [320, 736, 2368]), ("comfyui", [320, 736, 2368])])
def test_weights_are_read(name, ids):
    chunks = prompt_syntax(name).chunks(WEIGHTED, clip_tokenizer())
    assert chunks.ids[0, 1:4].tolist() == ids
    np.testing.assert_array_equal(chunks.weights[0, :5], np.array([1, 1, 1.5, 1, 1], np.float32))


def test_plain_refuses_nothing():
    prompt = WEIGHTED + " <lora:a:1> [a:b:0.5] [a|b] a AND b embedding:x {a|b} __x__"
    chunks = prompt_syntax("plain").chunks(prompt, clip_tokenizer())
    np.testing.assert_array_equal(chunks.ids, clip_tokenizer().encode([prompt]).ids)
    assert not chunks.weighted


def test_unknown_name():
    with pytest.raises(
        UsageError, match="unknown prompt syntax 'A1111'; expected one of plain, a1111, comfyui"
    ):
        prompt_syntax("A1111")


@pytest.mark.parametrize("name", PROMPT_SYNTAXES)
@pytest.mark.parametrize("prompt", [None, 5, b"a"])
def test_prompt_that_is_no_text(name, prompt):
    with pytest.raises(UsageError, match="expected a str"):
        prompt_syntax(name).chunks(prompt, clip_tokenizer())
