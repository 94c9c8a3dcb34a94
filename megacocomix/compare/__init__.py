"""Any number of runs side by side."""
