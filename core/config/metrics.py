"""Names of the scores."""

DIRECTIONS = {
    "accuracy": "maximize",
    "dp_accuracy": "maximize",
    "fid": "minimize",
    "fid_cnn": "minimize",
    "kid": "minimize",
    "kid_cnn": "minimize",
    "precision": "maximize",
    "precision_cnn": "maximize",
    "recall": "maximize",
    "recall_cnn": "maximize",
}
"""Every score that can be an objective and the direction in which it improves."""
HEADLINES = ("accuracy", "dp_accuracy", "fid", "fid_cnn")
"""The scores that tables show beside the objective."""
DISTRIBUTION_METRICS = ("fid", "kid", "precision", "recall")
"""The scores of a feature extractor; their names end in what `SUFFIXES` has for it."""
SUFFIXES = {"inception": "", "cnn": "_cnn"}
