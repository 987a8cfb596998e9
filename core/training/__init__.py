"""Training: the loop, its stages, checkpoints and batches."""
