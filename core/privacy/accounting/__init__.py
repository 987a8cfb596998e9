"""Accounting: epsilon of mechanisms, and the noise that spends a given one."""
