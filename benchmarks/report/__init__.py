"""Every table and figure of the benchmarks, made of their JSON documents alone: `latentrt bench report`."""

from .publish import BEGIN, END, Report, outdated, report_is_current, write_report

__all__ = ["BEGIN", "END", "Report", "outdated", "report_is_current", "write_report"]
