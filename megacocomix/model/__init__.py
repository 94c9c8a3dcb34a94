"""The student as plain single-process PyTorch: knows no mesh."""
