"""Token ids against transformers' ``CLIPTokenizer``, on a small vocabulary and on the real one."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from latentrt.checkpoints.files.tokenizers import write_clip_tokenizer
from latentrt.engines.errors import PackageError, UsageError
from latentrt.runtime.prompts.tokenizer import ClipTokenizer

SMALL = Path(__file__).parent / "data" / "tokenizer"
CORPUS = (
    "",
    " ",
    "a red circle on a blue background",
    "A Photo of an ASTRONAUT riding a horse, highly detailed!!! 8k, f/1.8",
    "it's we're they've I'm she'll he'd can't 'quoted' o'clock 'S 'T",
    "1234567890 3.14 1,000 2nd ½ ² ٣ Ⅷ",
    "café naïve Ångström façade über e\u0301 n\u0303 ñ",
    "İstanbul ẞ ſ ﬁ Straße ΌΣΟΣ",
    "emoji 😀👩‍👩‍👧‍👦🏳️‍🌈 ❤️ 🇩🇪",
    "日本語の文章 中文字符 한국어 العربية עברית हिन्दी ไทย",
    "tabs\tand\nnew\r\nlines   and \u3000 wide\xa0spaces\u200bzero\u2028line",
    "&amp; &lt;b&gt; &quot;html&quot; &amp;amp; &#39;",
    "control \x00\x01\x07\x1b\x7f\x85 characters \ufeff \ufffd",
    "(emphasis:1.3) [less] {x} <lora:name:0.8> a_b-c/d\\e #tag @me $5 50% ~ ` ^ |",
    "<|startoftext|>a<|endoftext|> b <|ENDOFTEXT|> <|endoftext|",
    "!!! ! a!b hello!",
    "ab" * 300,
    "word " * 200,
    "😀" * 60,
    "!" * 90,
    "one, two, three; " * 40,
    "e" + "\u0301" * 20,
    "\U0010ffff \ue000 \u0378",
)


def _ids(theirs: CLIPTokenizer, prompts, length=77) -> np.ndarray:
    batch = theirs(list(prompts), padding="max_length", truncation=True, max_length=length)
    return np.array(batch["input_ids"], np.int32)


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), "utf-8")


def _older_files(folder: Path, **special_tokens: object) -> Path:
    """A folder as Stable Diffusion repositories have it: no tokenizer.json, and a map of special tokens."""
    folder.mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(SMALL / name, folder)
    _write(folder / "tokenizer_config.json", {"model_max_length": 77, "pad_token": "<|endoftext|>"})
    _write(folder / "special_tokens_map.json", special_tokens)
    return folder


def _token(content: str) -> dict[str, object]:
    """As SD 1.5 stores its special tokens."""
    return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    decoded = shutil.copytree(SMALL, root / "decoder")
    config = {
        "added_tokens_decoder": {
            "0": {**_token("!"), "normalized": False, "special": True},
            "643": {**_token("<|startoftext|>"), "normalized": False, "special": True},
            "644": {**_token("<|endoftext|>"), "special": True},
        },
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "model_max_length": 77,
        "pad_token": "!",
        "unk_token": "<|endoftext|>",
    }
    for name in ("tokenizer.json", "special_tokens_map.json"):
        (decoded / name).unlink()
    _write(decoded / "tokenizer_config.json", config)
    bare = _older_files(root / "bare")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (bare / name).unlink()
    pads_with_zero = shutil.copytree(SMALL, root / "one file, pad 0")
    _write(pads_with_zero / "special_tokens_map.json", {"pad_token": "!"})
    return {
        "one file": SMALL,
        "one file, pad 0": pads_with_zero,
        "sd1": _older_files(
            root / "sd1",
            bos_token=_token("<|startoftext|>"),
            eos_token=_token("<|endoftext|>"),
            pad_token="<|endoftext|>",
            unk_token=_token("<|endoftext|>"),
        ),
        "sd2": _older_files(root / "sd2", pad_token="!", eos_token="<|endoftext|>"),
        "sdxl 2": decoded,
        "bare": bare,
    }


KINDS = ("one file", "one file, pad 0", "sd1", "sd2", "sdxl 2", "bare")


@pytest.mark.parametrize("kind", KINDS)
def test_corpus_equals_transformers(folders, kind):
    ours, theirs = ClipTokenizer.open(folders[kind]), CLIPTokenizer.from_pretrained(folders[kind])
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (
        theirs.bos_token_id,
        theirs.eos_token_id,
        theirs.pad_token_id,
    )
    assert ours.pad_id == (644 if kind in ("one file", "sd1", "bare") else 0)
    for prompt in CORPUS:
        np.testing.assert_array_equal(ours.encode([prompt]).ids, _ids(theirs, [prompt]), err_msg=repr(prompt))
    np.testing.assert_array_equal(ours.encode(CORPUS, 16).ids, _ids(theirs, CORPUS, 16))


@pytest.fixture(scope="module")
def small() -> ClipTokenizer:
    return ClipTokenizer.open(SMALL)


@pytest.fixture(scope="module")
def small_of_transformers() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(SMALL)


SETTINGS = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
ANY_TEXT = st.text(st.characters(codec="utf-8"), max_size=120)


@SETTINGS
@given(ANY_TEXT)
def test_any_text_equals_transformers(small, small_of_transformers, prompt):
    tokens = small.encode([prompt])
    np.testing.assert_array_equal(tokens.ids, _ids(small_of_transformers, [prompt]))


@SETTINGS
@given(ANY_TEXT, st.integers(2, 20))
def test_dropped_text_is_the_end_of_the_prompt(small, prompt, length):
    everything = small.encode([prompt], 2000).ids[0]
    tokens = small.encode([prompt], length)
    assert prompt.endswith(tokens.dropped[0])
    assert bool(tokens.dropped[0]) == (np.count_nonzero(everything != small.eos_id) > length - 1)
    assert tokens.ids[0, 0] == small.bos_id
    assert small.eos_id in tokens.ids[0]


def test_empty_prompt(small):
    tokens = small.encode(["", "circle"])
    assert tokens.ids.shape == (2, 77)
    assert tokens.ids.dtype == np.int32
    assert tokens.ids[0].tolist() == [small.bos_id] + [small.eos_id] * 76
    assert tokens.dropped == ("", "")
    assert small.encode([]).ids.shape == (0, 77)


def test_dropped_text_is_as_typed(small):
    tokens = small.encode(["circle, CIRCLE,  Red\tTriangle", "red"], 6)
    assert tokens.dropped == ("Red\tTriangle", "")


def test_words_are_all_ids_of_the_text_alone(small):
    assert small.words("") == []
    assert small.words("circle " * 100) == small.words("circle") * 100
    tokens = small.encode(["a red circle, blue"], 20).ids[0]
    words = small.words("a red circle, blue")
    assert tokens[1 : len(words) + 1].tolist() == words
    assert small.words(",") == [small.comma_id]


def test_100_kilobytes_are_quick(small):
    for prompt in ("a" * 100_000, "a b " * 25_000, "!" * 100_000, "\u0301" * 50_000):
        assert small.encode([prompt]).dropped[0]


def test_threads_share_one_tokenizer(small):
    lengths = [length for length in (8, 16, 77, 200) for _ in range(60)]
    serial = [small.encode(CORPUS, length).ids for length in lengths]
    with ThreadPoolExecutor(8) as pool:
        parallel = list(pool.map(lambda length: small.encode(CORPUS, length).ids, lengths))
    for one, other in zip(serial, parallel, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("stored", "length"), [(77, 77), (64, 64), (1e30, 77), (10**30, 77)])
def test_length_comes_from_the_config(tmp_path, stored, length):
    folder = shutil.copytree(SMALL, tmp_path / "tokenizer")
    _write(folder / "tokenizer_config.json", {"model_max_length": stored})
    assert ClipTokenizer.open(folder).encode([""]).ids.shape == (1, length)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", "{", "tokenizer_config.json: Expecting"),
        ("tokenizer_config.json", "[]", "no JSON object"),
        ("tokenizer_config.json", "[" * 100_000, "tokenizer_config.json"),
        ("tokenizer_config.json", '{"model_max_length": "77"}', "model_max_length is '77'"),
        ("tokenizer_config.json", '{"model_max_length": 1}', "model_max_length is 1"),
        ("tokenizer_config.json", '{"added_tokens_decoder": 5}', "added_tokens_decoder is no JSON object"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"0": 5}}', "entry is no JSON object"),
        ("special_tokens_map.json", '{"pad_token": 5}', "pad_token is no JSON object"),
        ("special_tokens_map.json", '{"pad_token": {"content": 5}}', "pad_token is"),
        ("special_tokens_map.json", '{"eos_token": "<stop>"}', "eos_token '<stop>' is not in the vocabulary"),
        ("special_tokens_map.json", "\udcff", "special_tokens_map.json"),
        ("tokenizer.json", "{", "tokenizer.json"),
        ("tokenizer.json", "{}", "tokenizer.json"),
        ("tokenizer.json", "", "tokenizer.json"),
    ],
)
def test_broken_file(tmp_path, name, content, message):
    folder = shutil.copytree(SMALL, tmp_path / "tokenizer")
    (folder / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(PackageError, match=message.replace("[", r"\[")):
        ClipTokenizer.open(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.json", "{"),
        ("vocab.json", "[]"),
        ("vocab.json", '{"a": "b"}'),
        ("vocab.json", "{}"),
        ("merges.txt", "not in the vocabulary\n"),
        ("merges.txt", "zzz qqq\n"),
        ("merges.txt", "\udcff \udcff\n"),
    ],
)
def test_broken_older_file(tmp_path, name, content):
    folder = _older_files(tmp_path / "tokenizer")
    (folder / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(PackageError):
        ClipTokenizer.open(folder)


@pytest.mark.parametrize("missing", [("vocab.json",), ("merges.txt",), ("vocab.json", "merges.txt")])
def test_missing_files(tmp_path, missing):
    folder = _older_files(tmp_path / "tokenizer")
    for name in missing:
        (folder / name).unlink()
    with pytest.raises(PackageError, match=r"holds neither tokenizer.json nor vocab.json with merges.txt"):
        ClipTokenizer.open(folder)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_tokenizer_file_never_crashes(tmp_path_factory, data):
    content = bytearray((SMALL / "tokenizer.json").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "tokenizer.json").write_bytes(content)
    try:
        ClipTokenizer.open(folder).encode(["a red circle"])
    except PackageError:
        pass


def test_one_string_is_no_batch(small):
    with pytest.raises(UsageError, match="one prompt; expected a list"):
        small.encode("a red circle")


@pytest.mark.parametrize("prompt", ["half a pair \ud83d", None, 5])
def test_prompt_that_is_no_text(small, prompt):
    for call in (lambda: small.encode([prompt]), lambda: small.words(prompt)):
        with pytest.raises(UsageError, match="a prompt that is no text"):
            call()


def test_too_short(small):
    with pytest.raises(UsageError, match="1 tokens a prompt"):
        small.encode(["a"], 1)


@pytest.fixture(scope="module", params=["<|endoftext|>", "!"], ids=["sd1", "sd2"])
def real(request, tmp_path_factory) -> Path:
    """OpenAI's 49,408 tokens."""
    return write_clip_tokenizer(tmp_path_factory.mktemp("real"), request.param)


def test_real_vocabulary_equals_transformers(real):
    ours, theirs = ClipTokenizer.open(real), CLIPTokenizer.from_pretrained(real)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (49406, 49407, theirs.pad_token_id)
    np.testing.assert_array_equal(ours.encode(CORPUS).ids, _ids(theirs, CORPUS))
    for prompt in CORPUS:
        assert ours.words(prompt) == theirs(prompt, add_special_tokens=False)["input_ids"], prompt
    cat = ours.encode(["a photo of a cat"]).ids[0]
    assert cat[:7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]  # as printed in many CLIP tutorials
    assert set(cat[7:].tolist()) == {ours.pad_id}

    @SETTINGS
    @given(ANY_TEXT)
    def any_text(prompt):
        np.testing.assert_array_equal(ours.encode([prompt]).ids, _ids(theirs, [prompt]))

    any_text()
