"""Processors within quotas: fake trees as the kernel's documentation has them, and one real group."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.engines import processors
from latentrt.engines.errors import UsageError
from latentrt.engines.onnxruntime.session import session_options
from latentrt.engines.processors import processor_quota, thread_count, usable_processors
from latentrt.runtime import Pipeline

V1 = "32 31 0:29 {root} {mount} rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
V2 = "31 23 0:28 {root} {mount} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
OTHER = "20 1 0:19 / /proc rw - proc proc rw\n33 31 0:30 / {mount}/../memory rw - cgroup cgroup rw,memory\n"


class Tree:
    """A fake /proc/self and a fake /sys/fs/cgroup."""

    def __init__(self, root: Path) -> None:
        self.proc, self.mount = root / "proc", root / "sys fs"
        self.proc.mkdir()
        self.mount.mkdir()

    def describe(self, cgroup: str, mounts: str, root: str = "/") -> None:
        (self.proc / "cgroup").write_text(cgroup)
        where = str(self.mount).replace(" ", "\\040")
        (self.proc / "mountinfo").write_text((OTHER + mounts).format(root=root, mount=where))

    def write(self, name: str, text: str) -> None:
        path = self.mount / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")

    def quota(self) -> float | None:
        return processor_quota(self.proc)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_version_2_in_a_container(tree: Tree) -> None:
    """With a name space of its own the container sees its group as the root."""
    tree.describe("0::/\n", V2)
    assert tree.quota() is None, "the kernel's own root group has no cpu.max"
    tree.write("cpu.max", "max 100000")
    assert tree.quota() is None
    tree.write("cpu.max", "50000 100000")
    assert tree.quota() == 0.5


@pytest.mark.parametrize(
    ("limits", "quota"),
    [
        ({"a/b/c": "300000 100000"}, 3.0),
        ({"a/b": "150000 100000", "a/b/c": "max 100000"}, 1.5),
        ({"a": "20000 10000", "a/b": "900000 100000", "a/b/c": "400000 100000"}, 2.0),
        ({"a": "max 100000", "other": "1000 100000", "a/b/c/below": "1000 100000"}, None),
    ],
)
def test_the_tightest_group_on_the_way_up_counts(
    tree: Tree, limits: dict[str, str], quota: float | None
) -> None:
    tree.describe("0::/a/b/c\n", V2)
    for group, limit in limits.items():
        tree.write(f"{group}/cpu.max", limit)
    assert tree.quota() == quota


@pytest.mark.parametrize(
    ("path", "root", "group"),
    [
        ("/docker/0123", "/docker/0123", ""),  # without a name space: the mount is of the very group
        ("/docker/0123/inner", "/docker/0123", "inner"),
        ("/kubepods/pod 1/x", "/", "kubepods/pod 1/x"),
        ("/../../elsewhere", "/", ""),  # the process was moved outside what its name space shows
        ("/system.slice/ssh", "/docker/0123", ""),
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_where_the_group_is_mounted(tree: Tree, version: int, path: str, root: str, group: str) -> None:
    lines = f"9:name=systemd:/x\n4:cpu,cpuacct:{path}\n0::/unused\n" if version == 1 else f"0::{path}\n"
    tree.describe(lines, V1 if version == 1 else V2, root.replace(" ", "\\040"))
    if version == 1:
        tree.write(f"{group}/cpu.cfs_quota_us", "250000")
        tree.write(f"{group}/cpu.cfs_period_us", "100000")
    else:
        tree.write(f"{group}/cpu.max", "250000 100000")
    assert tree.quota() == 2.5


def test_version_1_nested_and_without_a_limit(tree: Tree) -> None:
    tree.describe("3:cpuset:/s\n2:cpuacct,cpu:/a/b\n1:memory:/m\n", V1)
    for group, quota in (("", -1), ("a", 80000), ("a/b", -1)):
        tree.write(f"{group}/cpu.cfs_quota_us", str(quota))
        tree.write(f"{group}/cpu.cfs_period_us", "50000")
    assert tree.quota() == 1.6
    tree.write("a/cpu.cfs_quota_us", "-1")
    assert tree.quota() is None


def test_both_versions_side_by_side(tree: Tree) -> None:
    """A hybrid system has version 2 without controllers beside version 1."""
    other = str(tree.mount / "unified").replace(" ", "\\040")
    tree.describe("1:cpu:/\n0::/\n", V1 + V2.replace("{mount}", other))
    tree.write("cpu.cfs_quota_us", "70000")
    tree.write("cpu.cfs_period_us", "100000")
    (tree.mount / "unified").mkdir()
    assert tree.quota() == 0.7


@pytest.mark.parametrize("text", ["", "max", "fifty 100000", "50000", "50000 0"])
def test_what_cannot_be_read_limits_nothing(tree: Tree, text: str) -> None:
    tree.describe("0::/\nnonsense\n", "nonsense - cgroup2\n" + V2)
    tree.write("cpu.max", text)
    assert tree.quota() is None


def test_another_system_has_no_groups(tmp_path: Path) -> None:
    assert processor_quota(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("quota", "usable"), [(None, 8), (0.5, 1), (1.0, 1), (1.9, 1), (2.0, 2), (7.99, 7), (64.0, 8)]
)
def test_usable_processors(monkeypatch: pytest.MonkeyPatch, quota: float | None, usable: int) -> None:
    monkeypatch.setattr(processors, "processor_quota", lambda: quota)
    monkeypatch.setattr(processors, "schedulable_processors", lambda: 8)
    assert usable_processors() == usable


@pytest.fixture
def one_processor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(processors, "schedulable_processors", lambda: 1)
    processors._tell_fewer.cache_clear()  # pyright: ignore[reportPrivateUsage]
    yield
    processors._tell_fewer.cache_clear()  # pyright: ignore[reportPrivateUsage]


@pytest.mark.usefixtures("one_processor")
@pytest.mark.parametrize("asked", [None, 1, np.int64(1), 2, 9999])
def test_threads_are_no_more_than_processors(logged: list[str], asked: int | None) -> None:
    for _ in range(2):
        assert thread_count(asked) == session_options(asked).intra_op_num_threads == 1
    said = [f"{asked} threads were asked for and there are processors for 1: using 1"]
    assert logged == (said if (asked or 1) > 1 else []), "once"


@pytest.mark.parametrize("asked", [0, -1, 1.5, "2", True])
def test_numbers_of_threads_that_are_none(asked: Any) -> None:
    with pytest.raises(UsageError, match=f"threads is {asked!r}; expected a whole number, at least 1"):
        thread_count(asked)
    with pytest.raises(UsageError, match="threads is"):
        Pipeline.open("demo", threads=asked)


THREADS = """
import os, sys
from latentrt.runtime import Pipeline
with Pipeline.open("demo", threads=9999) as pipe:
    pipe("a red circle", num_inference_steps=1, seed=1)
    print(len(os.listdir("/proc/self/task")))
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux lists them")
def test_a_pipeline_starts_no_thousands_of_threads() -> None:
    run = subprocess.run([sys.executable, "-c", THREADS], check=True, stdout=subprocess.PIPE, timeout=120)
    assert int(run.stdout) < 16 * (os.cpu_count() or 1)


@pytest.fixture
def real_group() -> Iterator[Path]:
    """A control group of version 1 below our own, where this machine lets us make one."""
    root = Path("/sys/fs/cgroup/cpu")
    group = root / f"latentrt-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        pytest.skip("no control group can be made here")
    try:
        if not (group / "cpu.cfs_quota_us").exists():
            pytest.skip("this is no control group")
        yield group
    finally:
        group.rmdir()


def test_a_real_quota(real_group: Path) -> None:
    (real_group / "cpu.cfs_quota_us").write_text("50000")
    code = "from latentrt.engines import processors as p; print(p.processor_quota(), p.usable_processors())"
    run = subprocess.run(
        ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', real_group, sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        timeout=60,
    )
    assert run.stdout.split() == ["0.5", "1"]
