"""Evaluate models: validation perplexity and benchmark tasks."""
