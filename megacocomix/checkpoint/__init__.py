"""Saving and loading models: our native checkpoints, and those of other projects."""
