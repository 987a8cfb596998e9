"""Machines that a sweep runs on: launcher files, manifests, and one cluster on this machine."""
