"""Checkpoints from elsewhere → ours, ours → the published code's folders, proved to be the same model."""
