"""Is there room: from facts that the tests make up, and from this machine's own."""

from dataclasses import replace
from pathlib import Path

import pytest

from latentrt.engines.errors import BackendError, MemoryLimitError, StorageError
from latentrt.engines.package import Package
from latentrt.engines.tensorrt.preflight import Room, check_capability, check_room, read_room
from latentrt.runtime.model import SHIPPED
from tests.engines.layout_setting import GPU

GIB = 2**30
WEIGHTS = 1_624_952_328  # of the UNet of SD 1.5 in fp16


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_this_machine_has_room_for_the_demo(tmp_path: Path) -> None:
    room = read_room(tmp_path / "not" / "there")
    assert room.disk is not None
    assert room.vram is None
    check_room("unet", 5_000_000, room)


def test_what_is_not_known_refuses_nothing(tmp_path: Path) -> None:
    assert read_room(tmp_path, proc=tmp_path, cgroups=tmp_path).ram is None
    check_room("unet", WEIGHTS, Room(disk=None, ram=None))


def test_plenty_is_enough() -> None:
    check_room("unet", WEIGHTS, Room(disk=2 * GIB, ram=8 * GIB, vram=2 * GIB))


def test_disk() -> None:
    with pytest.raises(StorageError, match=r"1\.00 GB of disk") as caught:
        check_room("unet", WEIGHTS, Room(disk=10**9, ram=None))
    assert "1.69 GB" in caught.value.expected
    assert "--store" in caught.value.fix


def test_ram_refuses_only_what_is_certain_to_fail() -> None:
    check_room("unet", WEIGHTS, Room(disk=None, ram=4 * GIB))  # less than usual, more than the least
    with pytest.raises(MemoryLimitError, match=r"2\.00 GB of memory .* 1\.62 GB") as caught:
        check_room("unet", WEIGHTS, Room(disk=None, ram=2 * 10**9))
    assert "at least 3.38 GB, and usually 6.12 GB" in caught.value.expected
    assert caught.value.culprit == "unet"


def test_device_memory() -> None:
    with pytest.raises(MemoryLimitError, match=r"1\.00 GB of device memory") as caught:
        check_room("unet", WEIGHTS, Room(disk=None, ram=None, vram=10**9))
    assert caught.value.culprit == "unet"


def test_the_library_is_asked_for_device_memory(tmp_path: Path) -> None:
    assert read_room(tmp_path, vram=lambda: 7).vram == 7
    assert read_room(tmp_path, vram=lambda: None).vram is None


def test_memory_without_a_limit(tmp_path: Path) -> None:
    write(tmp_path, {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:     4096 kB\n"})
    write(tmp_path, {"proc/self/cgroup": "0::/\n", "cg/memory.max": "max\n", "cg/memory.current": "5\n"})
    assert read_room(tmp_path, proc=tmp_path / "proc", cgroups=tmp_path / "cg").ram == 4096 * 1024


def test_the_tightest_group_counts_and_its_cached_files_are_free(tmp_path: Path) -> None:
    write(tmp_path, {"proc/meminfo": "MemAvailable: 4096 kB\n", "proc/self/cgroup": "0::/a/b\n"})
    write(
        tmp_path / "cg/a",
        {"memory.max": "1000\n", "memory.current": "900\n", "memory.stat": "anon 1\ninactive_file 300\n\n"},
    )
    write(tmp_path / "cg/a/b", {"memory.max": "5000\n", "memory.current": "10\n"})
    assert read_room(tmp_path, proc=tmp_path / "proc", cgroups=tmp_path / "cg").ram == 400


def test_control_groups_of_version_1(tmp_path: Path) -> None:
    stat = {"memory.limit_in_bytes": "1000", "memory.usage_in_bytes": "2000", "memory.stat": ""}
    write(tmp_path / "cg/memory", stat)
    assert read_room(tmp_path, proc=tmp_path, cgroups=tmp_path / "cg").ram == 0


@pytest.mark.parametrize(("capability", "refused"), [((8, 6), True), ((8, 9), False), ((12, 0), False)])
def test_a_gpu_that_is_too_old_for_a_format(capability: tuple[int, int], refused: bool) -> None:
    manifest = Package.open(SHIPPED["demo"]).manifest
    gpu = replace(GPU, compute_capability=capability)
    check_capability(manifest, gpu)
    rounded = replace(manifest, quantised={"format": "fp8", "capability": "8.9"})
    check_capability(rounded, None)
    if not refused:
        check_capability(rounded, gpu)
        return
    with pytest.raises(BackendError, match=r"is in fp8, and NVIDIA .* is sm_86"):
        check_capability(rounded, gpu)
