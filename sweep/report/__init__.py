"""One HTML file about a sweep that opens without a server and asks the network for nothing."""

from sweep.report.page import write_report

__all__ = ["write_report"]
