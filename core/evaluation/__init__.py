"""Scores of synthetic images: distribution metrics and downstream accuracy."""
