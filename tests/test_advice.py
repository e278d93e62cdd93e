"""Advice with a command can be pasted as it is printed: read from the sources of every folder.

Each command line of this project is run as far as its options: the verb exists and takes them. What can be
brought about cheaply is run whole, in tests/export/test_advice.py and in the tests of each error.
"""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import typer

from latentrt.cli import app
from tests.structure import FOLDERS, sources

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ("latentrt", "git", "mv", "hf", "pip", "mkdir", "chmod")


def parses(words: list[str]) -> None:
    """Raise click's error unless the command line takes these words."""
    group: Any = typer.main.get_command(app)
    _, verb, *rest = words
    context = click.Context(group)
    found = group.get_command(context, verb)
    assert found is not None, verb
    with found.make_context(verb, list(rest)):
        pass


def advice() -> Iterator[tuple[str, str]]:
    """Every text that a `fix` is made of, with its place; {…} is a word."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sources(ROOT, FOLDERS)}
    named = {
        target.id: node.value
        for tree in trees.values()
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "fix":
                names = [n.id for n in ast.walk(node.value) if isinstance(n, ast.Name) and n.id in named]
                for value in (node.value, *(named[name] for name in names)):
                    yield from _texts(value, f"{path.relative_to(ROOT)}:{node.value.lineno}")


def _texts(value: ast.expr, place: str) -> Iterator[tuple[str, str]]:
    inside: set[ast.AST] = set()
    for part in ast.walk(value):
        if isinstance(part, ast.JoinedStr):
            inside |= set(ast.walk(part)) - {part}
            words = [w.value if isinstance(w, ast.Constant) else "WORD" for w in part.values]
            yield place, "".join(map(str, words))
        elif isinstance(part, ast.Constant) and isinstance(part.value, str) and part not in inside:
            yield place, part.value


def test_commands_are_made_by_command_and_end_the_advice() -> None:
    """A command written out has no paths in it, so that only its end can be wrong."""
    places = list(advice())
    assert len(places) > 200
    offenders: list[str] = []
    for place, text in places:
        if re.search(rf"(^|: |`)({'|'.join(PROGRAMS)}) [^`]*WORD", text):
            offenders.append(f"{place}: use command(): {text}")
        elif re.search(rf": ({'|'.join(PROGRAMS)}) .*[.,;]$", text):
            offenders.append(f"{place}: what stands behind the command sticks to it: {text}")
        elif re.search(r"(--?[a-z-]+|/\S+)\.$", text):
            offenders.append(f"{place}: a full stop behind an option: {text}")
    assert offenders == []


def test_the_command_line_takes_what_is_advised() -> None:
    offenders: list[str] = []
    for place, text in advice():
        for found in re.findall(r"latentrt ([a-z]+(?: [^`()]*)?)", text):
            words = shlex.split(found.split(", ")[0].rstrip(".;:"))
            if problem := _unknown(words):
                offenders.append(f"{place}: {problem} in {text}")
    assert offenders == []


def _unknown(words: list[str]) -> str:
    """The first verb or option that the command line does not have; "" if it has them all."""
    at: Any = typer.main.get_command(app)
    rest = list(words)
    while isinstance(at, click.Group) or hasattr(at, "commands"):
        name = rest.pop(0) if rest else ""
        if name not in at.commands and not name.isupper():
            return f"no verb {name!r}"
        if name.isupper():
            return ""
        at = at.commands[name]
    options = {option for param in at.params for option in param.opts} | {"--help"}
    return next((word for word in rest if word.startswith("-") and word not in options), "")
