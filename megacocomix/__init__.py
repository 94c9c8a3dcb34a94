"""megacocomix: pretraining GPT-2-style language models with continuous concepts (CoCoMix), at scale."""

__version__ = "0.1.0"
