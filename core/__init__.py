"""Two-stage differentially private image synthesis: one run, free of Ray and MLflow."""

import os

# Threads that wait by spinning slow a busy machine down thirtyfold; must be set before torch loads.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
