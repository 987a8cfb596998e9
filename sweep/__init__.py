"""Search of central-image count, noise and stage split with Ray Tune, Optuna and Ray Train."""
