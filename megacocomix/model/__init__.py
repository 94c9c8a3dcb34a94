"""The student as plain single-process PyTorch. It imports nothing distributed."""
