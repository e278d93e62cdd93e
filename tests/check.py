"""The one check command, for people and CI: format, lint, types, tests.

python tests/check.py [pytest arguments]
python tests/check.py --imports [CHECKOUT]   a table of what imports what
python tests/check.py --hops [CHECKOUT]      how many files a prompt goes through
python tests/check.py --launches [CHECKOUT]  how many kernels ONNX Runtime launches in a run on CUDA

The last three look at this checkout unless another is named.
"""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# In groups, begun in the order of tests/conftest.py. Behind a process that dies, xdist would hang at the end.
PARALLEL = ["-n", "auto", "--dist", "loadgroup", "--no-loadscope-reorder", "--max-worker-restart", "0"]


def main(arguments: list[str]) -> int:
    """Run every command, also after one has failed; return how many failed."""
    failed: list[str] = []
    # Types need one processor for a minute: they take what the tests leave, and show only what is wrong.
    nice = ["nice", "-n", "10"] if shutil.which("nice") else []
    types = subprocess.Popen(
        [*nice, sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for name, command in {
        "format": ["ruff", "format", "--check", "."],
        "lint": ["ruff", "check", "."],
        "tests": ["pytest", *(arguments or PARALLEL)],
    }.items():
        print(f"── {name}", flush=True)
        if subprocess.run([sys.executable, "-m", *command], cwd=ROOT).returncode:
            failed.append(name)
    found, _ = types.communicate()
    if types.returncode:
        print(f"── types\n{found}", file=sys.stderr)
        failed.append("types")
    # pytest's summary stays the last thing printed where nothing failed
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


def look(arguments: list[str]) -> int:
    """Print the table that was asked for."""
    sys.path.insert(0, str(ROOT))
    from tests.cuda.launches import print_launches
    from tests.hops import print_hops
    from tests.structure import print_imports

    shows = {"--imports": print_imports, "--hops": print_hops, "--launches": print_launches}
    show = shows[arguments[0]]
    show(Path(arguments[1]).resolve() if arguments[1:] else ROOT)
    return 0


if __name__ == "__main__":
    look_only = sys.argv[1:2] in (["--imports"], ["--hops"], ["--launches"])
    raise SystemExit(look(sys.argv[1:]) if look_only else main(sys.argv[1:]))
