"""Privacy plan: the releases of a trial, its scope and its noise."""
