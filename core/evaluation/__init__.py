"""Scores of synthetic images: Frechet distances and downstream classification accuracy."""
