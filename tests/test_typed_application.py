"""What type checkers make of the public surface, in the files of a stranger who has installed the wheel."""

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.structure import FOLDERS

ROOT = Path(__file__).resolve().parent.parent
TYPED = ROOT / "tests" / "typed"
EXAMPLES = ["threads.py", "asyncio_stream.py", "service_fastapi.py", "batch_job.py", "triton_http.py"]
STRANGERS = ["application.py", *EXAMPLES]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an environment in which latentrt lies as its wheel lays it out, and the strangers' files.

    An editable install would not do: type checkers do not follow its import hook.
    """
    home = tmp_path_factory.mktemp("stranger")
    venv.create(home / "env", symlinks=True, with_pip=False)
    scheme = {"base": str(home / "env"), "platbase": str(home / "env")}
    site = Path(sysconfig.get_path("purelib", "venv" if sys.version_info >= (3, 11) else None, scheme))
    installed = [path for path in sys.path if path.endswith("site-packages")]
    (site / "others.pth").write_text("\n".join(installed) + "\n")
    package = shutil.copytree(ROOT / "latentrt", site / "latentrt")
    for folder in FOLDERS:
        for path in [*ROOT.glob(f"{folder}/**/*.py"), *ROOT.glob(f"{folder}/**/py.typed")]:
            target = package / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    for path in [*TYPED.glob("*.py"), *(ROOT / "examples" / name for name in EXAMPLES)]:
        shutil.copy(path, home)
    return home


def _python(home: Path) -> str:
    return str(home / "env" / ("Scripts" if sys.platform == "win32" else "bin") / Path(sys.executable).name)


def _pyright(home: Path) -> set[tuple[str, int, str]]:
    """Errors of pyright's strict mode: (file, line, text)."""
    (home / "pyrightconfig.json").write_text(
        json.dumps({"typeCheckingMode": "strict", "include": ["*.py"], "pythonVersion": "3.10"})
    )
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", _python(home), "-p", "."]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=300)
    found = json.loads(done.stdout)
    assert found["summary"]["filesAnalyzed"] == len(STRANGERS) + 1
    return {
        (Path(item["file"]).name, item["range"]["start"]["line"] + 1, item["message"])
        for item in found["generalDiagnostics"]
        if item["severity"] == "error"
    }


def _mypy(home: Path) -> set[tuple[str, int, str]]:
    """Errors of `mypy --strict`."""
    files = [*STRANGERS, "mistakes.py"]
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", _python(home), *files]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    found = re.findall(r"^(\S+\.py):(\d+): error: (.*)$", done.stdout, re.MULTILINE)
    return {(Path(file).name, int(line), text) for file, line, text in found}


@pytest.mark.parametrize("check", [_pyright, _mypy])
def test_the_application_is_right_and_its_mistakes_are_reported(check, home: Path) -> None:
    found = check(home)
    assert not [error for error in found if error[0] != "mistakes.py"]
    lines = (TYPED / "mistakes.py").read_text(encoding="utf-8").splitlines()
    marked = {number for number, line in enumerate(lines, start=1) if "# wrong" in line}
    assert {line for _, line, _ in found} == marked, sorted(found)
