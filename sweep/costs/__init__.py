"""Costs: estimates, use, prices and limits."""
