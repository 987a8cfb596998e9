"""Folder of a sweep, and its readers."""
