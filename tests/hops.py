"""Through how many files a prompt goes before it is a picture (`check.py --hops`).

A project's Python frames are watched (sys.setprofile) in two stretches: the whole command `latentrt
generate`, its modules already imported, and one more prompt on a pipeline that is already open. A move
leads from a function of one project file into a function of another, or back out of it; what a library
calls for us counts as called by the nearest function of the project below it. `moves` takes every place of
a call once, there and back, as a reader does; `at run time` counts every call, also of the second step.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.structure import FOLDERS

# Runs in a process of its own, so that it can watch another checkout: argv is its root, then its folders.
WATCH = """
import json, os, sys, tempfile, types
root, *folders = sys.argv[1:]
package = types.ModuleType("latentrt")
package.__path__ = [root]
sys.modules["latentrt"] = package
from latentrt import cli
from latentrt.runtime import Pipeline

ours = tuple(os.path.join(root, folder) + os.sep for folder in folders)
PROMPT = "a red circle on a blue background"


def watch(draw):
    stack, files, places, calls = [], set(), set(), 0

    def on(frame, event, argument):
        nonlocal calls
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(ours):
            return
        if event == "return":
            if stack and stack[-1] is frame:
                stack.pop()
            return
        files.add(code.co_filename)
        if stack and stack[-1].f_code.co_filename != code.co_filename:
            caller = stack[-1]
            places.add((caller.f_code, caller.f_lineno, code))
            calls += 1
        stack.append(frame)

    sys.setprofile(on)
    try:
        draw()
    finally:
        sys.setprofile(None)
    return {"files": len(files), "moves": 2 * len(places), "at run time": 2 * calls}


def command(output):
    sys.argv = ["latentrt", "generate", PROMPT, "--steps", "2", "--seed", "1", "--output", output]
    try:
        cli.main()
    except SystemExit as end:
        assert not end.code, end.code


with tempfile.TemporaryDirectory() as folder:
    command(folder + "/0.png")
    found = {"latentrt generate": watch(lambda: command(folder + "/1.png"))}
    with Pipeline.open("demo") as pipe:
        draw = lambda prompt, name: pipe(prompt, num_inference_steps=2, seed=1).save(folder + name)
        draw("a large green star", "/2.png")
        found["another prompt"] = watch(lambda: draw(PROMPT, "/3.png"))
print(json.dumps(found))
"""


def count_hops(root: Path) -> dict[str, dict[str, int]]:
    """{stretch: {"files", "moves", "at run time"}} of a checkout."""
    command = [sys.executable, "-c", WATCH, str(root), *FOLDERS]
    with tempfile.TemporaryDirectory() as folder:  # nor does an engine store of this machine count
        environment = {**os.environ, "LATENTRT_CACHE": f"{folder}/cache"}
        run = subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True)
    found: dict[str, dict[str, int]] = json.loads(run.stdout.splitlines()[-1])
    return found


def print_hops(root: Path) -> None:
    """A row for each stretch."""
    print(f"{'':20} {'files':>6} {'moves':>6} {'at run time':>12}")
    for stretch, found in count_hops(root).items():
        print(f"{stretch:20} {found['files']:6} {found['moves']:6} {found['at run time']:12}")
