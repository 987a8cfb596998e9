"""The configuration of a sweep."""
