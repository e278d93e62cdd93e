"""How many processors this process may use, within the quota of its control groups, and what they can.

Containers limit processors by a quota: so many microseconds of all of them in every period. Threads beyond it
are stopped together until the period ends, and those that wait for each other lose more than they add. Under
0.5 processors 20 steps of the demo took 0.59 s with one thread, 1.2 s with two and 5.2 s with eight.

Sources: Documentation/admin-guide/cgroup-v2.rst (`cpu.max`) and Documentation/scheduler/sched-bwc.rst
(`cpu.cfs_quota_us`) of the Linux kernel, proc(5) for `mountinfo` and `cgroup`.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from operator import index
from pathlib import Path, PurePosixPath

from .errors import UsageError

_LOG = logging.getLogger(__name__)
_PROC = Path("/proc/self")
_CPUINFO = Path("/proc/cpuinfo")
# Instructions that add products of bytes up in 32 bits, as Linux names them: x86's VNNI and AMX (Linux,
# arch/x86/include/asm/cpufeatures.h), and ARM's dot products (arch/arm64/kernel/cpuinfo.c).
_ADD_BYTES = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"})
_MULTIPLY_BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16"})


def usable_processors() -> int:
    """Those the process may run on, or fewer where a quota leaves less: at least one."""
    quota = processor_quota()
    return schedulable_processors() if quota is None else max(1, min(schedulable_processors(), int(quota)))


def thread_count(asked: int | None) -> int:
    """How many threads to start: as many as are asked for, but no more than there are processors for them.

    None is one for each. More make every picture slower, so a setting that comes from a larger machine counts
    as the largest that makes sense, and that is logged, once.

    Raises:
        UsageError: less than 1, or no whole number.
    """
    if asked is None:
        return usable_processors()
    try:
        count = 0 if isinstance(asked, bool) else index(asked)  # NumPy's integers too
    except TypeError:
        count = 0
    if count < 1:
        raise UsageError(
            f"threads is {asked!r}",
            expected="a whole number, at least 1",
            fix="Leave it out to use every processor.",
        )
    usable = usable_processors()
    if count > usable:
        _tell_fewer(count, usable)
    return min(count, usable)


@cache
def _tell_fewer(asked: int, usable: int) -> None:
    _LOG.warning("%d threads were asked for and there are processors for %d: using %d", asked, usable, usable)


def schedulable_processors() -> int:
    """Those the process may run on, which may be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor() -> str:
    """The processor's name, in one line."""
    return _of_processor("model name") or " ".join(platform.processor().split()) or "unknown"


def adds_bytes() -> bool:
    """Whether the processor adds products of bytes up in 32 bits. No where nothing tells: on Windows.

    All of Apple's own processors do.
    """
    if sys.platform == "darwin":
        return platform.machine() == "arm64"
    return not _ADD_BYTES.isdisjoint(_of_processor("flags", "Features").split())


def multiplies_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16, fast or not. No on ARM, and where nothing tells."""
    return not _MULTIPLY_BFLOAT16.isdisjoint(_of_processor("flags").split())


def _of_processor(*names: str) -> str:
    """What the kernel says of the first processor under one of these names, in one line; "" for nothing."""
    with suppress(OSError), _CPUINFO.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name.strip() in names:
                return " ".join(value.split())
    return ""


def processor_quota(proc: Path = _PROC) -> float | None:
    """How many processors' time the process may use, or None where nothing limits it.

    A group's limit holds for all groups below it, so the tightest on the way up counts. `proc` is this
    process' folder below /proc.
    """
    limits = [limit for folder in control_groups("cpu", proc) if (limit := _limit(folder)) is not None]
    return min(limits, default=None)


def control_groups(controller: str, proc: Path = _PROC) -> Iterator[Path]:
    """The folders of the groups that limit something ("cpu", "memory"), from the process' own upwards.

    Those of version 1 with that controller, and those of version 2.
    """
    paths = dict[str, str]()  # by controller; version 2 has none here
    for line in _lines(proc / "cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        paths.update(dict.fromkeys(controllers.split(","), path))
    for line in _lines(proc / "mountinfo"):
        # ID PARENT MAJOR:MINOR ROOT MOUNT OPTIONS [FIELDS...] - TYPE SOURCE OPTIONS
        fields, _, rest = line.partition(" - ")
        words, kind = fields.split(" "), rest.split(" ")
        if len(words) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        key = controller if kind[0] == "cgroup" else ""
        if key in paths and (not key or key in kind[2].split(",")):
            mount = Path(_unescaped(words[4]))
            folder = mount / _below(paths[key], _unescaped(words[3]))
            yield from (one for one in (folder, *folder.parents) if one.is_relative_to(mount))


def _below(path: str, root: str) -> PurePosixPath:
    """A group's path below a mount of the group `root`; outside, only the mount can be seen."""
    group = PurePosixPath(path)
    if ".." in group.parts or not group.is_relative_to(root):
        return PurePosixPath()
    return group.relative_to(root)


def _limit(folder: Path) -> float | None:
    """The processors that a group of either version may use, None where it does not limit them."""
    with suppress(ValueError, ZeroDivisionError, IndexError):
        if words := _lines(folder / "cpu.max"):  # "max 100000", or microseconds "50000 100000"
            quota, period = words[0].split()[:2]
            return None if quota == "max" else int(quota) / int(period)
        quota, period = (_lines(folder / f"cpu.cfs_{name}_us")[0] for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None  # -1: no limit
    return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:  # another system, a group without this controller, or one that is not ours to see
        return []


def _unescaped(word: str) -> str:
    """A path of mountinfo, in which the kernel writes spaces and the like as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), word)
