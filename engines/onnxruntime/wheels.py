"""Which wheel the module `onnxruntime` comes from. There are several, and all write into one folder.

Whoever installs two of them imports what the last one wrote, and whoever then removes one takes files of the
other with it: `import onnxruntime` finds an empty folder, or a library without its Python files.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from ..installed import install_command

# Those that have had a release since 2023 and contain the module.
WHEELS = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-qnn",
    "onnxruntime-rocm",
    "onnxruntime-migraphx",
    "onnxruntime-cann",
    "onnxruntime-azure",
    "onnxruntime-training",
    "onnxruntime-windowsml",
    "ort-nightly",
    "ort-nightly-gpu",
)


def installed_wheels() -> dict[str, str]:
    """The versions of those that pip has installed, by name; nothing is imported."""
    found = dict[str, str]()
    for name in WHEELS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def imported_wheel() -> str:
    """The name of the wheel whose files are there; "" where that cannot be found out. Imports the library."""
    try:
        return str(import_module("onnxruntime.capi.build_and_package_info").package_name)
    except Exception:  # whatever is broken there: others say so
        return ""


def several_wheels() -> str:
    """What is wrong where more than one is installed, with the command that mends it; else ""."""
    wheels = installed_wheels()
    if len(wheels) < 2:
        return ""
    names = " and ".join(f"{name} {number}" for name, number in wheels.items())
    imported = imported_wheel()
    which = f"; what is imported is {imported}" if imported else ""
    return f"{names} are installed into one folder{which}. Keep one of them: {reinstall_command()}"


def reinstall_command(*, gpu: bool | None = None) -> str:
    """The command that leaves one whole wheel. `gpu`: the one for CUDA; None: as it seems to be wanted."""
    wheels = installed_wheels()
    if gpu is None:
        gpu = "onnxruntime-gpu" in wheels
    install = install_command("cuda" if gpu else "cpu")
    # Removed first, because another wheel would be written over the one that is there.
    return f"pip uninstall -y {' '.join(wheels)} && {install}" if wheels else install
