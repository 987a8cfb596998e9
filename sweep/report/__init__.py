"""Report of a sweep: one HTML file that opens without a server and fetches nothing."""

from sweep.report.page import write_report as write_report
