"""The privacy plan: what a trial releases, under which scope, at which noise."""
