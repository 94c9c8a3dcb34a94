"""Compare any number of runs on one page."""
