"""Clusters for a sweep: launcher files, manifests, and one cluster on this machine."""
