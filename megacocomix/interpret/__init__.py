"""Reading and steering the concepts that a model predicts."""
