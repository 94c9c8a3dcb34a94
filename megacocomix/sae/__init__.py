"""Sparse autoencoders: the model, its file, other projects' formats, conversion and training."""
