"""The frozen teacher and the concept labels it gives."""
