"""Readers of other projects' checkpoints: Hugging Face, the published CoCoMix code, Megatron-LM, DeepSpeed."""
