"""Sampling, and the mechanisms that touch private images."""
