"""The model that ships: what the exporter makes of the shipped checkpoint, small enough, and it obeys."""

import json
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

from latentrt.demo.checker import SEMANTIC_IOU, check
from latentrt.demo.lessons import LORAS, SHAPE
from latentrt.demo.shapes import Scene, held_out_scenes
from latentrt.engines.package import Defaults, Package
from latentrt.export import export_package
from latentrt.runtime import Pipeline

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "demo"


@pytest.mark.slow
def test_it_is_what_the_exporter_makes_of_the_shipped_checkpoint(tmp_path: Path) -> None:
    shipped = Package.open(DEMO / "package")
    shipped.verify()
    made = export_package(DEMO / "checkpoint", tmp_path / "package", dtype="fp32", verify=True)
    assert made.manifest.nets == shipped.manifest.nets
    assert made.manifest.defaults == shipped.manifest.defaults
    for name, record in shipped.manifest.files.items():
        if name.endswith(".onnx"):
            here, there = (
                Counter(node.op_type for node in onnx.load(p.path(name), load_external_data=False).graph.node)
                for p in (shipped, made)
            )
            assert here == there
        else:
            assert made.manifest.files[name] == record


def test_its_defaults_are_the_recommended_ones() -> None:
    recommended = json.loads((DEMO / "checkpoint" / "recommended.json").read_text())
    defaults = vars(Package.open(DEMO / "package").manifest.defaults)
    assert defaults == {**vars(Defaults()), **recommended}


def test_the_wheel_holds_the_package_not_the_checkpoint_and_is_small(tmp_path: Path) -> None:
    command = ["pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(ROOT)]
    subprocess.run([sys.executable, "-m", *command], check=True, timeout=300)
    (wheel,) = tmp_path.glob("latentrt-*.whl")
    assert wheel.stat().st_size < 12.5e6  # 2 MB of it are controls
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = Package.open(DEMO / "package")
    assert {f"latentrt/demo/package/{name}" for name in shipped.manifest.files} <= names
    assert {f"latentrt/demo/adapters/{name}.safetensors" for name in LORAS} <= names
    assert f"latentrt/demo/embeddings/{SHAPE}.safetensors" in names
    assert "latentrt/runtime/py.typed" in names
    folders = ("adapters", "benchmarks", "checkpoints", "cli", "demo", "engines", "export", "runtime")
    sources = [path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert {f"latentrt/{path.as_posix()}" for path in sources} <= names, "a room that pyproject does not list"
    assert not [
        name for name in names if "skeletons/" in name and not ("yardstick" in name or "sd15-fp16" in name)
    ]
    assert not [name for name in names if "demo/checkpoint/" in name or name.startswith("tests")]


@pytest.mark.parametrize(
    ("prompt", "scene"),
    [
        (
            "a red circle on a blue background",
            Scene(colour="red", shape="circle", background="blue", size="medium"),
        ),
        (
            "a small yellow star on a green background",
            Scene(colour="yellow", shape="star", background="green", size="small"),
        ),
    ],
)
def test_the_readmes_prompts_are_drawn_as_asked(prompt: str, scene: Scene) -> None:
    with Pipeline.open("demo") as pipe:
        assert check(np.asarray(pipe(prompt, seed=7).images[0])).obeys(scene, SEMANTIC_IOU)


@pytest.mark.parametrize("every", [28, pytest.param(14, marks=pytest.mark.slow)])
def test_held_out_prompts_are_mostly_obeyed(every: int) -> None:
    """A quick look; `python -m latentrt.demo.evaluate` measures all of them."""
    scenes = held_out_scenes()[::every]
    with Pipeline.open("demo") as pipe:
        images = pipe([scene.prompt() for scene in scenes], seed=100, output_type="np").images
    right = [check(image).obeys(scene, SEMANTIC_IOU) for image, scene in zip(images, scenes, strict=True)]
    assert sum(right) >= 0.6 * len(scenes)
    shuffled = zip(images, scenes[1:] + scenes[:1], strict=True)
    assert sum(check(image).obeys(scene, SEMANTIC_IOU) for image, scene in shuffled) <= 28 / every
