"""What peers need before they can be opened; looked for without importing anything."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from ...engines.package import Package
from .contract import NotAvailableError, Task


def missing_modules(*names: str) -> str | None:
    """None if all of these modules are installed, else which are not."""
    missing = [name for name in names if find_spec(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


def missing_checkpoint(task: Task) -> str | None:
    """None if the diffusers folder that the package was exported from is at hand, else the reason."""
    if task.checkpoint is None:
        return "needs the diffusers checkpoint that the package was exported from; none was given"
    if not (task.checkpoint / "model_index.json").is_file():
        return f"{task.checkpoint.name} holds no diffusers checkpoint: there is no model_index.json"
    return None


def version_of(distribution: str) -> str:
    """The version of a distribution; "unknown" if it came by other means than pip."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"


def open_plain_package(task: Task) -> Package:
    """The package with the UNet before hoisting. Raises PackageError, NotAvailableError if it has none."""
    package = Package.open(task.package)
    if "unet_whole" in package.manifest.nets:
        return package
    raise NotAvailableError(
        f"{package.manifest.name} has no UNet before hoisting (unet_whole)",
        expected="a package that `latentrt export` of this release wrote",
        fix="Export the checkpoint again: latentrt export CHECKPOINT -o PACKAGE.",
    )
