"""Files, locks and the terminal."""
