"""Every table and figure of the benchmarks, made of their JSON documents alone: `latentrt bench report`."""

from .publish import Pages, Report, outdated, write_report

__all__ = ["Pages", "Report", "outdated", "write_report"]
