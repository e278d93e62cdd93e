"""`<lora:…>` in prompts, by the grammar of AUTOMATIC1111's extension (extra_networks_lora.py)."""

from __future__ import annotations

from typing import Any

import pytest

from latentrt.engines.errors import UsageError
from latentrt.engines.package import Package
from latentrt.runtime import Pipeline
from latentrt.runtime.model import SHIPPED
from latentrt.runtime.prompts.a1111 import parse_a1111
from latentrt.runtime.prompts.lora_tags import lora_tags, without_tags
from latentrt.runtime.refine import refine
from latentrt.runtime.request.request import make_request

DEMO = Package.open(SHIPPED["demo"]).manifest


def both(unet: float, encoders: float) -> dict[str, float]:
    return {"unet": unet, "text_encoder": encoders, "text_encoder_2": encoders}


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("a fox", ()),
        ("a fox <lora:ink>", (("ink", 1.0),)),
        ("<lora:ink:0.8> a fox", (("ink", 0.8),)),
        ("a <lora:ink:-1.5><lyco:b c:2>fox", (("ink", -1.5), ("b c", 2.0))),
        ("<lora:ink:0.8:0.5>", (("ink", both(0.5, 0.8)),)),
        ("<lora:ink:te=0.2:unet=1>", (("ink", both(1.0, 0.2)),)),
        ("<lora:ink:unet=0.5>", (("ink", both(0.5, 1.0)),)),
        ("<lora:ink:te=0.5>", (("ink", 0.5),)),
        ("<lora:ink:0.8> <lora:ink:0.8>", (("ink", 0.8), ("ink", 0.8))),
        ("a <b:c> d", ()),
    ],
)
def test_tags(prompt: str, found: tuple[Any, ...]) -> None:
    assert lora_tags(prompt) == found


def test_the_text_is_encoded_without_them() -> None:
    assert without_tags("a <lora:ink:1>fox") == "a fox"
    assert parse_a1111("a (red <lora:ink:1>fox:1.2)") == parse_a1111("a (red fox:1.2)")


@pytest.mark.parametrize(
    ("prompt", "what"),
    [
        ("<lora:ink:much>", "the strength 'much'"),
        ("<lora:ink:1:1:16>", "a rank (dyn)"),
        ("<lora:ink:dyn=4>", "a rank (dyn)"),
        ("<lora:ink:1:2:3:4>", "is not carried out"),
        ("<lora:ink:step=4>", "'step'"),
        ("<lora: :1>", "is not carried out"),
    ],
)
def test_what_is_refused(prompt: str, what: str) -> None:
    with pytest.raises(UsageError) as caught:
        lora_tags(prompt)
    assert what in caught.value.found
    with pytest.raises(UsageError, match="call an adapter with a colon in its name by --lora"):
        lora_tags("<lora:a:b>")


@pytest.mark.parametrize(
    ("prompt", "tag"),
    [
        ("a <lora:ink", "<lora:ink"),
        ("a < lora:ink:1> fox", "< lora:ink:1>"),
        ("a <lora:>fox", "<lora:>"),
        ("a <lora>", "<lora>"),
        ("a <LORA:ink, <lora:dot:1>", "<LORA:ink, "),
    ],
)
def test_what_only_looks_like_a_tag_is_said(prompt: str, tag: str, logged: list[str]) -> None:
    make_request(DEMO, [prompt, prompt])
    (line,) = logged
    assert line.startswith(f"{tag!r} in the prompt is no tag of an adapter and is drawn as text")
    make_request(DEMO, "a", negative_prompt="<lora:ink")
    assert len(logged) == 2


def test_it_is_said_once_of_a_picture_that_a_refiner_ends(logged: list[str]) -> None:
    with Pipeline.open("demo") as pipe:
        refine(pipe, pipe, "a <lora:ink", at=0.5, num_inference_steps=4, height=64, width=64)
    assert len([line for line in logged if "is no tag of an adapter" in line]) == 1


@pytest.mark.parametrize("syntax", ["comfyui", "plain"])
def test_other_syntaxes_have_no_tags(syntax: Any, logged: list[str]) -> None:
    make_request(DEMO, "a <lora:ink:1>", prompt_syntax=syntax)
    assert f"'<lora:ink:1>' in the prompt is drawn as text, as the prompt syntax {syntax!r}" in logged[0]
    make_request(DEMO, "a <lorax:1> <lorabook", prompt_syntax=syntax)
    make_request(DEMO, "a <lora:ink:1>, <b:c>")
    assert len(logged) == 1


def test_they_are_part_of_a_request() -> None:
    request = make_request(DEMO, ["a <lora:ink:0.5>", "b <lora:ink:0.5>"])
    assert (request.tagged, request.loras) == ((("ink", 0.5),), None)
    assert make_request(DEMO, "a <lora:ink:0.5>", prompt_syntax="plain").tagged == ()
    given = make_request(DEMO, "a", loras=["ink", ("dot", {"unet": 0.5})])
    assert given.loras == (("ink", 1.0), ("dot", {"unet": 0.5}))


@pytest.mark.parametrize(
    ("prompt", "parameters", "what"),
    [
        (["a <lora:ink:1>", "b"], {}, "name other adapters"),
        ("a", {"negative_prompt": "<lora:ink:1>"}, "negative_prompt is"),
        ("a", {"loras": "ink"}, "loras is 'ink'"),
        ("a", {"loras": [("ink", 1, 2)]}, "loras has"),
        ("a", {"loras": [("ink", "strong")]}, "strength"),
        ("a", {"loras": [("ink", float("nan"))]}, "strength"),
        ("a", {"loras": [("ink", {"vae": 1})]}, "no component 'vae'"),
        ("a", {"loras": [("ink", {"unet": {"left": 1}})]}, "no section 'left'"),
        ("a", {"loras": [("ink", {"unet": {"mid": {"block_0": 1}}})]}, "'block_0'"),
        ("a", {"loras": [("ink", {"text_encoder": {"down": 1}})]}, "blocks of text_encoder"),
    ],
)
def test_what_a_request_refuses(prompt: Any, parameters: dict[str, Any], what: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_request(DEMO, prompt, **parameters)
    assert what in caught.value.found
