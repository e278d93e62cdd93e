"""docs/api.md: every example runs, and no public name is missing."""

import inspect
import re
from pathlib import Path

import pytest

import latentrt

PAGE = Path(__file__).resolve().parent.parent / "docs" / "api.md"
TEXT = PAGE.read_text(encoding="utf-8")
EXAMPLES = list(re.finditer(r"```python\n(.*?)```", TEXT, re.DOTALL))
CODE = "\n".join(match[1] for match in EXAMPLES)


def test_every_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, as the page says: what one defines, the next may use."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for match in EXAMPLES:
        first = TEXT.count("\n", 0, match.start(1))  # so that a traceback shows the page's line
        exec(compile("\n" * first + match[1], str(PAGE), "exec"), names)
    assert (tmp_path / "circle.png").stat().st_size > 1000


@pytest.mark.parametrize("name", dir(latentrt))
def test_every_public_name_has_an_example(name: str) -> None:
    assert re.search(rf"\blatentrt\.{name}\b", CODE), name
    assert re.search(rf"`{name}[`.(]", TEXT) or name == "__version__", name


@pytest.mark.parametrize("owner", [latentrt.Pipeline, latentrt.Step, latentrt.Result, latentrt.Package])
def test_every_public_member_has_an_example(owner: type) -> None:
    members = {name for name, _ in inspect.getmembers(owner)} | set(inspect.get_annotations(owner))
    if owner is latentrt.Pipeline:
        members |= {"package", "backend", "loop", "embeddings"}  # set where it is made
    public = {name for name in members if not name.startswith("_")}
    assert {name for name in public if re.search(rf"\.{name}\b", CODE)} == public  # used
    assert {name for name in public if re.search(rf"`(\w+\.)?{name}[`.(]", TEXT)} == public  # told


def test_every_error_has_a_row() -> None:
    errors = {name for name in dir(latentrt) if name.endswith("Error")} - {"LatentrtError"}
    assert set(re.findall(r"^\| `(\w+Error)` \|", TEXT, re.MULTILINE)) == errors
