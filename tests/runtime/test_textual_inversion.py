"""Prompts with embeddings (T37 to T42), against transformers, diffusers and the published loops."""

from __future__ import annotations

import hashlib
import random
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import CLIPTextModel, CLIPTokenizer

import latentrt.demo
from latentrt.adapters.embeddings import Embedding, make_embedding, vocabulary_size
from latentrt.engines.backend import choose_backend
from latentrt.engines.errors import CheckpointError, PackageError, UsageError
from latentrt.engines.package import Package
from latentrt.engines.spec import EXTRA_EMBEDDINGS
from latentrt.runtime.embeddings import EmbeddingLibrary, read_hashes
from latentrt.runtime.pictures.infotext import parse_infotext
from latentrt.runtime.pictures.write import PictureMetadata
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.prompts.chunks import Fragment, a1111_chunks, comfyui_chunks, truncated_chunk
from latentrt.runtime.prompts.encode import PROMPT_SYNTAXES, TextConditioner, TextEncoder
from latentrt.runtime.prompts.tokenizer import ClipTokenizer
from latentrt.runtime.redraw import redraw
from latentrt.runtime.refine import refine
from tests.engines.host_device import HostDevice
from tests.parity_pair import BAR, Pair, drawn, exported, ours, psnr
from tests.runtime import prompt_references as reference
from tests.runtime.device_bench import device_pipeline
from tests.runtime.prompt_references import clip_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*__array.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]
DEMO = Path(latentrt.demo.__file__).parent
WIDTH = 96
FAST: dict[str, Any] = {"num_inference_steps": 3, "height": 64, "width": 64, "seed": 1, "output_type": "np"}


def rows(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32) / 4


# ── where names are found ────────────────────────────────────────────────────────────────────────────


def called(syntax: str, prompt: str, *names: str) -> list[str]:
    """The fragments of a prompt; embeddings as [name]."""
    fragments = PROMPT_SYNTAXES[syntax].read(prompt, names)
    return [f"[{one.embedding}]" if one.embedding else one.text for one in fragments]


@pytest.mark.parametrize(
    ("syntax", "prompt", "names", "found"),
    [
        # T40: first, in mid-sentence without a comma, last, in brackets
        ("a1111", "face", ["face"], ["[face]"]),
        ("a1111", "face in a wood", ["face"], ["[face]", " in a wood"]),
        ("a1111", "a face in a wood, face", ["face"], ["a ", "[face]", " in a wood, ", "[face]"]),
        ("a1111", "a (Face:1.2).", ["face"], ["a ", "[face]", "."]),
        ("a1111", r"(EasyNegative \(v2\):1.2)", ["EasyNegative (v2)"], ["[EasyNegative (v2)]"]),
        ("a1111", "bad-hands-5,bad  prompt", ["bad-hands-5", "bad prompt"],
         ["[bad-hands-5]", ",", "[bad prompt]"]),
        # T42: the longest name, and no name in another word
        ("a1111", "cat-2 cat scat cats cat-3 cat_2 my-cat 1.cat", ["cat", "cat-2"],
         ["[cat-2]", " ", "[cat]", " scat cats cat-3 cat_2 my-cat 1.cat"]),
        ("a1111", "1a1 21a1 1a12 1 a 1", ["1a1"], ["[1a1]", " 21a1 1a12 1 a 1"]),
        ("a1111", "cat style cat", ["cat", "cat style"], ["[cat style]", " ", "[cat]"]),
        ("a1111", "cat! cat", ["cat style", "cat!", "cat"], ["[cat!]", " ", "[cat]"]),
        ("a1111", "a <cat-toy>, cat-toy", ["<cat-toy>"], ["a ", "[<cat-toy>]", ", cat-toy"]),
        ("a1111", "v1 v1.5", ["v1"], ["[v1]", " v1.5"]),
        ("a1111", "über ÜBER", ["über"], ["[über]", " ", "[über]"]),
        ("a1111", "Cat cat", ["Cat", "cat"], ["[Cat]", " ", "[cat]"]),
        ("a1111", "a BREAK b", ["BREAK"], ["a", "BREAK", "b"]),
        ("a1111", "the embedding: a face", ["the"], ["[the]", " embedding: a face"]),
        ("a1111", "a,embedding:face.", ["face"], ["a,", "[face]", "."]),
        ("a1111", "(embedding:face:1.2) embedding:Face.pt", ["face"], ["[face]", " ", "[face]"]),
        # ComfyUI's: at the start of a word, and never without the prefix
        ("comfyui", "face, embedding:face, x", ["face"], ["face, ", "[face]", ", x"]),
        ("comfyui", "(embedding:face:1.2)\nembedding:face", ["face"], ["[face]", "\n", "[face]"]),
        ("comfyui", "a,embedding:face", ["face"], ["a,embedding:face"]),
        ("comfyui", "embedding:face.safetensors<x>", ["face"], ["[face]", "<x>"]),
        ("comfyui", "embedding:sub embedding:<cat-toy>", ["sub", "<cat-toy>"], ["[sub]", " ", "[<cat-toy>]"]),
        # as diffusers: exactly as it was loaded
        ("plain", "a <cat-toy> (Cat) cat scat", ["<cat-toy>", "cat"],
         ["a ", "[<cat-toy>]", " (Cat) ", "[cat]", " scat"]),
        ("plain", "embedding:none", ["cat"], ["embedding:none"]),
        *((syntax, "a cat", [], ["a cat"]) for syntax in PROMPT_SYNTAXES),
    ],
)  # fmt: skip
def test_names(syntax: str, prompt: str, names: list[str], found: list[str]) -> None:
    assert called(syntax, prompt, *names) == found


@pytest.mark.parametrize(
    ("syntax", "prompt", "names", "message"),
    [
        (
            "a1111",
            "a embedding:fase, b",
            ["face", "other"],
            r"no embedding is called 'fase'; .*2 .*as 'face'\.",
        ),
        ("a1111", "embedding:face2", ["face"], "no embedding is called 'face2'"),
        (
            "a1111",
            "(embedding:face:1.2)",
            [],
            "called 'face'; expected no call, because none is known. Load it",
        ),
        ("comfyui", "embedding:a/face,", ["face"], "no embedding is called 'a/face'"),
        ("comfyui", "a\nembedding: x y", [], "calls 'embedding: x', and no embedding is called 'x'"),
        ("comfyui", "embedding:Face", ["face"], "no embedding is called 'Face'; expected .*'face'"),
        ("a1111", "CAT", ["Cat", "cat"], "has 'CAT', and embeddings are called 'Cat' and 'cat'"),
    ],
)
def test_names_that_are_not_there(syntax: str, prompt: str, names: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        called(syntax, prompt, *names)


# ── where vectors are placed ─────────────────────────────────────────────────────────────────────────

CUTS = {"a1111": a1111_chunks, "comfyui": comfyui_chunks}


def test_a1111_places_vectors_as_the_published_loop() -> None:
    """T41, with weights, commas near the cut, and BREAK."""
    tokenizer, extra = clip_tokenizer(), {"one": range(49408, 49409), "ten": range(49409, 49419)}
    extra["full"] = range(49419, 49494)
    kinds = set()
    for seed in range(200):
        rng = random.Random(seed)
        names = ("one", "ten", "ten", "full")
        words = ("cat", ",", ", ", "antidisestablishmentarianism", "a photo of")
        fragments = [
            Fragment(text="x", weight=rng.choice((1.0, 1.2)), embedding=rng.choice(names))
            if rng.random() < 0.2
            else Fragment(text=" ".join(rng.choices(words, k=rng.choice((1, 5, 30)))))
            for _ in range(rng.randint(1, 20))
        ]  # fmt: skip
        tokenized = [
            ([tuple(extra[f.embedding])] if f.embedding else tokenizer.words(f.text), f.weight)
            for f in fragments
        ]
        ours = a1111_chunks(fragments, tokenizer, extra)
        theirs = reference.a1111_chunks(tokenized, 267)
        for row, weights, chunk in zip(ours.ids, ours.weights, theirs, strict=True):
            assert (row[0], row[1 + len(chunk)]) == (49406, 49407)
            assert row[1 : 1 + len(chunk)].tolist() == [token for token, _ in chunk]
            np.testing.assert_array_equal(weights[1 : 1 + len(chunk)], np.float32([w for _, w in chunk]))
            kinds.add(len(chunk))
    assert {75, 65} & kinds


@pytest.mark.parametrize("syntax", ["a1111", "comfyui"])
@pytest.mark.parametrize(("before", "first"), [(65, 66), (66, 1), (70, 1), (75, 1), (0, 1)])
def test_ten_vectors_stay_together(syntax: str, before: int, first: int) -> None:
    """T41: at the end of a chunk they move to the next as a whole; ComfyUI itself would cut them."""
    tokenizer, ids = clip_tokenizer(), range(49408, 49418)
    fragments = [Fragment(text="cat " * before), Fragment(text="x", weight=1.5, embedding="ten")]
    chunks = CUTS[syntax](fragments, tokenizer, {"ten": ids})
    assert len(chunks.ids) == (2 if first == 1 and before else 1)
    last = chunks.ids[-1]
    assert last[first : first + 10].tolist() == list(ids)
    assert (last[0], last[first + 10]) == (tokenizer.bos_id, tokenizer.eos_id)
    assert (chunks.weights[-1] == 1.5).sum() == 10


@pytest.mark.parametrize("syntax", ["a1111", "comfyui"])
def test_as_many_vectors_as_there_is_room(syntax: str) -> None:
    ids = range(49408, 49483)
    fragments = [Fragment(text="a"), Fragment(text="x", embedding="full"), Fragment(text="b")]
    chunks = CUTS[syntax](fragments, clip_tokenizer(), {"full": ids})
    assert len(chunks.ids) == 3
    assert chunks.ids[1].tolist() == [49406, *ids, 49407]


def test_diffusers_syntax_drops_an_embedding_as_a_whole() -> None:
    tokenizer, extra = clip_tokenizer(), {"two": range(49408, 49410)}
    word = Fragment(text="<two>", embedding="two")
    fits = truncated_chunk([Fragment(text="cat " * 73), word], tokenizer, extra)
    assert fits.ids[0, -3:].tolist() == [49408, 49409, 49407]
    cut = truncated_chunk([Fragment(text="cat " * 74), word, Fragment(text=", a dog")], tokenizer, extra)
    assert (cut.ids[0, 75], cut.dropped) == (49407, "<two>, a dog")


# ── the encoder, against transformers with a larger table ────────────────────────────────────────────


class Torch:
    """The demo's text encoder in torch, its table made longer, and its tokenizer."""

    def __init__(self, extra: np.ndarray) -> None:
        self.tokenizer = CLIPTokenizer.from_pretrained(DEMO / "checkpoint" / "tokenizer")
        model = CLIPTextModel.from_pretrained(DEMO / "checkpoint" / "text_encoder", dtype=torch.float32)
        self.first = model.config.vocab_size
        model.resize_token_embeddings(self.first + len(extra), mean_resizing=False)
        with torch.no_grad():
            model.get_input_embeddings().weight[self.first :] = torch.from_numpy(extra)
        self.model = model.eval()

    def words(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def context(self, ids: list[int]) -> np.ndarray:
        eos = self.tokenizer.eos_token_id
        row = [self.tokenizer.bos_token_id, *ids, eos]
        row += [self.tokenizer.pad_token_id] * (77 - len(row))
        with torch.no_grad():
            return self.model(torch.tensor([row])).last_hidden_state[0].numpy()


FACE, HAND = rows(3, WIDTH), rows(1, WIDTH, seed=1)


@pytest.fixture(scope="module")
def oracle() -> Torch:
    return Torch(np.concatenate([FACE, HAND]))


@pytest.fixture(scope="module")
def conditioner() -> Iterator[Any]:
    package = Package.open(DEMO / "package")
    _, backend = choose_backend("onnxruntime")
    with backend.open_net(package, "text_encoder", threads=1) as net:
        encoder = TextEncoder(
            run=net,
            spec=net.spec,
            tokenizer=ClipTokenizer.open(package.root / "tokenizer"),
            vocabulary=lambda: vocabulary_size(package, "text_encoder"),
        )
        yield lambda **options: TextConditioner([encoder], **options)


def embedding(name: str, vectors: np.ndarray) -> Embedding:
    nets = Package.open(DEMO / "package").manifest.nets
    (taken,) = [item for item in nets["text_encoder"].spec.inputs if item.name == EXTRA_EMBEDDINGS]
    return make_embedding(name, {"emb_params": vectors}, {"text_encoder": taken})


KNOWN = {"face": embedding("face", FACE), "<hand>": embedding("<hand>", HAND)}


def test_the_context_of_a_prompt_with_embeddings(conditioner: Any, oracle: Torch) -> None:
    """T40: the same rows wherever a name stands; a weight multiplies all of them."""
    face, hand = range(oracle.first, oracle.first + 3), oracle.first + 3
    words = oracle.words
    wanted = {
        "face": [*face],
        "a red circle face on a background": [*words("a red circle"), *face, *words("on a background")],
        "a <hand>, face": [*words("a"), hand, *words(","), *face],
        "embedding:face circle embedding:<hand>": [*face, *words("circle"), hand],
        "a red circle": words("a red circle"),
    }  # fmt: skip
    made = conditioner().encode(list(wanted), syntax="a1111", embeddings=KNOWN)
    for context, ids in zip(made.context, wanted.values(), strict=True):
        np.testing.assert_allclose(context, oracle.context(ids), rtol=1e-3, atol=2e-4)
    weighted = conditioner().encode(["a (face:1.3)"], syntax="a1111", embeddings=KNOWN).context[0]
    z = oracle.context([*words("a"), *face])
    scaled = z * np.array([1, 1, *[1.3] * 3, *[1] * 72], np.float32)[:, None]
    np.testing.assert_allclose(weighted, scaled * (z.mean() / scaled.mean()), rtol=1e-3, atol=2e-4)
    comfy = conditioner().encode(["a (embedding:face:1.3)"], syntax="comfyui", embeddings=KNOWN).context[0]
    empty = oracle.context([])
    wanted_comfy = np.where((scaled == z), z, empty + (z - empty) * np.float32(1.3))
    np.testing.assert_allclose(comfy, wanted_comfy, rtol=1e-3, atol=2e-4)


def test_names_that_begin_like_others(conditioner: Any) -> None:
    """T42: fifteen vectors of a name of one token and digits, a name that begins another, one in a word."""
    known = {"1a1": rows(15, WIDTH, seed=2), "cat": rows(2, WIDTH, seed=3), "cat-2": rows(1, WIDTH, seed=4)}
    oracle = Torch(np.concatenate(list(known.values())))
    many, cat, two = (
        range(oracle.first + begin, oracle.first + end) for begin, end in ((0, 15), (15, 17), (17, 18))
    )
    words = oracle.words
    wanted = {
        "1a1": [*many],
        "a 1a1 cat-2, cat": [*words("a"), *many, *two, *words(","), *cat],
        "scat 1a1 21a1": [*words("scat"), *many, *words("21a1")],
        "cat, scat, cat-2": [*cat, *words(", scat,"), *two],
    }
    made = conditioner().encode(
        list(wanted), syntax="a1111", embeddings={name: embedding(name, x) for name, x in known.items()}
    )
    for context, ids in zip(made.context, wanted.values(), strict=True):
        np.testing.assert_allclose(context, oracle.context(ids), rtol=1e-3, atol=2e-4)


def test_two_chunks(conditioner: Any, oracle: Torch) -> None:
    word = oracle.words("circle")
    count = 74 // len(word)
    made = conditioner().encode(["circle " * count + "face"], syntax="a1111", embeddings=KNOWN).context[0]
    assert made.shape == (2 * 77, WIDTH)
    np.testing.assert_allclose(made[:77], oracle.context(word * count), rtol=1e-3, atol=2e-4)
    face = [*range(oracle.first, oracle.first + 3)]
    np.testing.assert_allclose(made[77:], oracle.context(face), rtol=1e-3, atol=2e-4)


def test_a_text_does_not_depend_on_its_company(conditioner: Any) -> None:
    texts = ["a <hand>", "face (face:1.2)", "a red circle", "<hand> face"]
    together = conditioner().encode(texts, syntax="a1111", embeddings=KNOWN).context
    for text, context in zip(texts, together, strict=True):
        alone = conditioner().encode([text], syntax="a1111", embeddings=KNOWN).context[0]
        np.testing.assert_array_equal(context, alone)
    plain = conditioner().encode(["a red circle"], syntax="a1111").context[0]
    np.testing.assert_array_equal(together[2], plain)


def test_the_cache_knows_the_content(conditioner: Any) -> None:
    """Another file under the same name is not stale; a text without names is the same with any."""
    shared = conditioner()
    texts = ["a face", "a red circle"]
    others = {**KNOWN, "face": embedding("face", FACE[::-1].copy())}
    for known in (KNOWN, others, {}, KNOWN):
        wanted = conditioner().encode(texts, syntax="a1111", embeddings=known).context
        np.testing.assert_array_equal(shared.encode(texts, syntax="a1111", embeddings=known).context, wanted)
    first, second, third = (
        conditioner().encode(texts, syntax="a1111", embeddings=known).context for known in (KNOWN, others, {})
    )
    assert not np.array_equal(first[0], second[0])
    assert not np.array_equal(first[0], third[0])
    assert len(shared._cache._texts) == 4


def test_unknown_names_are_refused_where_texts_are_encoded(conditioner: Any) -> None:
    with pytest.raises(UsageError, match="no embedding is called 'nose'"):
        conditioner().encode(["embedding:nose"], syntax="comfyui")


# ── pipelines ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    save_file({"emb_params": FACE}, tmp_path / "Face.safetensors")
    save_file({"<hand>": HAND}, tmp_path / "sub" / "learned_embeds.safetensors")
    return tmp_path


@pytest.fixture(scope="module")
def plain() -> Iterator[Pipeline]:
    with Pipeline.open("demo", threads=1) as pipe:
        yield pipe


@pytest.fixture
def pipe(plain: Pipeline, folder: Path) -> Pipeline:
    """With the folder, over nets that are open."""
    return Pipeline.over(plain.package, plain.loop, plain.backend, embeddings=folder)


PROMPT = "a red face on a blue background"


def test_a_picture_of_an_embedding_is_that_of_its_words(plain: Pipeline, tmp_path: Path) -> None:
    """The rows of the table, given as an embedding, draw the very picture of the word."""
    oracle = Torch(np.zeros((1, WIDTH), np.float32))
    ids = oracle.words("circle")
    vectors = oracle.model.get_input_embeddings().weight[ids].detach().numpy()
    pipe = Pipeline.over(plain.package, plain.loop, plain.backend)
    pipe.load_textual_inversion({"thing": vectors})
    wanted = plain("a red circle on a blue background", negative_prompt="circle", **FAST).images
    for prompt, syntax in (("thing", "a1111"), ("embedding:thing", "comfyui"), ("thing", "plain")):
        found = pipe(
            f"a red {prompt} on a blue background", negative_prompt=prompt, prompt_syntax=syntax, **FAST
        )
        np.testing.assert_array_equal(found.images, wanted)


def test_without_embeddings_no_byte_changes(plain: Pipeline, pipe: Pipeline) -> None:
    prompt = "a red circle on a blue background"
    wanted = plain(prompt, **FAST)
    pipe.load_textual_inversion({"<hand>": HAND})
    found = pipe(prompt, **FAST)
    np.testing.assert_array_equal(found.images, wanted.images)
    assert found.record() == wanted.record()
    assert found.infotext() == wanted.infotext()
    assert "TI hashes" not in found.infotext()


def test_files_of_a_folder(plain: Pipeline, pipe: Pipeline, folder: Path) -> None:
    loaded = Pipeline.over(plain.package, plain.loop, plain.backend)
    loaded.load_textual_inversion(folder / "Face.safetensors", token="face")
    wanted = loaded(PROMPT, **FAST).images
    np.testing.assert_array_equal(pipe(PROMPT, **FAST).images, wanted)
    assert not np.array_equal(plain(PROMPT, **FAST).images, wanted)
    explicit = PROMPT.replace("face", "embedding:Face")
    np.testing.assert_array_equal(pipe(explicit, prompt_syntax="comfyui", **FAST).images, wanted)
    # in a subfolder, whose path ComfyUI wants as well
    for name in ("embedding:learned_embeds", "embedding:sub/learned_embeds.safetensors"):
        assert [
            one.name for one in pipe(name, prompt_syntax="comfyui", **FAST).request.embeddings.values()
        ] == [name[10:].removesuffix(".safetensors")]
    # with the syntax that has no grammar, only words that the caller gave count
    as_text = plain(PROMPT, prompt_syntax="plain", **FAST).images
    np.testing.assert_array_equal(pipe(PROMPT, prompt_syntax="plain", **FAST).images, as_text)


def test_a_file_is_called_by_the_word_that_it_has(plain: Pipeline, pipe: Pipeline, folder: Path) -> None:
    """As diffusers wrote it, whatever the file is called; its header is read again when it changes."""
    loaded = Pipeline.over(plain.package, plain.loop, plain.backend)
    loaded.load_textual_inversion({"<hand>": HAND})
    wanted = loaded("a red <hand>", **FAST)
    result = pipe("a red <hand>", **FAST)
    np.testing.assert_array_equal(result.images, wanted.images)
    assert [one["name"] for one in result.record()["embeddings"]] == ["<hand>"]
    np.testing.assert_array_equal(redraw(pipe, result.record(), output_type="np").images, result.images)
    found = pipe("embedding:<hand>", prompt_syntax="comfyui", **FAST)
    assert found.request.embeddings.keys() == {"<hand>"}
    save_file({"<hand>": FACE}, folder / "later.safetensors")
    (folder / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(UsageError, match=r"2 files have the word '<hand>': .*later.*learned_embeds"):
        pipe("a red <hand>", **FAST)
    pipe("a red later", **FAST)
    save_file({"<hand>": HAND}, folder / "later.safetensors")
    np.testing.assert_array_equal(pipe("a red <hand>", **FAST).images, wanted.images)
    save_file({"<paw>": HAND}, folder / "later.safetensors")
    assert pipe("a red <paw>", **FAST).request.embeddings.keys() == {"<paw>"}
    save_file({"<paw>": rows(2, 2, WIDTH)}, folder / "later.safetensors")
    assert not pipe("a red <paw>", **FAST).request.embeddings


def test_a_file_that_changes_or_comes_is_read(pipe: Pipeline, folder: Path) -> None:
    assert pipe.embeddings.names() == ("<hand>", "Face", "learned_embeds", "sub/learned_embeds")
    first = pipe(PROMPT, **FAST)
    save_file({"emb_params": FACE[::-1].copy()}, folder / "Face.safetensors")
    second = pipe(PROMPT, **FAST)
    assert not np.array_equal(first.images, second.images)
    save_file({"emb_params": FACE}, folder / "Face.safetensors")
    np.testing.assert_array_equal(pipe(PROMPT, **FAST).images, first.images)
    save_file({"emb_params": HAND}, folder / "nose.safetensors")
    assert pipe("a nose", **FAST).record()["embeddings"][0]["name"] == "nose"
    (folder / "nose.safetensors").unlink()
    assert "embeddings" not in pipe("a nose", **FAST).record()


def test_a_folder_keeps_its_files(
    pipe: Pipeline, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """And those that its owner linked; a pickle is named with the command that converts it."""
    outside = tmp_path_factory.mktemp("outside") / "secret.safetensors"
    save_file({"emb_params": HAND}, outside)
    (folder / "link.safetensors").symlink_to(outside)
    (folder / "inside.safetensors").symlink_to(folder / "Face.safetensors")
    (folder / "gone.safetensors").symlink_to(folder / "nothing")
    torch.save({"string_to_param": {"*": torch.ones(1, WIDTH)}}, folder / "old.pt")
    torch.save({"string_to_param": {"*": torch.ones(1, WIDTH)}}, folder / "Face.pt")
    linked = pipe("a embedding:link", **FAST)
    assert linked.record()["embeddings"][0]["sha256"] == hashlib.sha256(outside.read_bytes()).hexdigest()
    with pytest.raises(UsageError, match="no embedding is called 'gone'"):
        pipe("embedding:gone", **FAST)
    for place in ("a", "b"):
        (folder / place).mkdir()
        save_file({"emb_params": HAND}, folder / place / "two.safetensors")
    for prompt in ("embedding:two", "a two"):
        with pytest.raises(
            UsageError, match=r"2 files of .* are called 'two'; expected one of 'a/two', 'b/two'"
        ):
            pipe(prompt, **FAST)
    pipe("embedding:b/two", **FAST)
    with pytest.raises(CheckpointError, match=r"old.pt is a pickle: .*latentrt convert"):
        pipe("a (old:1.1) face", **FAST)
    pipe("embedding:inside embedding:Face.pt", **FAST)  # a converted file goes before its pickle
    with pytest.raises(UsageError, match=r"no embedding is called '\.\./outside/secret'"):
        pipe("embedding:../outside/secret", **FAST)


def test_adapters_in_the_folder_are_no_embeddings(pipe: Pipeline, folder: Path) -> None:
    """One folder may have both: the name of a LoRA is a word like any other, unless it is called."""
    pair = {"lora_down.weight": rows(4, 8), "lora_up.weight": rows(8, 4)}
    key = "lora_unet_down_blocks_0_attentions_0_proj_in"
    save_file({f"{key}.{end}": value for end, value in pair.items()}, folder / "ring.safetensors")
    result = pipe("a red ring, Face", **FAST)
    assert [one["name"] for one in result.record()["embeddings"]] == ["Face"]
    (folder / "ring.safetensors").rename(folder / "bangle.safetensors")
    assert pipe("a red ring, Face", **FAST).to_bytes() == result.to_bytes()
    with pytest.raises(CheckpointError, match=r"bangle\.safetensors is a LoRA"):
        pipe("a red embedding:bangle, Face", **FAST)
    for place in ("a", "b", "c"):
        (folder / place).mkdir()
    for place in ("a", "b"):  # nor do several of them make a name ambiguous
        shutil.copy(folder / "bangle.safetensors", folder / place / "ring.safetensors")
    assert pipe("a red ring, Face", **FAST).to_bytes() == result.to_bytes()
    save_file({"emb_params": HAND}, folder / "c" / "ring.safetensors")
    both = pipe("a red ring, Face", **FAST)
    assert [one["name"] for one in both.record()["embeddings"]] == ["Face", "ring"]


def test_loading_is_idempotent(plain: Pipeline, folder: Path) -> None:
    """T42, and diffusers' error for another embedding of the same word."""
    pipe = Pipeline.over(plain.package, plain.loop, plain.backend)
    face, hand = folder / "Face.safetensors", folder / "sub" / "learned_embeds.safetensors"
    for _ in range(2):
        pipe.load_textual_inversion([face, str(hand)], token=["cat", None])
    pipe.load_textual_inversion({"emb_params": FACE}, token="cat")
    assert pipe("cat <hand>", **FAST).request.embeddings.keys() == {"cat", "<hand>"}
    with pytest.raises(
        UsageError, match="another embedding is loaded as 'cat'; expected a word that is free"
    ):
        pipe.load_textual_inversion([{"dog": HAND}, hand], token=["dog", "cat"])
    assert not pipe("dog", **FAST).request.embeddings, "all or none"
    with pytest.raises(UsageError, match="1 tokens for 2 embeddings"):
        pipe.load_textual_inversion([face, hand], token="cat")
    with pytest.raises(UsageError, match="2 arrays without a word; expected a token"):
        pipe.load_textual_inversion({"clip_l": FACE, "clip_g": FACE})
    for source in (3, None, [3], b"x"):
        with pytest.raises(UsageError, match=r"an embedding is .*; expected a file, or arrays"):
            pipe.load_textual_inversion(source)  # pyright: ignore
    for word in (3, ["a", 3], [["a"]]):
        with pytest.raises(UsageError, match=r"an embedding is called .*; expected 1 to|tokens for 1 emb"):
            pipe.load_textual_inversion(face, token=word)  # pyright: ignore
    with pytest.raises(UsageError, match="an embedding is called ' '"):
        pipe.load_textual_inversion(face, token=" ")
    pipe.unload_textual_inversion("cat")
    assert pipe("cat <hand>", **FAST).request.embeddings.keys() == {"<hand>"}
    pipe.load_textual_inversion({"cat": HAND})
    with pytest.raises(UsageError, match="the embedding 'dog' is missing; expected one of '<hand>', 'cat'"):
        pipe.unload_textual_inversion(["cat", "dog"])
    pipe.unload_textual_inversion()
    assert not pipe("cat <hand>", **FAST).request.embeddings


def test_threads_load_while_others_draw(plain: Pipeline) -> None:
    pipe = Pipeline.over(plain.package, plain.loop, plain.backend)
    pipe.load_textual_inversion({"face": FACE})
    wanted = pipe(PROMPT, **FAST).images
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            pipe.load_textual_inversion({"nose": HAND})
            pipe.unload_textual_inversion("nose")

    with ThreadPoolExecutor(3) as pool:
        swapping = pool.submit(swap)
        found = [made.images for made in pool.map(lambda _: pipe(PROMPT, **FAST), range(4))]
        stop.set()
        swapping.result()
    for images in found:
        np.testing.assert_array_equal(images, wanted)


def test_a_request_keeps_what_it_was_made_with(plain: Pipeline) -> None:
    pipe = Pipeline.over(plain.package, plain.loop, plain.backend)
    pipe.load_textual_inversion({"face": FACE})
    wanted = pipe(PROMPT, **FAST)
    steps = pipe.stream(PROMPT, **{name: value for name, value in FAST.items() if name != "output_type"})
    pipe.unload_textual_inversion()
    *_, last = steps
    np.testing.assert_array_equal(np.asarray(last.preview()), wanted.images)


def test_on_a_device(plain: Pipeline, package: Package) -> None:
    """Any number of rows goes to the device, and the picture is the host's."""
    host = Pipeline.over(plain.package, plain.loop, plain.backend)
    with device_pipeline(package, HostDevice(), graphs="on") as (pipe, _):
        for one in (host, pipe):
            one.load_textual_inversion([{"face": FACE}, {"<hand>": HAND}])
        for prompt in (PROMPT, "a <hand>, face face", "a red circle"):
            found, wanted = (one(prompt, negative_prompt="<hand>", **FAST).images for one in (pipe, host))
            assert psnr(wanted, found) >= BAR


def test_limits_and_refusals(plain: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere is no folder"):
        Pipeline.over(plain.package, plain.loop, plain.backend, embeddings=tmp_path / "nowhere")
    with pytest.raises(UsageError, match="nowhere is no folder"):
        Pipeline.open("no-such-model", embeddings=tmp_path / "nowhere")
    pipe = Pipeline.over(plain.package, plain.loop, plain.backend)
    pipe.load_textual_inversion([{f"w{number}": HAND} for number in range(65)])
    with pytest.raises(UsageError, match="a prompt calls 65 embeddings; expected at most 64"):
        pipe(" ".join(f"w{number}" for number in range(65)), **FAST)
    with pytest.raises(UsageError, match="no embedding is called 'face'"):
        pipe("a cat", negative_prompt="embedding:face", **FAST)


def test_an_old_package(plain: Pipeline, folder: Path) -> None:
    package = plain.package
    net = package.manifest.nets["text_encoder"]
    older = replace(net, spec=replace(net.spec, inputs=net.spec.inputs[:-1]))
    manifest = replace(package.manifest, nets={**package.manifest.nets, "text_encoder": older})
    library = EmbeddingLibrary(replace(package, manifest=manifest), folder)
    with pytest.raises(PackageError, match=r"no input 'extra_embeddings'.*Export the checkpoint again"):
        library.load(folder / "Face.safetensors", None)


# ── pictures say which embeddings they have ──────────────────────────────────────────────────────────


def test_records_and_redrawing(plain: Pipeline, pipe: Pipeline, folder: Path) -> None:
    options = {name: value for name, value in FAST.items() if name not in ("output_type", "seed")}
    result = pipe(
        [PROMPT, "a circle"], negative_prompt=["ring", "embedding:learned_embeds"], seed=[1, 2], **options
    )
    first, second = result.record(0)["embeddings"], result.record(1)["embeddings"]
    assert [one["name"] for one in first + second] == ["Face", "learned_embeds"]
    assert len(first[0]["sha256"]) == 64
    hashes = parse_infotext(result.infotext(0))["TI hashes"]
    assert hashes == f"Face: {first[0]['sha256'][:12]}"
    for index, name in enumerate(("one.png", "two.png")):
        result.save(folder / name, index)
        assert redraw(pipe, folder / name).to_bytes() == result.to_bytes(index=index)
    # it may as well be loaded; another with its name, or none, is an error
    loaded = Pipeline.over(plain.package, plain.loop, plain.backend)
    with pytest.raises(
        UsageError, match=r"the embedding 'Face' is missing; expected the one with the sha256"
    ):
        redraw(loaded, folder / "one.png")
    loaded.load_textual_inversion(folder / "Face.safetensors")
    assert redraw(loaded, folder / "one.png").to_bytes() == result.to_bytes(index=0)
    redraw(loaded, folder / "two.png", prompt="a ring", negative_prompt="a star")  # which call none
    save_file({"emb_params": FACE + 1}, folder / "Face.safetensors")
    with pytest.raises(
        UsageError, match=r"'Face' is not the one that the picture was drawn with: its sha256"
    ):
        redraw(pipe, folder / "one.png")


def test_texts_of_a1111(plain: Pipeline, pipe: Pipeline, folder: Path, logged: list[str]) -> None:
    (folder / "Face.safetensors").rename(folder / "Face: a, b.safetensors")
    prompt = "a red Face: a, b on a blue background"
    result = pipe(prompt, **{**FAST, "output_type": "pil"})
    text = result.infotext()
    assert parse_infotext(text)["TI hashes"].startswith("Face a b: ")
    metadata = PictureMetadata(parameters=text, record=None)
    again = redraw(pipe, metadata)
    np.testing.assert_array_equal(np.asarray(again.images[0]), np.asarray(result.images[0]))
    assert logged
    assert not any("TI hashes" in line for line in logged)
    with pytest.raises(UsageError, match="the embedding 'Face a b' is missing"):
        redraw(plain, PictureMetadata(parameters=text.replace("Face: a, b", "Face a b"), record=None))
    odd = text.replace("Face a b: ", "Face a b: no hash ")
    redraw(pipe, PictureMetadata(parameters=odd, record=None))
    assert any("TI hashes: Face a b: no hash" in line for line in logged)


@pytest.mark.parametrize("text", ["", "face", "face:", ": 123", "face: xyz", "face: 123, "])
def test_hashes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        read_hashes(text)


def test_hashes_as_a1111_writes_them() -> None:
    found = read_hashes("EasyNegative: c74b4e810b03, bad-hands-5: aa7651be154c")
    assert [(one.name, one.sha256) for one in found] == [
        ("EasyNegative", "c74b4e810b03"),
        ("bad-hands-5", "aa7651be154c"),
    ]


@pytest.mark.parametrize("value", ["face", [{"name": "face"}], [1], {"name": "face"}])
def test_records_of_others(plain: Pipeline, value: Any) -> None:
    with pytest.raises(UsageError, match="the record's embeddings is"):
        redraw(plain, {"prompt": "a", "embeddings": value})


# ── against diffusers ────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(exported(tmp_path_factory, "xl-tiny"))


@pytest.fixture(scope="module")
def refiner(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(exported(tmp_path_factory, "refiner-tiny"))


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(exported(tmp_path_factory, "tiny1"))


def end_by_id(pipe: Any) -> None:
    """Let transformers find a prompt's end by its id: with the old configs the largest id counts, T37."""
    for name in ("text_encoder", "text_encoder_2"):
        encoder = getattr(pipe, name, None)
        for module in encoder.modules() if encoder is not None else ():
            if hasattr(module, "eos_token_id"):
                module.eos_token_id = pipe.tokenizer_2.eos_token_id


TEXT: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 5.0, "height": 40, "width": 56}
TOY_L, TOY_G = rows(2, 64, seed=5) * 4, rows(2, 128, seed=6) * 4


@pytest.mark.parametrize(
    "texts",
    [
        {"prompt": "a red <toy> on a background"},
        {"prompt": "a ring", "negative_prompt": "<toy>"},
        {"prompt": "a ring", "prompt_2": "a <toy>", "negative_prompt": "star", "negative_prompt_2": "<toy>"},
        {"prompt": "a <toy> <toy>", "clip_skip": 1, "guidance_scale": 1.0},
    ],
    ids=["prompt", "negative", "second", "clip-skip"],
)
def test_sdxl_draws_what_diffusers_draws(base: Pair, texts: dict[str, Any]) -> None:
    """T37: with the pooled embedding of the prompt's end. diffusers takes one call for each encoder."""
    pipe = base.reference("StableDiffusionXLPipeline")
    end_by_id(pipe)
    both = {
        "L": (TOY_L, pipe.tokenizer, pipe.text_encoder),
        "G": (TOY_G, pipe.tokenizer_2, pipe.text_encoder_2),
    }
    for vectors, tokenizer, encoder in both.values():
        pipe.load_textual_inversion(
            {"<toy>": torch.from_numpy(vectors)}, tokenizer=tokenizer, text_encoder=encoder
        )
    ours_with = Pipeline.over(base.ours.package, base.ours.loop, base.ours.backend)
    ours_with.load_textual_inversion({"clip_l": TOY_L, "clip_g": TOY_G}, token="<toy>")
    options = {**TEXT, **texts}
    try:
        wanted = drawn(pipe, [3], **options)
        found = ours(ours_with, [3], **options, prompt_syntax="plain")
        assert psnr(wanted, found) >= BAR
        assert psnr(wanted, ours(base.ours, [3], **options, prompt_syntax="plain")) < 55, "it shows"
    finally:
        for _, tokenizer, encoder in both.values():
            pipe.unload_textual_inversion(tokenizer=tokenizer, text_encoder=encoder)


def test_sd1_draws_what_diffusers_draws(older: Pair, tmp_path: Path) -> None:
    toy = rows(1, 80, seed=7) * 4
    save_file({"<toy>": toy}, tmp_path / "learned_embeds.safetensors")
    pipe = older.reference("StableDiffusionPipeline")
    pipe.load_textual_inversion(str(tmp_path), weight_name="learned_embeds.safetensors")
    options = {**TEXT, "prompt": "a red <toy> on a background", "negative_prompt": "a <toy>"}
    ours_with = Pipeline.over(older.ours.package, older.ours.loop, older.ours.backend)
    ours_with.load_textual_inversion(tmp_path / "learned_embeds.safetensors")
    wanted = drawn(pipe, [3], **options)
    assert psnr(wanted, ours(ours_with, [3], **options, prompt_syntax="plain")) >= BAR
    assert psnr(wanted, ours(ours_with, [3], **options)) >= BAR, "the default syntax finds it too"


def test_base_then_refiner(base: Pair, refiner: Pair, tmp_path: Path) -> None:
    """T38: the refiner takes clip_g of the same file, and keeps no rows from the call before."""
    save_file({"clip_l": TOY_L, "clip_g": TOY_G}, tmp_path / "toy.safetensors")
    pipes = [
        Pipeline.over(pair.ours.package, pair.ours.loop, pair.ours.backend, embeddings=tmp_path)
        for pair in (base, refiner)
    ]
    options: dict[str, Any] = {
        "num_inference_steps": 4,
        "height": 40,
        "width": 56,
        "seed": 3,
        "output_type": "np",
    }
    plain = refine(base.ours, refiner.ours, "a ring", **options)
    result = refine(*pipes, "a toy", **options)
    assert result.record()["embeddings"] == result.record()["base_record"]["embeddings"]
    np.testing.assert_array_equal(refine(*pipes, "a ring", **options).images, plain.images)
    np.testing.assert_array_equal(refine(*pipes, "a toy", **options).images, result.images)
    np.testing.assert_array_equal(
        redraw(pipes[0], result.record(), refiner=pipes[1], output_type="np").images, result.images
    )
    with pytest.raises(UsageError, match="'toy' is missing"):
        redraw(pipes[0], result.record(), refiner=refiner.ours)
    save_file({"emb_params": TOY_L}, tmp_path / "toy.safetensors")
    for pipe in pipes:
        with pytest.raises(CheckpointError, match=r"toy.safetensors"):
            pipe("a toy", **options)
