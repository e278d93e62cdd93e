"""Texts to context: what is called, what is cached, and the demo's encoder against torch, end to end."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPTextModel, CLIPTokenizer

import latentrt.demo
from latentrt.engines.backend import choose_backend
from latentrt.engines.errors import UsageError
from latentrt.engines.package import Package
from latentrt.engines.spec import NetSpec, TensorSpec
from latentrt.runtime.prompts.encode import TextConditioner, TextEncoder
from latentrt.runtime.prompts.tokenizer import ClipTokenizer
from tests.runtime import prompt_references as reference
from tests.runtime.prompt_references import clip_tokenizer

DEMO = Path(latentrt.demo.__file__).parent
LONG = "a red circle, " * 30  # 120 tokens


def _encoder(net, tokenizer) -> TextEncoder:
    return TextEncoder(run=net, spec=net.spec, tokenizer=tokenizer)


class StandInNet:
    """Each token's context is a function of the ids before it, as in CLIP; calls are recorded."""

    def __init__(self, width: int, *, pooled: int = 0, clip_skip: bool = True) -> None:
        self._table = np.random.default_rng(width).normal(size=(49408, width)).astype(np.float32)
        self._pooled = pooled
        self.calls: list[tuple[np.ndarray, object]] = []
        ids = TensorSpec(name="input_ids", dtype="int32", shape=("P", 77))
        skip = TensorSpec(name="clip_skip", dtype="int32", shape=(1,))
        context = TensorSpec(name="context", dtype="float32", shape=("P", 77, width))
        self.spec = NetSpec(inputs=(ids, skip) if clip_skip else (ids,), outputs=(context,))

    def __call__(self, **arrays):
        self.spec.check(arrays)
        ids, skip = arrays["input_ids"], arrays.get("clip_skip")
        self.calls.append((ids, None if skip is None else skip.tolist()))
        context = np.cumsum(self._table[ids], axis=1) + (0 if skip is None else skip.astype(np.float32))
        outputs = {"context": context}
        return outputs | {"pooled": context[:, -1, : self._pooled]} if self._pooled else outputs

    @property
    def rows(self) -> list[int]:
        return [len(ids) for ids, _ in self.calls]


def _conditioner(*nets, **options):
    pads = ("<|endoftext|>", "!")
    encoders = [_encoder(net, clip_tokenizer(pad)) for net, pad in zip(nets, pads, strict=False)]
    return TextConditioner(encoders, **options)


def test_one_call_and_then_none():
    net = StandInNet(8)
    conditioner = _conditioner(net)
    first = conditioner.encode(["a cat", "", "a cat"], syntax="a1111", clip_skip=2)
    assert net.rows == [2]  # equal chunks once, the negative text beside the positive one
    assert net.calls[0][1] == [2]
    again = conditioner.encode(["a cat", "", "a cat"], syntax="a1111", clip_skip=2)
    assert net.rows == [2]
    assert first.context.tobytes() == again.context.tobytes()
    assert first.context.shape == (3, 77, 8)
    assert first.pooled is None
    conditioner.encode(["a cat", "a dog"], syntax="a1111", clip_skip=2)
    assert net.rows == [2, 1]  # only what is new


@pytest.mark.parametrize("other", [{"clip_skip": 1}, {"syntax": "comfyui"}, {"syntax": "plain"}])
def test_the_cache_knows_syntax_and_clip_skip(other):
    net = StandInNet(8)
    conditioner = _conditioner(net)
    conditioner.encode(["a cat"], syntax="a1111")
    conditioner.encode(["a cat"], **({"syntax": "a1111"} | other))
    assert net.rows == [1, 1]


def test_results_cannot_change_the_cache():
    conditioner = _conditioner(StandInNet(8, pooled=4))
    first = conditioner.encode(["a cat"])
    kept = first.context.copy(), first.pooled.copy()
    first.context[:] = 0
    first.pooled[:] = 0
    again = conditioner.encode(["a cat"])
    np.testing.assert_array_equal(again.context, kept[0])
    np.testing.assert_array_equal(again.pooled, kept[1])


def test_two_encoders_side_by_side():
    nets = StandInNet(8), StandInNet(12, pooled=5)
    made = _conditioner(*nets).encode(["a cat", "hello!"])
    assert made.context.shape == (2, 77, 20)
    for net, width, pad in ((nets[0], slice(0, 8), "<|endoftext|>"), (nets[1], slice(8, 20), "!")):
        ids = clip_tokenizer(pad).encode(["a cat", "hello!"]).ids
        alone = net(input_ids=ids, clip_skip=np.zeros(1, np.int32))
        np.testing.assert_array_equal(made.context[..., width], alone["context"])
    np.testing.assert_array_equal(made.pooled, alone["pooled"])


def test_second_text():
    nets = StandInNet(8), StandInNet(12, pooled=5)
    both = _conditioner(*nets).encode(["a cat", "a cat"], ["a dog", None])
    cat, dog = (_conditioner(*nets).encode([text]) for text in ("a cat", "a dog"))
    np.testing.assert_array_equal(
        both.context[0], np.concatenate([cat.context[0, :, :8], dog.context[0, :, 8:]], -1)
    )
    np.testing.assert_array_equal(both.context[1], cat.context[0])
    np.testing.assert_array_equal(both.pooled, np.concatenate([dog.pooled, cat.pooled]))


@pytest.mark.parametrize("syntax", ["a1111", "comfyui"])
def test_a_text_does_not_depend_on_its_company(syntax):
    texts = ["(a:1.3) cat", LONG + "(end:0.5)", "", "a [dog] (x:0)"]
    nets = StandInNet(8), StandInNet(12, pooled=5)
    together = _conditioner(*nets).encode(texts, syntax=syntax)
    assert together.context.shape == (4, 2 * 77, 20)
    for text, context, pooled in zip(texts, together.context, together.pooled, strict=True):
        alone = _conditioner(*nets).encode([text], syntax=syntax)
        copies = [alone.context[0]] * (2 * 77 // alone.context.shape[1])
        np.testing.assert_array_equal(context, np.concatenate(copies))
        np.testing.assert_array_equal(pooled, alone.pooled[0])


def test_texts_of_two_and_three_chunks_are_repeated_to_six():
    conditioner = _conditioner(StandInNet(8))
    texts = ["cat", LONG, "cat " * 200]
    together = conditioner.encode(texts, syntax="a1111").context
    assert together.shape == (3, 6 * 77, 8)
    for text, context in zip(texts, together, strict=True):
        alone = conditioner.encode([text], syntax="a1111").context[0]
        np.testing.assert_array_equal(context, np.tile(alone, (len(context) // len(alone), 1)))


def test_a_cached_text_needs_no_empty_one():
    net = StandInNet(8)
    conditioner = _conditioner(net)
    conditioner.encode(["a cat"], syntax="a1111")
    conditioner.encode([LONG], syntax="a1111")
    assert conditioner.encode(["a cat", LONG], syntax="a1111").context.shape == (2, 154, 8)
    assert net.rows == [1, 2]


def test_encoders_that_disagree_on_the_number_of_chunks():
    small = ClipTokenizer.open(Path(__file__).parent / "data" / "tokenizer")  # 645 tokens: texts are longer
    nets = StandInNet(8), StandInNet(12, pooled=5)
    encoders = [_encoder(net, t) for net, t in zip(nets, (clip_tokenizer(), small), strict=True)]
    text = "antidisestablishmentarianism " * 10
    made = TextConditioner(encoders).encode([text], syntax="a1111")
    counts = [len(net.calls[0][0]) - 1 for net in nets]  # chunks, without the empty one
    assert counts[0] == 1 < counts[1]
    assert made.context.shape == (1, counts[1] * 77, 20)
    empty = TextConditioner(encoders).encode([""], syntax="a1111").context
    np.testing.assert_array_equal(made.context[0, -77:, :8], empty[0, :, :8])


def test_dropped_text():
    conditioner = _conditioner(StandInNet(8), StandInNet(12))
    assert conditioner.encode(["cat " * 75 + "dog", "cat"]).dropped == ("dog", "")
    assert conditioner.encode(["cat " * 75 + "dog"]).dropped == ("dog",)  # cached
    assert conditioner.encode(["cat"], ["cat " * 75 + "cow"]).dropped == ("cow",)
    assert conditioner.encode(["cat " * 75 + "dog"], syntax="a1111").dropped == ("",)


def test_cache_is_bounded_by_bytes_and_forgets_the_oldest():
    net = StandInNet(8)
    size = 77 * 8 * 4 + 1  # a context and its text
    conditioner = _conditioner(net, cache_bytes=2 * size)
    for text, calls in (("a", 1), ("b", 2), ("a", 2), ("c", 3), ("a", 3), ("b", 4)):
        conditioner.encode([text])
        assert len(net.calls) == calls, text
    uncached = _conditioner(net, cache_bytes=0)
    uncached.encode(["a"])
    uncached.encode(["a"])
    assert len(net.calls) == 6


def test_long_text_counts_in_the_cache():
    net = StandInNet(8)
    conditioner = _conditioner(net, cache_bytes=10_000)
    for _ in range(2):
        conditioner.encode(["a " * 5_000])  # one chunk remains of it
    assert len(net.calls) == 2


def test_threads_share_one():
    net = StandInNet(8, pooled=4)
    conditioner = _conditioner(net, cache_bytes=77 * 8 * 4 * 6)
    texts = [f"a (cat:1.{index % 9}) {index % 7}" for index in range(60)]
    expected = {text: _conditioner(net).encode([text], syntax="comfyui").context for text in texts}
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda text: conditioner.encode([text], syntax="comfyui").context, texts))
    for text, context in zip(texts, made, strict=True):
        np.testing.assert_array_equal(context, expected[text])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (
            (["a"],),
            {"clip_skip": 1},
            "clip_skip is 1; expected 0: this package's text encoder has one output",
        ),
        ((["rock AND roll"],), {"syntax": "a1111"}, "composition of several prompts"),
    ],
)
def test_refusals(arguments, options, message):
    net = StandInNet(8, clip_skip=False)
    with pytest.raises(UsageError, match=message):
        _conditioner(net).encode(*arguments, **options)
    assert not net.calls


@pytest.fixture(scope="module")
def demo():
    """The demo's encoder in ONNX Runtime, and in torch with its tokenizer."""
    package = Package.open(DEMO / "package")
    _, backend = choose_backend("onnxruntime")
    tokenizer = ClipTokenizer.open(package.root / "tokenizer")
    with backend.open_net(package, "text_encoder", threads=1) as net:
        conditioner = TextConditioner([_encoder(net, tokenizer)])
        model = CLIPTextModel.from_pretrained(DEMO / "checkpoint" / "text_encoder", torch_dtype=torch.float32)
        yield conditioner, model.eval(), CLIPTokenizer.from_pretrained(DEMO / "checkpoint" / "tokenizer")


def _in_torch(model, tokenizer, parsed, chunk):
    """Chunks of the published loops through torch: contexts (K, 77, D), weights (K, 77, 1), empty (77, D)."""
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    tokenized = [
        (
            [] if (text, weight) == ("BREAK", -1) else tokenizer(text, add_special_tokens=False)["input_ids"],
            weight,
        )
        for text, weight in parsed
    ]
    chunks = [[(bos, 1.0), *chunk, (eos, 1.0)] for chunk in [*chunk(tokenized), []]]
    rows = torch.tensor([row + [(pad, 1.0)] * (77 - len(row)) for row in chunks])
    with torch.no_grad():
        context = model(rows[..., 0].long()).last_hidden_state
    return context[:-1], rows[:-1, :, 1:].float(), context[-1]


PROMPTS = [
    "a red circle on a blue background",
    "a (red:1.4) circle on a (blue:0.6) background, ((large))",
    "a red circle, " * 20 + "on a (blue:1.3) background, a [small] green square",
]


@pytest.mark.parametrize("prompt", [*PROMPTS, "a (red:1.2) circle BREAK a blue square"])
def test_a1111_end_to_end(demo, prompt):
    conditioner, model, tokenizer = demo
    comma = tokenizer.get_vocab().get(",</w>", -1)
    z, weights, _ = _in_torch(
        model, tokenizer, reference.a1111(prompt), lambda tokenized: reference.a1111_chunks(tokenized, comma)
    )
    expected = [(c * w) * (c.mean() / (c * w).mean()) for c, w in zip(z, weights, strict=True)]
    ours = conditioner.encode([prompt], syntax="a1111").context
    np.testing.assert_allclose(ours[0], torch.cat(expected).numpy(), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_comfyui_end_to_end(demo, prompt):
    conditioner, model, tokenizer = demo
    z, weights, empty = _in_torch(model, tokenizer, reference.comfyui(prompt), reference.comfyui_chunks)
    expected = empty + (z - empty) * weights
    ours = conditioner.encode([prompt], syntax="comfyui").context
    np.testing.assert_allclose(ours[0], expected.flatten(0, 1).numpy(), rtol=1e-3, atol=2e-4)


def test_plain_end_to_end(demo):
    conditioner, model, tokenizer = demo
    batch = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        expected = model(batch["input_ids"]).last_hidden_state
    made = conditioner.encode(PROMPTS)
    np.testing.assert_allclose(made.context, expected.numpy(), rtol=1e-3, atol=2e-4)
    assert [bool(rest) for rest in made.dropped] == [False, False, True]
