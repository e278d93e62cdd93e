import json
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from latentrt.demo import shapes, tokenizer

TEXTS = [
    "",
    "a small yellow star on a green background",
    "A  LARGE red\tcircle, grey background!",
    "Hello Wörld: it's 42 zebras",
    "日本 ünïcode",
    "<|endoftext|> a ring",
    "a red circle on a blue background " * 20,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(shapes.vocabulary(), path)
    return path


@pytest.mark.parametrize("text", TEXTS)
def test_the_files_give_transformers_the_same_ids(folder: Path, text: str) -> None:
    reference = CLIPTokenizer.from_pretrained(folder)
    expected = reference(text, padding="max_length", max_length=77, truncation=True)["input_ids"]
    assert tokenizer.build(shapes.vocabulary()).encode(text).ids == expected


def test_every_word_is_one_token() -> None:
    built = tokenizer.build(shapes.vocabulary())
    for word in shapes.vocabulary():
        bos, token, *padding = built.encode(word).ids
        assert bos == built.get_vocab_size() - 2
        assert built.id_to_token(token) == word + "</w>"
        assert set(padding) == {built.get_vocab_size() - 1}


def test_other_words_fall_back_to_bytes() -> None:
    built = tokenizer.build(shapes.vocabulary())
    ids = built.encode("xyzzy é").ids[1:8]
    assert built.get_vocab_size() - 1 not in ids[:7]
    tokens = [built.id_to_token(i) for i in ids]
    assert tokens == ["x", "y", "z", "z", "y</w>", "Ã", "©</w>"]


def test_the_plain_files_agree_with_the_fast_one(folder: Path) -> None:
    fast = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert vocabulary == fast["vocab"]
    assert merges[0] == "#version: 0.2"
    assert [line.split(" ") for line in merges[1:]] == [list(pair) for pair in fast["merges"]]
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
