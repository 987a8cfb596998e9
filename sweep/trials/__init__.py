"""Trials: a group of Ray Train workers inside a Ray Tune trial."""
