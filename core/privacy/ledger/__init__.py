"""The ledger of a data set, what a run asks of it, and the privacy card."""
