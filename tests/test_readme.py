"""The README and its companions: their code runs, their commands are accepted, their links lead somewhere."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from safetensors.numpy import save_file

from latentrt import cli
from latentrt.checkpoints.files.open import Checkpoint
from latentrt.engines.errors import CheckpointError
from tests.structure import FOLDERS, sources

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "docs/guide.md",
        "docs/models.md",
        "docs/api.md",
        "docs/platforms.md",
    )
}
README, GUIDE, MODELS = PAGES["README.md"], PAGES["docs/guide.md"], PAGES["docs/models.md"]
BLOCKS = re.findall(r"```sh\n(.*?)```", README + GUIDE, re.DOTALL)
PICTURES = re.findall(r"<!-- pictures:begin -->\s*```sh\n(.*?)```", GUIDE, re.DOTALL)
GIVEN = ("mask.png", "edges.png")  # which no command makes
SET_UP = [block.strip() for block in BLOCKS if block.startswith("python3 -m venv")]
LINES = [
    line.partition("#")[0].strip()
    for block in BLOCKS
    if block not in PICTURES
    for line in block.splitlines()
    if line.startswith("latentrt")
]
# What stands for a file of the reader's own, or for a model that would have to be fetched.
READERS = re.compile(
    r"\b(CHECKPOINT|PACKAGE|BASE|LORA|UNCLIP|old\.\w+|dreamshaper_8|sdxl-folder|ORG/NAME|stabilityai)\b"
)


def test_the_readme_is_read_in_three_minutes() -> None:
    assert README.count("\n") <= 115


def test_python_examples_run(tmp_path: Path) -> None:
    examples = re.findall(r"```python\n(.*?)```", README + GUIDE, re.DOTALL)
    assert len(examples) == 3
    for code in examples:
        subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, check=True, timeout=120)
    assert (tmp_path / "star.png").stat().st_size > 1000


def test_set_up_is_two_commands_of_one_line() -> None:
    install, test = SET_UP
    assert "\n" not in install + test
    assert install.endswith('latentrt generate "a red circle on a blue background"')
    assert 'pip install ".[cpu]"' in install
    assert test.startswith("python3 -m venv .venv-test")
    assert test.endswith("python tests/check.py")


def test_commands_of_the_shipped_model_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every `latentrt` line that needs no checkpoint of the reader's own."""
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "store"))
    ours = [line for line in LINES if not READERS.search(line)]
    assert len(ours) >= 10
    for line in ours:
        # measuring takes minutes, which the tests of each verb do not
        line = re.sub(r"^(latentrt bench \S+).*", r"\1 --help", line)
        command = line.replace("latentrt", f"{sys.executable} -W error -m latentrt.cli", 1)
        subprocess.run(command, shell=True, cwd=tmp_path, check=True, timeout=120, stdout=subprocess.DEVNULL)


def test_commands_for_the_readers_checkpoint_are_accepted() -> None:
    """Their options exist and parse; what they would do is not done."""
    verbs = typer.main.get_command(cli.app).commands
    theirs = [line for line in LINES if READERS.search(line)]
    assert len(theirs) >= 12
    for line in theirs:
        _, verb, *arguments = shlex.split(line)
        verbs[verb].make_context(verb, arguments)


def test_modules_that_are_run_exist() -> None:
    named = {name for page in PAGES.values() for name in re.findall(r"python -m (latentrt[\w.]+)", page)}
    assert len(named) >= 2
    for name in named:
        assert find_spec(name), name


def test_the_pictures_are_made_by_the_commands_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = ROOT / "docs" / "pictures"
    monkeypatch.chdir(tmp_path)
    for name in GIVEN:
        shutil.copy(shown / name, tmp_path)
    for line in "".join(PICTURES).splitlines():
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code, line
    for picture in shown.glob("*.png"):
        wanted, found = (
            np.asarray(Image.open(folder / picture.name)).astype(int) for folder in (shown, tmp_path)
        )
        # processors differ in their last bits, and a shade may flip
        assert np.abs(wanted - found).mean() < 1, picture.name
    linked = set(re.findall(r"\(pictures/(\w+\.png)\)", GUIDE))
    assert linked == {picture.name for picture in shown.glob("*.png")} - {"mask.png"}
    assert len(PICTURES) == 2


def _headings(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!http)([^)]+)\)", PAGES[page]):
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        assert not anchor or anchor in _headings(file), target


def test_files_that_are_named_exist() -> None:
    """`folder/file.py` in the pages and in the product's comments, after files have moved."""
    folders = "|".join((*FOLDERS, "docs", "examples", "latentrt", "tests"))
    named = re.compile(rf"`((?:{folders})/[\w/.-]+\.(?:py|md|json|toml))`")
    found = [
        (file, name)
        for file in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *sources(ROOT))
        for name in named.findall(file.read_text(encoding="utf-8"))
    ]
    assert len(found) > 50
    assert [f"{file.relative_to(ROOT)}: {name}" for file, name in found if not (ROOT / name).exists()] == []


def test_folders_are_refused_as_the_page_says(tmp_path: Path) -> None:
    rows = re.findall(r"^\| `(\w+Pipeline)`.* \| ([^|,]+)[^|]* \|$", MODELS, re.MULTILINE)
    assert len(rows) == 12
    for pipeline, family in rows:
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
        with pytest.raises(CheckpointError) as error:
            Checkpoint.open(tmp_path)
        assert f" holds {family} ({pipeline})" in error.value.found


def test_classes_that_are_supported_are_not_refused(tmp_path: Path) -> None:
    """They go on to the first part, which is missing here."""
    pipelines = set(re.findall(r"`(\w+Pipeline)`", MODELS[: MODELS.index("A folder needs")]))
    assert len(pipelines) == 9
    for pipeline in pipelines:
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
        with pytest.raises(CheckpointError, match="is missing"):
            Checkpoint.open(tmp_path)


def test_files_are_refused_as_the_page_says(tmp_path: Path) -> None:
    rows = re.findall(r"^\| `([a-z]\w+(?:\.\w+)*)`.* \| ([^|]+) \|$", MODELS, re.MULTILINE)
    assert len(rows) == 16
    for tensor, kind in rows:
        path = tmp_path / f"{tensor}.safetensors"
        save_file({tensor: np.zeros(1, np.float32)}, path)
        with pytest.raises(CheckpointError) as error:
            Checkpoint.open(path)
        assert f" is {kind}" in error.value.found
