"""Keys, sampling, and the mechanisms that touch private images."""
