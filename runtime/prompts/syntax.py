"""The prompt syntaxes: how each reads a prompt, cuts it into chunks and applies its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ...engines.errors import UsageError
from ...engines.spec import Array
from .a1111 import parse_a1111
from .chunks import PromptChunks, a1111_chunks, comfyui_chunks, truncated_chunk
from .comfyui import parse_comfyui
from .fragments import Fragment
from .tokenizer import ClipTokenizer
from .weights import interpolate_from_empty, scale_and_restore_mean


@dataclass(frozen=True, kw_only=True)
class PromptSyntax:
    """One way of writing prompts.

    Attributes:
        parse: prompt -> fragments. Raises UsageError for syntax that nothing here carries out.
        cut: fragments -> chunks.
        weigh: context (K, T, D), weights (K, T) and the empty prompt's context (T, D) -> weighted context.
    """

    parse: Callable[[str], Sequence[Fragment]]
    cut: Callable[[Sequence[Fragment], ClipTokenizer], PromptChunks]
    weigh: Callable[[Array, Array, Array], Array]

    def chunks(self, prompt: str, tokenizer: ClipTokenizer) -> PromptChunks:
        """Parse and cut a prompt. Raises UsageError for one that is no text, or that the syntax refuses."""
        if not isinstance(prompt, str):
            raise UsageError(f"the prompt {prompt!r:.40}", expected="a str", fix="Pass text.")
        return self.cut(self.parse(prompt), tokenizer)


PROMPT_SYNTAXES: Mapping[str, PromptSyntax] = {
    # the text as it is, as diffusers reads it
    "plain": PromptSyntax(
        parse=lambda prompt: (Fragment(text=prompt),),
        cut=truncated_chunk,
        weigh=lambda context, weights, empty: context,
    ),
    "a1111": PromptSyntax(
        parse=parse_a1111,
        cut=a1111_chunks,
        weigh=lambda context, weights, empty: scale_and_restore_mean(context, weights),
    ),
    "comfyui": PromptSyntax(parse=parse_comfyui, cut=comfyui_chunks, weigh=interpolate_from_empty),
}


def prompt_syntax(name: str) -> PromptSyntax:
    """The syntax of that name. Raises UsageError if there is none."""
    if name not in PROMPT_SYNTAXES:
        raise UsageError(
            f"unknown prompt syntax {name!r}",
            expected=f"one of {', '.join(PROMPT_SYNTAXES)}",
            fix='Use "plain" for text without weights.',
        )
    return PROMPT_SYNTAXES[name]
