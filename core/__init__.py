"""Two-stage differentially private image synthesis: the trainers, free of Ray and MLflow."""
