"""Publication: the release bundle, and the page for the owner alone."""
