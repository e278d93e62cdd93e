"""What a package is made of: a checkpoint (`open.Checkpoint`) or a control (`controls.control_file`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ...engines.package import FusedAdapter
from .component import Component
from .tokenizers import WriteTokenizer


class Source(Protocol):
    """Parts with weights, and what is known of them. Attributes are those of `Checkpoint`."""

    @property
    def root(self) -> Path:
        """The folder or file."""
        ...

    @property
    def name(self) -> str:
        """What people call it."""
        ...

    @property
    def family(self) -> str:
        """The family's name, for people."""
        ...

    @property
    def parts(self) -> Mapping[str, Component]:
        """Its parts by name."""
        ...

    @property
    def tokenizers(self) -> Mapping[str, WriteTokenizer]:
        """By their folders' names, what writes them."""
        ...

    @property
    def configs(self) -> Mapping[str, Mapping[str, Any]]:
        """JSON objects by their folders' names."""
        ...

    @property
    def vectors(self) -> Mapping[str, int]:
        """What joins the time embedding (`engines.spec.VECTORS`), and the widths."""
        ...

    @property
    def skips_last_layer(self) -> bool:
        """Whether the context is taken before the text encoder's last layer."""
        ...

    @property
    def fused(self) -> tuple[FusedAdapter, ...]:
        """The adapters that are part of the weights."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines for the user."""
        ...
