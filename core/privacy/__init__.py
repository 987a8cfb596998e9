"""Everything that a privacy claim rests on: plan, accounting, keys, sampling, releases, DP-SGD."""
