"""The tokenizer folder against ids that others published, and as transformers reads it."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from latentrt.checkpoints.files import tokenizers
from latentrt.checkpoints.files.tokenizers import write_clip_tokenizer
from latentrt.engines.errors import UsageError
from latentrt.runtime.prompts.tokenizer import ClipTokenizer

VOCABULARY = Path(tokenizers.__file__).parent / "clip_vocabulary"
# Ids between bos and eos, as printed by open_clip's SimpleTokenizer and by transformers' tokenizer of
# openai/clip-vit-base-patch32 in the tests of other projects' tokenizers.
PUBLISHED = [
    ("a photo of a cat", [320, 1125, 539, 320, 2368]),
    ("person working at a computer", [2533, 1699, 536, 320, 11639, 652]),
    ("code editor with syntax highlighting", [3217, 7661, 593, 3758, 3879, 17344]),
    ("it's a beautiful day", [585, 568, 320, 1215, 575]),
    ("I can't believe it's not butter", [328, 753, 713, 2649, 585, 568, 783, 6952]),
    ("they're working on it", [889, 982, 1699, 525, 585]),
    ("hello, world? how are you?", [3306, 267, 1002, 286, 829, 631, 592, 286]),
    ("email: user@example.com", [4462, 281, 7031, 287, 6228, 269, 2464]),
    ("the year 2024 was interesting", [518, 935, 273, 271, 273, 275, 739, 3628]),
    ("3.14 is pi", [274, 269, 272, 275, 533, 5357]),
    ("  HELLO   World  ", [3306, 1002]),
    ("MacBook Pro 16-inch", [20617, 2630, 272, 277, 268, 6523]),
    ("mobileclip", [9451, 944, 8546]),
    ("hatbox", [3447, 2063]),
    ("hat box", [3801, 2063]),
    ("café", [15304]),
    ("🐶", [10631]),
]


@pytest.fixture(scope="module", params=["<|endoftext|>", "!"], ids=["sd1", "sd2"])
def folder(request, tmp_path_factory) -> Path:
    return write_clip_tokenizer(
        tmp_path_factory.mktemp("tokenizers") / "new" / request.param[:1], request.param
    )


def test_published_ids(folder):
    ours, theirs = ClipTokenizer.open(folder), CLIPTokenizer.from_pretrained(folder)
    for prompt, ids in PUBLISHED:
        assert ours.words(prompt) == ids, prompt
        assert theirs(prompt)["input_ids"] == [49406, *ids, 49407], prompt


@pytest.mark.parametrize(
    ("pad_token", "ids"), [("<|endoftext|>", [3306, 256, 995]), ("!", [3306, 0, 0, 0, 0])], ids=["sd1", "sd2"]
)
def test_exclamation_marks(tmp_path, pad_token, ids):
    """256 and 995 are published; with SD 2 transformers takes each mark for padding, and so do we."""
    folder = write_clip_tokenizer(tmp_path, pad_token)
    for tokenizer in (CLIPTokenizer.from_pretrained(folder), ClipTokenizer.open(folder)):
        words = tokenizer.words if isinstance(tokenizer, ClipTokenizer) else tokenizer.encode
        assert [word for word in words("hello! !!!") if word < 49406] == ids


def test_folder_is_complete(folder):
    assert sorted(path.name for path in folder.iterdir()) == [
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer_config.json",
        "vocab.json",
    ]
    vocabulary = json.loads((folder / "vocab.json").read_text("utf-8"))
    assert len(vocabulary) == 49408
    assert sorted(vocabulary.values()) == list(range(49408))
    assert (vocabulary["!"], vocabulary[",</w>"], vocabulary["<|endoftext|>"]) == (0, 267, 49407)
    assert len((folder / "merges.txt").read_text("utf-8").splitlines()) == 1 + 48894
    theirs = CLIPTokenizer.from_pretrained(folder)
    assert (len(theirs), theirs.model_max_length) == (49408, 77)
    pad = json.loads((folder / "special_tokens_map.json").read_text("utf-8"))["pad_token"]
    assert (theirs.pad_token, theirs.pad_token_id) == (pad, vocabulary[pad])


def test_vocabulary_is_openais_file():
    """The first 48,895 of its lines, which are those that CLIP reads.

    The digest is of these lines of the file that other projects fetch from openai/CLIP, whose sha256 is
    924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a.
    """
    lines = gzip.decompress((VOCABULARY / "merges.txt.gz").read_bytes())
    digest = hashlib.sha256(lines).hexdigest()
    assert digest == "685491abbdad36159d094ecdc23bebc0dd53f8d1df35c4d74ef6036db2ba7572"
    assert "Copyright (c) 2021 OpenAI" in (VOCABULARY / "LICENSE").read_text("utf-8")


def test_unknown_padding(tmp_path):
    with pytest.raises(UsageError, match="pad_token is '<pad>'; expected one of"):
        write_clip_tokenizer(tmp_path, "<pad>")
