"""The folder of a sweep and what is read from it."""
