"""The driver: launch, cluster, progress and checks."""
