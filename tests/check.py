"""The one check command, for people and CI: format, lint, types, tests.

python tests/check.py [pytest arguments]
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "format": ["ruff", "format", "--check", "."],
    "lint": ["ruff", "check", "."],
    "types": ["basedpyright", "--pythonpath", sys.executable],
    "tests": ["pytest", *(sys.argv[1:] or ["-n", "auto", "--dist", "loadgroup"])],
}


def main() -> int:
    """Run every command, also after one has failed; return how many failed."""
    failed = []
    for name, (module, *arguments) in COMMANDS.items():
        print(f"── {name}", flush=True)
        if subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT).returncode:
            failed.append(name)
    # pytest's summary stays the last thing printed
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    raise SystemExit(main())
