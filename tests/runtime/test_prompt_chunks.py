"""Chunks against transcriptions of the published loops, with the real vocabulary."""

from __future__ import annotations

import random

import numpy as np
import pytest

from latentrt.runtime.prompts.chunks import Fragment, a1111_chunks, comfyui_chunks, truncated_chunk
from tests.runtime import prompt_references as reference
from tests.runtime.prompt_references import clip_tokenizer

BREAK = Fragment(text="BREAK", weight=-1.0)
WORDS = ("cat", "a photo of", "antidisestablishmentarianism", ",", ", ", "red,", "x" * 20, "", "😀", "über")


def _fragments(seed):
    rng = random.Random(seed)
    fragments = []
    for _ in range(rng.randint(0, 40)):
        text = " ".join(rng.choice(WORDS) for _ in range(rng.choice((1, 1, 2, 3, 12))))
        weight = rng.choice((1.0, 1.1, 0.5, -2.0))
        fragments.append(BREAK if rng.random() < 0.05 else Fragment(text=text, weight=weight))
    return fragments


def _rows(chunks, pad):
    """As `PromptChunks` has them: 49406 is bos, 49407 is eos."""
    ids = [[49406, *(token for token, _ in chunk), 49407] for chunk in chunks]
    weights = [[1.0, *(weight for _, weight in chunk)] for chunk in chunks]
    return (
        [[*row, *[pad] * (77 - len(row))] for row in ids],
        [[*row, *[1.0] * (77 - len(row))] for row in weights],
    )


@pytest.mark.parametrize(("pad_token", "pad"), [("<|endoftext|>", 49407), ("!", 0)])
@pytest.mark.parametrize("syntax", ["a1111", "comfyui"])
def test_equals_the_published_loop(syntax, pad_token, pad):
    tokenizer = clip_tokenizer(pad_token)
    comma = 267
    assert tokenizer.comma_id == comma
    counts = set()
    for seed in range(60):
        fragments = _fragments(seed)
        if syntax == "a1111":
            tokenized = [([] if f == BREAK else tokenizer.words(f.text), f.weight) for f in fragments]
            ours, theirs = a1111_chunks(fragments, tokenizer), reference.a1111_chunks(tokenized, comma)
        else:
            tokenized = [(tokenizer.words(f.text), f.weight) for f in fragments]
            ours, theirs = comfyui_chunks(fragments, tokenizer), reference.comfyui_chunks(tokenized)
        ids, weights = _rows(theirs, pad)
        np.testing.assert_array_equal(ours.ids, np.array(ids, np.int32))
        np.testing.assert_array_equal(ours.weights, np.array(weights, np.float32))
        assert (ours.ids.dtype, ours.weights.dtype) == (np.int32, np.float32)
        assert ours.dropped == ""
        counts.add(len(ids))
    assert len(counts) > 3


@pytest.mark.parametrize("cut", [a1111_chunks, comfyui_chunks, truncated_chunk])
def test_empty_prompt_is_one_chunk(cut):
    chunks = cut([Fragment(text="")], clip_tokenizer("!"))
    assert chunks.ids.tolist() == [[49406, 49407, *[0] * 75]]
    assert not chunks.weighted


@pytest.mark.parametrize(("cats", "dogs"), [(55, [0, 25]), (54, [20, 5])])
def test_comma_backtracking(cats, dogs):
    """A comma 20 tokens before the chunk's end takes what follows along; one 21 before it does not."""
    chunks = a1111_chunks([Fragment(text="cat " * cats + ", " + "dog " * 25)], clip_tokenizer())
    assert np.count_nonzero(chunks.ids == 2368, axis=1).tolist() == [cats, 0]
    assert np.count_nonzero(chunks.ids == 1929, axis=1).tolist() == dogs


def test_break_ends_a_chunk_even_an_empty_one():
    tokenizer = clip_tokenizer()
    assert len(a1111_chunks([BREAK, BREAK, Fragment(text="cat")], tokenizer).ids) == 3
    assert len(a1111_chunks([Fragment(text="cat"), BREAK, Fragment(text="")], tokenizer).ids) == 1


def test_short_fragments_stay_together():
    tokenizer = clip_tokenizer()
    seven, eight = (Fragment(text="dog " * count, weight=1.5) for count in (7, 8))
    kept = comfyui_chunks([Fragment(text="cat " * 70), seven], tokenizer)
    assert np.count_nonzero(kept.weights != 1, axis=1).tolist() == [0, 7]
    split = comfyui_chunks([Fragment(text="cat " * 70), eight], tokenizer)
    assert np.count_nonzero(split.weights != 1, axis=1).tolist() == [5, 3]


def test_plain_text_is_truncated_and_says_so():
    chunks = truncated_chunk([Fragment(text="cat " * 75 + "(dog:1.2) [x]")], clip_tokenizer())
    assert chunks.ids.shape == (1, 77)
    assert chunks.ids[0, -1] == 49407
    assert chunks.dropped == "(dog:1.2) [x]"
    assert not chunks.weighted
