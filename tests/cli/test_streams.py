"""The command where its standard streams are closed, full, or read by nobody: in processes of their own."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a POSIX shell closes the streams")

FULL = Path("/dev/full")
PICTURE = ["generate", "a red circle", "--steps", "1", "--seed", "1", "--threads", "1"]
# What prints something, with its exit code where all is well. A verb that needs files shows an error's way.
VERBS: dict[str, tuple[list[str], int]] = {
    "help": (["--help"], 0),
    "generate": ([*PICTURE, "-o", "x.png"], 0),
    "generate --json": ([*PICTURE, "-o", "x.png", "--json"], 0),
    "inspect": (["inspect"], 0),
    "inspect --samplers": (["inspect", "--samplers"], 0),
    "metadata": (["metadata", "made.png"], 0),
    "cache ls": (["cache", "ls"], 0),
    "cache verify": (["cache", "verify", "--json"], 0),
    "cache prune": (["cache", "prune", "--dry-run"], 0),
    "doctor": (["doctor"], 0),
    "convert": (["convert", "nowhere.ckpt", "--json"], 3),
    "export": (["export", "--json"], 2),
    "build": (["build", "nowhere", "--json"], 3),
    "bench compare": (["bench", "compare", "nowhere.json", "nowhere.json", "--json"], 3),
}
every_verb = pytest.mark.parametrize(("words", "code"), list(VERBS.values()), ids=list(VERBS))


@pytest.fixture
def command(tmp_path: Path) -> Any:
    """Run the command in an empty folder behind some words of a shell, such as `2>&-`."""
    Image.new("RGB", (8, 8)).save(tmp_path / "made.png")

    def run(
        words: list[str], redirections: str = "", encoding: str = "", **options: Any
    ) -> subprocess.CompletedProcess[str]:
        settings = {"LATENTRT_CACHE": str(tmp_path), "PYTHONWARNINGS": "error", "PYTHONUNBUFFERED": ""}
        return subprocess.run(
            ["sh", "-c", f'exec "$@" {redirections}', "sh", sys.executable, "-m", "latentrt.cli", *words],
            cwd=tmp_path,
            env={**os.environ, **settings, "PYTHONIOENCODING": encoding},
            text=True,
            timeout=60,
            check=False,
            **({"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options),
        )

    return run


@every_verb
def test_without_standard_error(command: Any, tmp_path: Path, words: list[str], code: int) -> None:
    """Nothing meant for it may land on standard output, nor in the first file that is opened."""
    done = command(words, "2>&- <&-")
    assert done.returncode == code
    if "--json" in words:
        json.loads(done.stdout)
    assert " · total " not in done.stdout
    if "x.png" in words:
        Image.open(tmp_path / "x.png").verify()


@pytest.mark.parametrize("redirections", [">&-", ">&- 2>&-", ">&- 2>&- <&-", "2>/dev/full"])
def test_a_picture_is_drawn_all_the_same(command: Any, tmp_path: Path, redirections: str) -> None:
    if "full" in redirections and not FULL.exists():
        pytest.skip("no /dev/full here")
    assert command([*PICTURE, "-o", "x.png"], redirections).returncode == 0
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (128, 128)


def test_the_library_needs_no_standard_streams(tmp_path: Path) -> None:
    """What a service under pythonw has: `sys.stderr` is None, and the prompt is one that is remarked on."""
    code = (
        "import sys; from latentrt.runtime import Pipeline\n"
        "assert sys.stdout is sys.stderr is None\n"
        "with Pipeline.open('demo', threads=9999) as pipe:\n"
        "    pipe('red ' * 90, prompt_syntax='plain', num_inference_steps=1, seed=1).save('x.png')"
    )
    words = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-W", "error", "-c", code]
    subprocess.run(words, cwd=tmp_path, check=True, timeout=60)
    Image.open(tmp_path / "x.png").verify()


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
@every_verb
def test_a_full_standard_output_is_an_error_of_the_disk(command: Any, words: list[str], code: int) -> None:
    done = command(words, "> /dev/full")
    # An error that was to be JSON keeps its own code, and is told where it can be.
    assert done.returncode == (code or 7)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert (os.strerror(errno.ENOSPC) in done.stderr) == (code == 0)


@every_verb
def test_a_reader_who_has_had_enough_ends_it_quietly(command: Any, words: list[str], code: int) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = command(words, stdout=writing)
    finally:
        os.close(writing)
    assert done.returncode == 141
    remarks = ("latentrt: auto takes ", "open ")
    assert not [line for line in done.stderr.splitlines() if not line.startswith(remarks)]


def test_letters_that_a_stream_does_not_know(command: Any) -> None:
    done = command(["metadata", "狐狸.png"], "2>&1", encoding="latin-1")
    assert done.returncode == 2
    assert "\\u72d0" in done.stdout
