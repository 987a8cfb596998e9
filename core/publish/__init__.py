"""What leaves a run folder: the release bundle; and what its owner alone may see."""
