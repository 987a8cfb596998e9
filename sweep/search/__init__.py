"""The search: samplers, feasibility, early stopping."""
